"""The guest of a published image, until its manifest has told which OS it is.

Nothing is refused for it that one guest OS could have, and nothing is its default.
"""

from __future__ import annotations

from smolvm_async.guests.linux import LINUX

PUBLISHED = LINUX._replace(
    name="",
    title="the image",
    default_memory=0,
    default_cpus=0,
    unsupported={
        "snapshot": (
            "snapshot() is not in this version yet: pass keep=True, and the VM keeps its disk when "
            "it stops."
        ),
    },
)

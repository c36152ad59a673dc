"""The guest operating systems, a file for each."""

from __future__ import annotations

from typing import Literal

from smolvm_async.guests.features import ARGUMENTS
from smolvm_async.guests.linux import DEBIAN, LINUX
from smolvm_async.guests.profile import GuestProfile
from smolvm_async.guests.windows import WINDOWS

__all__ = [
    "ARGUMENTS",
    "BUILT_IN",
    "CHOICES",
    "DEFAULT",
    "GUESTS",
    "PUBLISHED",
    "GuestName",
    "GuestProfile",
]

GuestName = Literal["windows", "linux"]  # the names in GUESTS, for type checkers
GUESTS = {profile.name: profile for profile in (WINDOWS, LINUX)}
BUILT_IN = {DEBIAN.name: DEBIAN}  # the guest OSes for which this library builds an image
DEFAULT = LINUX  # without os= and image=
CHOICES = " or ".join(f"os={name!r}" for name in GUESTS)  # for messages

# The guest of a published image until its manifest tells the guest OS: no value is its default,
# and every feature that some guest OS has is allowed.
PUBLISHED = LINUX._replace(
    name="",
    title="s3://",
    default_memory=0,
    minimum_memory=min(profile.minimum_memory for profile in GUESTS.values()),
    default_cpus=0,
    features=frozenset(name for profile in GUESTS.values() for name in profile.features),
)

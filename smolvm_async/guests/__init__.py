"""The guest operating systems, with one file for each."""

from __future__ import annotations

from typing import Literal

from smolvm_async.guests.features import ARGUMENTS, FEATURES, Channel
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
    "Channel",
    "GuestName",
    "GuestProfile",
]

GuestName = Literal["windows", "linux"]  # the names in GUESTS, for type checkers
GUESTS = {profile.name: profile for profile in (WINDOWS, LINUX)}
BUILT_IN = {DEBIAN.name: DEBIAN}  # the guest OSes for which this library builds an image
DEFAULT = LINUX  # if neither os= nor image= is given
CHOICES = " or ".join(f"os={name!r}" for name in GUESTS)  # for error messages

# The profile of a published image until its manifest, which names the guest OS, has been read. The
# profile has no default memory or cores, and it allows every feature that any guest OS has.
PUBLISHED = LINUX._replace(
    name="",
    title="s3://",
    default_memory=0,
    minimum_memory=min(profile.minimum_memory for profile in GUESTS.values()),
    default_cpus=0,
    features=frozenset(FEATURES),
)

"""The guest operating systems, one file for each."""

from __future__ import annotations

from smolvm_async.guests.linux import DEBIAN, LINUX
from smolvm_async.guests.profile import GuestProfile
from smolvm_async.guests.published import PUBLISHED
from smolvm_async.guests.windows import WINDOWS

__all__ = ["BUILT_IN", "GUESTS", "PUBLISHED", "GuestProfile"]

GUESTS = {profile.name: profile for profile in (WINDOWS, LINUX)}
BUILT_IN = {DEBIAN.name: DEBIAN}  # those of which this library builds an image

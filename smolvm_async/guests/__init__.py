"""The guest operating systems, one file for each."""

from __future__ import annotations

from smolvm_async.guests.profile import GuestProfile
from smolvm_async.guests.windows import WINDOWS

__all__ = ["GUESTS", "GuestProfile"]

GUESTS = {profile.name: profile for profile in (WINDOWS,)}

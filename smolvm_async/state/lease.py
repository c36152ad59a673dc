"""The lock on a VM's directory, for as long as somebody holds it."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator

_held: weakref.WeakSet[Lease] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child has the lock too, and must not keep it when the owner dies."""
    for lease in list(_held):
        lease.close()


os.register_at_fork(after_in_child=_close_in_child)


class Lease:
    """A locked directory, and one descriptor more, for clearing up when there is no other.

    Attributes:
        fd: The open directory, whose closing gives the lock back; -1 afterwards.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._spare = -1
        self._reserve()
        _held.add(self)

    @contextlib.contextmanager
    def spare_descriptor(self) -> Iterator[None]:
        """Give up the spare one: what clears up must not fail for the lack of a descriptor."""
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            yield
        finally:
            if self.fd >= 0:
                self._reserve()

    def close(self) -> None:
        """Give the lock back; a second call does nothing."""
        _held.discard(self)
        descriptors, self.fd, self._spare = (self.fd, self._spare), -1, -1
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)

    def _reserve(self) -> None:
        with contextlib.suppress(OSError):
            self._spare = os.dup(self.fd)

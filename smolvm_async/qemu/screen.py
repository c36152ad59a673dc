"""The guest's screen, as QEMU draws it: into memory, so that no picture is ever on a disk."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from functools import partial

from smolvm_async.config.checks import check_display
from smolvm_async.errors import HostError, VMNotRunningError
from smolvm_async.foundation.rpc import rpc
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.qemu.arguments import DISPLAY, SCREEN
from smolvm_async.qemu.monitor import CommandQueue, Monitor

PIXEL = 4  # bytes, at most, in a picture


class Screen:
    """A memfd that QEMU inherits for writing, and this process reads."""

    def __init__(self, monitor: Monitor, resolution: tuple[int, int]) -> None:
        self._monitor = monitor
        self._size = math.prod(resolution) * PIXEL
        self._commands = CommandQueue(monitor)
        self._files = ExitStack()
        self._read = self._write = -1

    def open(self) -> int:
        """Make the memfd and return QEMU's descriptor, which `close()` closes."""
        self._read = os.memfd_create("screen")
        self._files.callback(os.close, self._read)
        # QEMU wants a descriptor that can only be written to. Both share the position.
        self._write = os.open(f"/proc/self/fd/{self._read}", os.O_WRONLY | os.O_CLOEXEC)
        self._files.callback(os.close, self._write)
        return self._write

    def close(self) -> None:
        """Close both descriptors."""
        self._files.close()
        self._read = self._write = -1

    @rpc
    async def dump(self, image_format: str, device: str | None, head: int) -> bytes:
        """Return a picture, `png` or `ppm`, after the pictures that were asked for before.

        Raises:
            ConfigError: If no display can have this name or head.
            HostError: If there is no memory for the picture.
            MonitorError, VMNotRunningError: See `Monitor.execute()`.
        """
        # Half a surrogate pair in the name would make QEMU's parser end the session.
        check_display(device, head)
        return await self._commands.take(partial(self._dump, image_format, device or DISPLAY, head))

    async def _dump(self, image_format: str, device: str, head: int) -> bytes:
        if self._write < 0:
            raise VMNotRunningError("QEMU has ended, and its screen with it")
        where = {"filename": SCREEN, "device": device, "head": head}
        try:
            await in_thread(self._reserve)
            await self._monitor.complete("screendump", {**where, "format": image_format})
            return await in_thread(self._take)
        finally:
            os.ftruncate(self._write, 0)

    def _reserve(self) -> None:
        """Allocate the memory now: if it were missing, libpng would abort QEMU."""
        try:
            os.posix_fallocate(self._write, 0, self._size)
        except OSError as error:
            raise HostError(
                f"There is no memory for a picture of the screen: {error.strerror}.",
                hint="Free memory of the host.",
                missing=("memory",),
            ) from error
        os.lseek(self._write, 0, os.SEEK_SET)

    def _take(self) -> bytes:
        return os.pread(self._read, os.lseek(self._write, 0, os.SEEK_CUR), 0)

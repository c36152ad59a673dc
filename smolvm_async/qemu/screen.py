"""Screenshots of the guest. QEMU writes them into memory, so no picture reaches a disk."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from functools import partial

from smolvm_async.config.checks import check_display
from smolvm_async.errors import HostError, VMNotRunningError
from smolvm_async.foundation.entries import memory_file
from smolvm_async.foundation.fork import end_in_child, private
from smolvm_async.foundation.rpc import rpc
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.qemu.arguments import DISPLAY, SCREEN
from smolvm_async.qemu.monitor import CommandQueue, Monitor

PIXEL = 4  # bytes that a pixel of a picture takes, at most


class Screen:
    """The memfd for screenshots: QEMU writes to it, this process reads."""

    def __init__(self, monitor: Monitor, resolution: tuple[int, int]) -> None:
        self._monitor = monitor
        self._size = math.prod(resolution) * PIXEL
        self._commands = CommandQueue(monitor)
        self._files = ExitStack()
        self._read = self._write = -1

    def open(self) -> int:
        """Make the memfd and return QEMU's descriptor. `close()` closes the descriptor."""
        self._read = memory_file("screen")
        self._files.callback(os.close, self._read)
        # QEMU requires a write-only descriptor. QEMU's copy and ours share the file position.
        write = os.open(f"/proc/self/fd/{self._read}", os.O_WRONLY | os.O_CLOEXEC)
        self._write = private(write)
        self._files.callback(os.close, self._write)
        return self._write

    def close(self) -> None:
        """Close both descriptors."""
        self._files.close()
        self._read = self._write = -1

    @rpc
    async def dump(self, image_format: str, device: str | None, head: int) -> bytes:
        """Take a screenshot after all earlier requests, and return it as `png` or `ppm`.

        Raises:
            ConfigError: If a display cannot have this name or this head.
            HostError: If the host has no memory for the picture.
            MonitorError, VMNotRunningError: See `Monitor.execute()`.
        """
        # QEMU's parser would end the session if the name had half a surrogate pair.
        check_display(device, head)
        return await self._commands.take(partial(self._dump, image_format, device or DISPLAY, head))

    async def _dump(self, image_format: str, device: str, head: int) -> bytes:
        if self._write < 0:
            raise VMNotRunningError("QEMU has ended, so it cannot take a screenshot")
        where = {"filename": SCREEN, "device": device, "head": head}
        try:
            await in_thread(self._reserve)
            await self._monitor.complete("screendump", {**where, "format": image_format})
            return await in_thread(self._take)
        finally:
            end_in_child()
            os.ftruncate(self._write, 0)

    def _reserve(self) -> None:
        """Allocate the memory first: if QEMU ran out of memory, libpng would abort QEMU."""
        try:
            os.posix_fallocate(self._write, 0, self._size)
        except OSError as error:
            raise HostError(
                f"The host has no memory for a screenshot: {error.strerror}.",
                hint="Free memory on the host.",
                missing=("memory",),
            ) from error
        os.lseek(self._write, 0, os.SEEK_SET)

    def _take(self) -> bytes:
        return os.pread(self._read, os.lseek(self._write, 0, os.SEEK_CUR), 0)

"""The bytes that a guest receives and sends over its network.

QEMU's user network counts nothing. But QEMU's `filter-dump` writes a record of each frame to a file
in memory, and this process adds the lengths up. A record takes QEMU 1 µs. Under TCG, a
download at full speed so takes 10 to 20 % more processor time, and nothing is recorded before the
first `count()`.

A guest may send very many frames, so each file has a limit, which the kernel enforces even if this
process hangs (`F_SEAL_GROW`): there, QEMU stops recording. In time, this process replaces a file by
a new one. It does not count the few frames between the two.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from array import array
from contextlib import suppress

from smolvm_async.errors import SmolVMError
from smolvm_async.foundation.entries import memory_file
from smolvm_async.foundation.tasks import in_thread
from smolvm_async.qemu.arguments import NETWORK
from smolvm_async.qemu.monitor import CommandQueue, Monitor

LIMIT = 16 << 20  # bytes of a file: 839,000 frames
INTERVAL = 1.0  # seconds between two looks at the files; QEMU needs longer to fill one

# A pcap file: a header, and for each frame a time, the captured and the real length, and the
# captured bytes. With four of them, nearly all records have the same size, a number of words.
FILE_HEADER, CAPTURED = 24, 4
RECORD = struct.Struct("=IIII")
WORDS = (RECORD.size + CAPTURED) // 4
CHUNK = WORDS * 4 * 4096  # bytes; adding a chunk up takes 0.1 ms


class Traffic:
    """The traffic of one running VM, which is counted from the first `count()` on."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._commands = CommandQueue(monitor)
        self._received, self._sent = _Counter("tx"), _Counter("rx")  # as the network sees the guest
        self._began = asyncio.Event()

    async def count(self) -> tuple[int | None, int | None]:
        """Return the bytes that the guest has received and sent since the first call.

        The first call begins to count, and returns `None` twice.

        Raises:
            MonitorError, VMNotRunningError: See `Monitor.execute()`.
            OSError: This process lacks descriptors.
        """
        return await self._commands.take(self._count)

    async def watch(self) -> None:
        """Replace the files in time, until cancelled."""
        await self._began.wait()
        while True:
            await asyncio.sleep(INTERVAL)
            with suppress(SmolVMError, OSError):
                await self.count()

    def close(self) -> None:
        """Close the files."""
        self._received.close()
        self._sent.close()

    async def _count(self) -> tuple[int | None, int | None]:
        for counter in (self._received, self._sent):
            await in_thread(counter.read)
            if counter.position > LIMIT // 2:
                await self._monitor.complete("object-del", {"id": counter.name})
                await in_thread(counter.read)
                counter.close()
            if counter.file is None:
                try:
                    await self._monitor.complete("object-add", counter.open())
                    counter.limit()
                except BaseException:
                    counter.close()
                    raise
        if not self._began.is_set():
            self._began.set()
            return None, None
        return self._received.total, self._sent.total


class _Counter:
    """The records of one direction.

    Attributes:
        name: The id of QEMU's filter.
        file: The file's descriptor; `None` while nothing is recorded.
        position: The end of the records that are counted.
        total: The bytes of all frames so far.
    """

    def __init__(self, queue: str) -> None:
        self.name = f"traffic-{queue}"
        self.file: int | None = None
        self.position = FILE_HEADER
        self.total = 0
        self._queue = queue

    def open(self) -> dict[str, object]:
        """Make the file; return the arguments of `object-add` for QEMU's filter."""
        self.file, self.position = memory_file(self.name, os.MFD_ALLOW_SEALING), FILE_HEADER
        return {
            "qom-type": "filter-dump",
            "id": self.name,
            "netdev": NETWORK,
            "queue": self._queue,
            "file": f"/proc/{os.getpid()}/fd/{self.file}",
            "maxlen": CAPTURED,
        }

    def limit(self) -> None:
        """Limit the file, which QEMU has opened, and so emptied; zeros follow the records."""
        assert self.file is not None
        os.ftruncate(self.file, LIMIT)
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def read(self) -> None:
        """Add the records up that QEMU has written since the last call."""
        while self.file is not None:
            data = os.pread(self.file, CHUNK, self.position)
            if not (read := self._add_alike(data) or self._add_each(data)):
                return
            self.position += read

    def _add_alike(self, data: bytes) -> int:
        """Add the records of the usual size up; return their size, 0 if there is another record."""
        words = array("I", data[: len(data) // 4 * 4])
        captured = words[2::WORDS]
        count = captured.count(CAPTURED)
        if captured[:count].count(CAPTURED) < count or any(words[count * WORDS :]):
            return 0
        self.total += sum(words[3 : count * WORDS : WORDS])
        return count * WORDS * 4

    def _add_each(self, data: bytes) -> int:
        """Add records of any size up; return their size. Only a guest's own frames are so short."""
        position = 0
        while position + RECORD.size <= len(data):
            seconds, _, captured, length = RECORD.unpack_from(data, position)
            if not seconds:
                break
            self.total += length
            position += RECORD.size + captured
        return position

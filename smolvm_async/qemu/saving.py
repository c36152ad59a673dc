"""Save a running machine into files, and load a saved machine.

A snapshot must not stop the guest for as long as it takes to write its memory. So QEMU *migrates*
the running machine, memory first, to a second QEMU that is called the **twin**:

1. The twin is the same machine, but its RAM is a shared mapping of the file `ram`, and its
   processors never run. It waits for a migration (`-incoming defer`).
2. Under KVM, the source sends its memory to the twin while its guest runs, then the pages that the
   guest has changed meanwhile, and so on. When few pages are left, it stops the guest and waits
   (`pre-switchover`), some milliseconds before the end. The caller uses this moment, in which
   nothing changes, to freeze the disk (`freeze`). Under TCG, the guest stands still all the time:
   QEMU 7.2 misses some of the pages that a TCG guest writes meanwhile, and of 12 clones one
   or two then panicked.
3. The source sends the rest, and the state of its devices and its TPM. Then the guest runs again.
4. The twin saves itself into the file `machine`, without its RAM, which is in `ram` already
   (`x-ignore-shared`), and ends.

Under TCG, the RAM of a VM that boots is a shared file in memory (`memfd`). Such a VM needs no twin:
it saves itself as in step 4, and the caller copies the file while the guest stands still. Under KVM
a VM has ordinary memory, for which the kernel uses huge pages.

A clone maps `ram` privately, and loads `machine`: it reads from the file what it uses, and writes
to pages of its own. So a load takes as long for 64 GiB as for 512 MiB.

QEMU's documentation of all this is docs/devel/migration.rst and qapi/migration.json. Three facts
explain the rest of the code:

- The source's block nodes are inactive after a migration, until `cont` activates them. So a paused
  VM stays in QEMU's state `postmigrate`, and must run for an instant before it is saved again.
- QEMU keeps `migrate fd:` in its process and may spawn nothing (`-sandbox spawn=deny` forbids
  `exec:`); `file:` needs QEMU 8.2.
- While a machine loads, `cont` only notes that its guest may run; a guest that stood still when it
  was saved then stands still.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from smolvm_async.errors import MonitorError, SmolVMError
from smolvm_async.foundation.fork import close_private, private
from smolvm_async.foundation.tasks import end_tasks, in_background, settle
from smolvm_async.qemu.arguments import MachineSpec
from smolvm_async.qemu.console import Console
from smolvm_async.qemu.launch import SAME_END, Processes, launch
from smolvm_async.qemu.monitor import Monitor
from smolvm_async.qemu.parked import make_parked
from smolvm_async.qemu.screen import Screen

CHANNEL = "snapshot"  # the name of a descriptor in QEMU
PASSES = 4  # times that QEMU sends what has changed before the guest is stopped in any case
DOWNTIME = 50  # ms that the guest may stand still by QEMU's estimate before its end
UNLIMITED = 1 << 40  # bytes per second
LOOK = 0.002  # seconds between two looks at a migration; a look takes 0.2 ms
PIPE, CHUNK = 1 << 20, 1 << 16  # bytes; a user may have no larger pipe
PATIENCE = 60.0  # seconds for each step, except sending the memory while the guest runs


class Twin:
    """The QEMU that receives a machine and saves it; see the module's docstring.

    Use it in an `async with` block, whose end kills the processes.

    Args:
        spec: The machine, with `ram` and `incoming`.
        directory: The working directory, with the files that the spec names.
        timeout: Seconds for QEMU's first answer.
    """

    def __init__(self, spec: MachineSpec, directory: Path, timeout: float) -> None:
        self._spec = spec
        self._directory = directory
        self._timeout = timeout
        self._processes = Processes()
        self._monitor = Monitor(lambda _: None)
        self._console = Console()
        self._screen = Screen(self._monitor, spec.config.resolution)
        self._parked = make_parked(spec.config.profile)

    async def __aenter__(self) -> Twin:
        try:
            await launch(
                self._processes,
                self._spec,
                self._directory,
                self._monitor,
                self._console,
                self._screen,
                self._parked,
                timeout=self._timeout,
            )
        except BaseException as error:
            await settle(self._end())
            if isinstance(error, SmolVMError):
                raise await self._processes.explain(error, self._directory, None) from error
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        qemu = self._processes.qemu
        try:
            if isinstance(error, SmolVMError):
                await asyncio.wait([qemu.exited], timeout=SAME_END)
            died = qemu.ended
        finally:
            await settle(self._end())
        if died and isinstance(error, SmolVMError):  # the log of the twin has the reason
            message = f"the QEMU that saves the machine ended: {qemu.report()}"
            raise MonitorError(message, command="migrate") from error

    async def _end(self) -> None:
        try:
            await self._processes.__aexit__()
        finally:
            await self._monitor.disconnect()
            self._console.close()
            self._screen.close()
            if self._parked is not None:
                self._parked.close()

    async def receive(self) -> socket.socket:
        """Begin to receive a machine, and return the sender's end of the connection."""
        senders, ours = socket.socketpair()
        try:
            private(senders.fileno())
            with ours:
                await self._monitor.send_descriptor(CHANNEL, ours.fileno())
            await self._monitor.execute("migrate-incoming", {"uri": f"fd:{CHANNEL}"})
        except BaseException:
            senders.close()
            raise
        return senders

    async def save(self, file: int) -> None:
        """Wait until the machine has arrived, and save it, except its RAM, into an open file."""
        await _reach(self._monitor, "completed")
        await self._monitor.execute(
            "migrate-set-capabilities", _capabilities(**{"x-ignore-shared": True})
        )
        await self._monitor.send_descriptor(CHANNEL, file)
        await self._monitor.execute("migrate", {"uri": f"fd:{CHANNEL}"})
        await _reach(self._monitor, "completed")
        with suppress(SmolVMError):
            await self._monitor.execute("quit")  # QEMU has closed the file when it has ended
        await asyncio.wait([self._processes.qemu.exited], timeout=PATIENCE)


async def send(
    monitor: Monitor,
    channel: int,
    freeze: Callable[[], Awaitable[None]],
    *,
    live: bool,
    shared: bool,
) -> float:
    """Save a running or paused machine; the guest goes on as it was.

    Args:
        channel: The descriptor of the connection to a twin, or of a file.
        freeze: Called while the guest stands still.
        live: Whether the guest runs while QEMU sends its memory.
        shared: Whether the RAM is a shared file, which `freeze` copies; QEMU then leaves it out.

    Returns:
        The seconds that the guest stood still.

    Raises:
        MonitorError: QEMU refused a step, or was too slow.
        VMNotRunningError: QEMU has ended.
    """
    running = bool((await monitor.execute("query-status"))["running"])
    if not running:
        await activate(monitor)
    # A clone has been loaded with x-ignore-shared, but the twin receives all memory.
    wanted = {"pause-before-switchover": True, "x-ignore-shared": shared}
    await monitor.execute("migrate-set-capabilities", _capabilities(**wanted))
    limits = {"max-bandwidth": UNLIMITED, "downtime-limit": DOWNTIME}
    await monitor.execute("migrate-set-parameters", limits)
    await monitor.send_descriptor(CHANNEL, channel)
    stopped = time.monotonic()
    try:
        if running and not live:
            await monitor.execute("stop")
        await monitor.execute("migrate", {"uri": f"fd:{CHANNEL}"})
        if running and live:
            stopped = await _until_stopped(monitor)
        else:
            await _reach(monitor, "pre-switchover")
        await settle(_switch_over(monitor, freeze))
    finally:
        await settle(_go_on(monitor, running))
    return time.monotonic() - stopped


async def _switch_over(monitor: Monitor, freeze: Callable[[], Awaitable[None]]) -> None:
    await freeze()
    await monitor.execute("migrate-continue", {"state": "pre-switchover"})
    await _reach(monitor, "completed")


async def _until_stopped(monitor: Monitor) -> float:
    """Wait until QEMU has sent nearly all memory, and return the time when the guest stopped."""
    while True:
        answer = await _look(monitor)
        if answer["status"] == "pre-switchover":
            return time.monotonic()
        if answer.get("ram", {}).get("dirty-sync-count", 0) > PASSES:
            # The guest changes its memory faster than QEMU sends it.
            await monitor.execute("stop")
            stopped = time.monotonic()
            await _reach(monitor, "pre-switchover")
            return stopped
        await asyncio.sleep(LOOK)


async def _go_on(monitor: Monitor, running: bool) -> None:
    with suppress(SmolVMError):  # QEMU has ended
        status = (await monitor.execute("query-migrate")).get("status")
        if status not in (None, "completed", "failed", "cancelled"):
            await monitor.execute("migrate_cancel")
            while await _lasts(monitor, "query-migrate", "cancelling"):
                # A QEMU that is cancelled just before `pre-switchover` waits there for ever.
                with suppress(MonitorError):  # it does not wait
                    await monitor.execute("migrate-continue", {"state": "cancelling"})
        if running:
            while await _lasts(monitor, "query-status", "finish-migrate"):
                pass  # QEMU refuses `cont` for a moment after a migration
            await monitor.execute("cont")


async def _lasts(monitor: Monitor, query: str, status: str) -> bool:
    """Return whether a query still answers with this status, after a moment."""
    if (await monitor.execute(query)).get("status") != status:
        return False
    await asyncio.sleep(LOOK)
    return True


async def activate(monitor: Monitor) -> None:
    """Activate the block nodes of a paused machine that was saved before."""
    if (await monitor.execute("query-status"))["status"] == "postmigrate":
        await asyncio.gather(monitor.execute("cont"), monitor.execute("stop"))


class SavedState:
    """The file `machine`, on its way to QEMU.

    From QEMU 9.1 on, `fd:` with a file is deprecated, and `file:` needs QEMU 8.2. So QEMU gets a
    pipe, which takes the whole of most machines before QEMU starts. QEMU does nothing else while it
    can read, so it has loaded the machine when it comes to a `cont` that follows the last byte.

    Args:
        file: The open file; `close()` does not close it.
    """

    def __init__(self, file: int) -> None:
        self._file, self._offset = file, 0
        self._ends = [private(end) for end in os.pipe()]  # QEMU's, and ours
        with suppress(OSError):  # this user has too many large pipes: a small one is slower
            fcntl.fcntl(self._ends[1], fcntl.F_SETPIPE_SZ, PIPE)
        os.set_blocking(self._ends[1], False)
        self._whole = self._write(0)

    async def load(self, monitor: Monitor, resumed: asyncio.Future[None]) -> None:
        """Load the machine, and let its guest run. QEMU ends if it cannot load the machine.

        Args:
            resumed: Done when the guest runs.
        """
        loading = monitor.start_task(self._load(monitor))
        try:
            # QEMU may answer the last command some milliseconds after the guest runs.
            await asyncio.wait({loading, resumed}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await end_tasks(loading)
            raise
        if loading.done():
            loading.result()
        while not resumed.done() and await _lasts(monitor, "query-status", "inmigrate"):
            pass
        if not resumed.done():  # QEMU was still loading when it came to `cont`
            await monitor.execute("cont")

    async def _load(self, monitor: Monitor) -> None:
        """Make QEMU load the machine, and let its guest run."""
        writing = None if self._whole else asyncio.ensure_future(in_background(self._write))
        try:
            await asyncio.gather(  # QEMU has the next command before it has answered the last one
                monitor.execute(
                    "migrate-set-capabilities", _capabilities(**{"x-ignore-shared": True})
                ),
                monitor.send_descriptor(CHANNEL, self._ends[0]),
                monitor.execute("migrate-incoming", {"uri": f"fd:{CHANNEL}"}),
                _let_run(monitor, writing),
            )
        finally:
            if self._ends:  # the guest does not run yet; `_write` has to notice that QEMU has ended
                close_private(self._ends.pop(0))
            if writing is not None:
                await settle(writing)
            self.close()

    def close(self) -> None:
        """Close the pipe."""
        while self._ends:
            close_private(self._ends.pop())

    def _write(self, patience: float = PATIENCE) -> bool:
        """Write until the pipe takes no more for so many seconds; return whether all is written."""
        free = select.poll()
        free.register(self._ends[-1], select.POLLOUT)
        with suppress(BrokenPipeError):  # QEMU has ended, and its end tells more
            while part := os.pread(self._file, CHUNK, self._offset):
                if not free.poll(patience * 1000):
                    return False
                self._offset += os.write(self._ends[-1], part)
        return True


async def _let_run(monitor: Monitor, writing: asyncio.Future[bool] | None) -> None:
    if writing is not None:
        await asyncio.wait([writing])
    await monitor.execute("cont")


def open_new(path: Path, size: int = 0) -> int:
    """Create an empty file of `size` bytes, which takes no space, and return its descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = private(os.open(path, flags, 0o600))
    os.fchmod(fd, 0o600)  # whatever the umask is
    os.ftruncate(fd, size)
    return fd


def _capabilities(**states: bool) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": on} for name, on in states.items()]}


async def _reach(monitor: Monitor, wanted: str) -> None:
    """Wait until a migration has the status `wanted`.

    Raises:
        MonitorError: The migration failed, or takes over a minute.
    """
    deadline = time.monotonic() + PATIENCE
    while (status := (await _look(monitor))["status"]) != wanted:
        if time.monotonic() > deadline:
            message = f"QEMU could not save the machine: its status is {status}, not {wanted}"
            raise MonitorError(message, command="migrate")
        await asyncio.sleep(LOOK)


async def _look(monitor: Monitor) -> dict[str, Any]:
    answer: dict[str, Any] = await monitor.execute("query-migrate")
    if answer.setdefault("status", "none") in ("failed", "cancelled"):
        reason = answer.get("error-desc", answer["status"])
        raise MonitorError(f"QEMU could not save the machine: {reason}", command="migrate")
    return answer

"""A VM that another process owns (or another part of this one), over its control socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.ssh.access import Access
from smolvm_async.controls.ssh.link import Link
from smolvm_async.errors import VMCrashedError, VMNotRunningError
from smolvm_async.foundation.tail import Tail
from smolvm_async.qemu.boot import BootStates
from smolvm_async.qemu.console import LIMIT
from smolvm_async.qemu.events import BootStateChanged, EventHub, Reset, event_from_json
from smolvm_async.qemu.shutdown import Rung, ShutdownReport
from smolvm_async.state.record import Record, Status
from smolvm_async.vm.attach.messages import (
    MAX_MESSAGE,
    address,
    decode,
    encode,
    error_from_json,
    report_from_json,
)
from smolvm_async.vm.attach.remote import RemoteInput, RemotePorts, RemoteScreen, RemoteVNC

GREETING = 5.0  # seconds for the owner's event loop to answer
REMOVED = 30.0  # seconds for the owner to remove the directory
POLL = 0.01  # seconds between two looks whether it is removed


# asyncio itself refers to its tasks weakly, and events() may be all that a user holds.
_readings: set[asyncio.Task[None]] = set()


class AttachedVM:
    """A VM seen from another process: what its owner tells of it, and what one asks of that.

    Attributes: see `smolvm_async.controls.interface.VM` and `Run`; it is both.
    """

    def __init__(self, path: Path, record: Record) -> None:
        self.config: VMConfig = record.config
        self.hub = EventHub()
        self.on_crash: Callable[[], None] = lambda: None
        self.boot = BootStates(self.hub, BootStateChanged(BootStateChanged.NAME, time.time()))
        self.console = Tail(LIMIT)
        self.failure: Exception | None = None
        self.report = ShutdownReport(Rung.NONE)
        self.screen = RemoteScreen(self._request)
        self.input = RemoteInput(self._request, self._post)
        self.vnc = RemoteVNC(self._request)
        self.ports = RemotePorts(self._request)
        self.link = Link(self.config.vm_id, self.ssh_access)
        self.status = record.status
        self.accelerator = ""
        self._path = path
        self._owner = record.owner.pid if record.owner else 0
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._told_end = False
        self._detached = False
        self._writer: asyncio.StreamWriter
        self._reading: asyncio.Task[None]

    @classmethod
    async def connect(cls, path: Path, dir_fd: int, record: Record) -> Self:
        """Connect to the owner of the VM in the open directory `dir_fd`, which is at `path`.

        Raises:
            OSError: If nobody listens (any more), or answers within 5 s.
        """
        vm = cls(path, record)
        reader, vm._writer = await asyncio.open_unix_connection(address(dir_fd), limit=MAX_MESSAGE)
        try:
            async with asyncio.timeout(GREETING):
                method = ""
                while method != "status":  # the last of what has happened so far
                    line = await reader.readline()
                    if not line:
                        raise ConnectionResetError("the owner has closed the control socket")
                    message = decode(line)
                    vm._handle(message)
                    method = message["method"]
        except BaseException:
            vm._writer.transport.abort()
            raise
        vm._reading = asyncio.ensure_future(vm._read(reader))
        _readings.add(vm._reading)
        vm._reading.add_done_callback(_readings.discard)
        return vm

    @property
    def run(self) -> AttachedVM:
        """The owner's run."""
        return self

    @property
    def over(self) -> asyncio.Future[None]:
        """Done when the run is over, or when we have detached."""
        return self._reading

    async def start(self) -> None:
        """Nothing, if it runs; otherwise its owner is asked to."""
        await self._request("start")

    async def stop(self, timeout: float | None) -> ShutdownReport:
        """Ask the owner to stop it; cancelled, one only waits no longer."""
        try:
            return report_from_json(await self._request("stop", timeout=timeout))
        except VMNotRunningError:
            if self._told_end:
                return self.report
            raise

    async def pause(self) -> None:
        """Ask the owner to."""
        await self._request("pause")

    async def resume(self) -> None:
        """Ask the owner to."""
        await self._request("resume")

    async def ssh_access(self) -> Access:
        """Ask the owner how to log in to the guest."""
        return Access(*await self._request("ssh.access"))

    async def delete(self) -> None:
        """Ask the owner to delete it, and wait until its directory is gone.

        Raises:
            VMNotRunningError: If the owner has gone meanwhile, or does not do it.
        """
        try:
            await self._request("delete")
        except VMNotRunningError:
            if not self._told_end:
                raise
        deadline = time.monotonic() + REMOVED
        while self._path.exists():
            if time.monotonic() > deadline:
                raise VMNotRunningError(f"its owner, process {self._owner}, did not delete it.")
            await asyncio.sleep(POLL)
        self.status = Status.DELETED

    async def leave(self, *, graceful: bool) -> None:
        """Detach: the VM is its owner's."""
        await self.detach()

    async def detach(self) -> None:
        """Close the connection; the VM goes on."""
        self._reading.cancel()
        await asyncio.wait([self._reading])

    async def _request(self, method: str, **params: object) -> Any:
        if self._reading.done():
            raise self._gone()
        answer = asyncio.get_running_loop().create_future()
        number = self._post(method, **params)
        self._answers[number] = answer
        try:
            return await answer
        finally:
            del self._answers[number]

    def _post(self, method: str, **params: object) -> int:
        """Send a request whose answer, if nobody waits for it, is not looked at."""
        number = next(self._ids)
        if not self._writer.is_closing():
            self._writer.write(encode({"id": number, "method": method, "params": params}))
        return number

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            with contextlib.suppress(OSError, EOFError, ValueError, KeyError, TypeError):
                while line := await reader.readline():
                    message = decode(line)
                    if "bytes" in message:
                        message["result"] = await reader.readexactly(message["bytes"])
                    self._handle(message)
        except asyncio.CancelledError:
            self._detached = True
            raise
        finally:
            self._end()

    def _handle(self, message: Mapping[str, Any]) -> None:
        if "method" in message:
            # Interned, or Python's cache of methods would keep each of these strings for a while.
            name = sys.intern(f"_on_{message['method']}")
            getattr(self, name, lambda _: None)(message["params"])
        else:
            answer = self._answers.get(message["id"])
            if answer is not None and not answer.done():
                if "error" in message:
                    answer.set_exception(error_from_json(message["error"]))
                else:
                    answer.set_result(message["result"])

    def _on_hello(self, params: Mapping[str, Any]) -> None:
        self.accelerator = params["accelerator"]
        boot = event_from_json(params["boot"])
        assert isinstance(boot, BootStateChanged)
        self.boot.last = boot

    def _on_event(self, params: Mapping[str, Any]) -> None:
        event = event_from_json(params)
        if isinstance(event, BootStateChanged):
            self.boot.change(event)
        else:
            self.hub.publish(event)
        if isinstance(event, Reset):
            self.link.abort()

    def _on_status(self, params: Mapping[str, Any]) -> None:
        self.status = Status(params["status"])

    def _on_console(self, params: Mapping[str, Any]) -> None:
        self.console.feed(params["text"].encode("latin-1"))

    def _on_ended(self, params: Mapping[str, Any]) -> None:
        self._told_end = True
        self.status = Status.CRASHED if params["failure"] else Status.STOPPED
        self.report = report_from_json(params["report"])
        if params["failure"] is not None:
            self.failure = error_from_json(params["failure"])

    def _end(self) -> None:
        """The connection is over: by the end of the run, of the owner, or by our own doing."""
        self._writer.transport.abort()
        self.link.close()
        if not self._told_end and not self._detached:
            self.status = Status.ORPHANED
            self.failure = VMCrashedError(
                f"{self.config.vm_id} crashed: its owner, process {self._owner}, has gone."
            )
        if self._detached:
            self.failure = self._gone()
        self.boot.end()
        self.hub.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._gone())
        if self.failure is not None and not self._detached:
            self.on_crash()

    def _gone(self) -> VMNotRunningError:
        what = "we have detached from it" if self._detached else "its owner has ended it"
        return VMNotRunningError(f"{self.config.vm_id} cannot be asked any more: {what}.")

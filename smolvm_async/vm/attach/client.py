"""The client's side of a control socket: a VM that another process owns.

`connect()` reads messages until it knows the VM's state. Then a task reads all further messages
until the connection ends. The task feeds events, console output and boot states into the same
objects that an owner has, and passes each answer to the call that waits for the answer. Each call
is a request with a unique number, so calls may overlap. A posted request has no number and gets no
answer. The connection ends in one of three ways, which also end all waiting calls:

- The owner sends `ended`: the VM has stopped or crashed, and the message describes the end.
- The connection breaks without `ended`: the owner has died, and so has QEMU. The VM is an orphan
  for `prune()` to remove, and an `async with` block around the VM raises `VMCrashedError`.
- This process detaches, or its event loop ends: the VM keeps running. The owner releases the keys
  and buttons that this process holds down.

If a call is cancelled, the owner still completes the request. This process ignores the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter

from smolvm_async.config.internet import InternetSettings
from smolvm_async.config.vm_config import VMConfig
from smolvm_async.controls.agent.session import Session
from smolvm_async.controls.clock import PROBLEM
from smolvm_async.controls.interface import TELLS, VM, Run, check_run, last_use
from smolvm_async.controls.ssh.link import Link
from smolvm_async.errors import SmolVMError, VMCrashedError, VMExpiredError, VMNotRunningError
from smolvm_async.foundation.fork import private
from smolvm_async.foundation.locking import poll, turn_at
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tail import Tail
from smolvm_async.foundation.tasks import end_tasks
from smolvm_async.qemu.boot import BootStates
from smolvm_async.qemu.console import LIMIT
from smolvm_async.qemu.events import BootStateChanged, EventHub, Reset, event_from_json
from smolvm_async.qemu.pauses import Pauses
from smolvm_async.qemu.shutdown import Rung, ShutdownReport
from smolvm_async.qemu.troubles import Troubles
from smolvm_async.state.logs import log_end
from smolvm_async.state.names import SSH_KEY
from smolvm_async.state.record import Record
from smolvm_async.state.status import Status
from smolvm_async.vm.attach.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    address,
    decode,
    encode,
    error_from_json,
    version,
)
from smolvm_async.vm.attach.proxy import make_peripherals, make_proxy

GREETING = 5.0  # seconds for the owner's event loop to answer
REMOVED = 30.0  # seconds for the owner to remove the directory

logger = get_logger(__name__)

# asyncio has only weak references to tasks, and a user may have only the stream of events().
_readings: set[asyncio.Task[None]] = set()


class AttachedVM:
    """A VM of another process: both the `VM` and the `Run` of `controls/interface.py`."""

    def __init__(self, path: Path, record: Record) -> None:
        self.config: VMConfig = record.config
        self.hub = EventHub()
        self.on_crash: Callable[[], None] = lambda: None
        self.boot = BootStates(self.hub, BootStateChanged(BootStateChanged.NAME, time.time()))
        self.console = Tail(LIMIT)
        self.failure: Exception | None = None
        self.report = ShutdownReport(Rung.NONE)
        self.peripherals = make_peripherals(self._request, self._post)
        owner = make_proxy(VM, "", self._request, self._post)  # type: ignore[type-abstract]
        run = make_proxy(Run, "", self._request, self._post)  # type: ignore[type-abstract]
        self.start, self.pause, self._resume = owner.start, owner.pause, owner.resume
        self.snapshot, self.wake = owner.snapshot, owner.wake
        self.set_internet_settings = owner.set_internet_settings
        self.ssh_access, self.stats = run.ssh_access, run.stats
        self._stop, self._delete = owner.stop, owner.delete
        self.troubles = Troubles(self.config, lambda: log_end(path, "qemu"))
        self.pauses = Pauses()
        turn = partial(turn_at, path / SSH_KEY)
        explain = self.troubles.explain
        final = self.config.profile.login == "image"
        self.link = Link(
            self.config.vm_id, self.ssh_access, self.pauses, explain, turn, final=final
        )
        self.link.serving = True  # nobody uses the link before the guest is ready
        self.session = Session(self.peripherals.agent, self.pauses, self.troubles.explain)
        self.status = record.status
        self.accelerator = ""
        self._path = path
        self._owner_pid = record.owner.pid if record.owner else 0
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
            OSError: No process listens (any more), or the owner does not answer within 5 s.
            VMNotRunningError: The owner runs another version of smolvm_async.
        """
        vm = cls(path, record)
        reader, vm._writer = await asyncio.open_unix_connection(address(dir_fd), limit=MAX_MESSAGE)
        private(vm._writer.get_extra_info("socket").fileno())
        try:
            async with asyncio.timeout(GREETING):
                method = ""
                while method != "status":  # which completes the VM's state
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
        """The owner's current run."""
        return self

    @property
    def over(self) -> asyncio.Future[None]:
        """Done when the run is over, or this process has detached."""
        return self._reading

    async def resume(self) -> str:
        """Ask the owner to resume the VM. Return the reason if the clock could not be set."""
        if problem := await self._resume():
            logger.warning(PROBLEM, problem)
        return str(problem)

    async def stop(self, timeout: float | None) -> ShutdownReport:
        """Ask the owner to stop the VM. A cancelled call stops waiting; the VM still stops."""
        try:
            return await self._stop(timeout)
        except VMNotRunningError:
            if self._told_end:
                return self.report
            raise

    async def delete(self) -> None:
        """Ask the owner to delete the VM, and wait until the VM's directory is removed."""
        try:
            await self._delete()
        except VMNotRunningError:
            if not self._told_end:
                raise
        if not await poll(lambda: not self._path.exists(), REMOVED):
            raise VMNotRunningError(
                f"{self.config.vm_id} was not deleted within {REMOVED:g} s: end its owner, "
                f"process {self._owner_pid}, then call prune()."
            )
        self.status = Status.DELETED

    async def leave(self, *, graceful: bool) -> None:
        """Detach: only the owner ends the VM."""
        await self.detach()

    async def detach(self) -> None:
        """Close the connection. The VM keeps running."""
        check_run(self._reading, self.config.vm_id)
        if not self._reading.done():
            await self.session.finish()
            await end_tasks(self._reading)
        if self._reading.cancelled() and not self._detached:  # before its first step
            self._detached = True
            self._end()

    async def _request(self, method: str, params: Mapping[str, Any]) -> Any:
        check_run(self._reading, self.config.vm_id)
        if self._reading.done():
            raise self._gone()
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"id": number, "method": method, "params": params})
            return await answer
        finally:
            del self._answers[number]

    def _post(self, method: str, params: Mapping[str, Any]) -> None:
        self._send({"method": method, "params": params})

    def _send(self, request: Mapping[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(request))

    async def _tell_use(self, timeout: float) -> None:
        """Tell the owner again and again that this process uses the guest: see `vm/idle.py`."""
        told = time.monotonic()
        while True:
            await asyncio.sleep(timeout / TELLS)
            if last_use(self) > told:
                told = time.monotonic()
                with contextlib.suppress(SmolVMError):  # the command itself fails, too
                    await self.wake()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        telling = None
        if self.config.idle_timeout is not None:
            telling = asyncio.ensure_future(self._tell_use(self.config.idle_timeout))
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
            if telling is not None:
                telling.cancel()
            self._end()
            await self.session.close()

    def _handle(self, message: Mapping[str, Any]) -> None:
        if "method" in message:
            # Intern the name: Python's method cache would keep a new string for each message.
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
        if params.get("protocol") != PROTOCOL:
            theirs = params.get("version", "an older version")
            raise VMNotRunningError(
                f"{self.config.vm_id} cannot be attached to: its owner, process {self._owner_pid}, "
                f"runs smolvm_async {theirs}, but this process runs {version()}. Use the same "
                "version in both processes, or stop the VM in its owner."
            )
        self.accelerator = params["accelerator"]
        boot = event_from_json(params["boot"])
        assert isinstance(boot, BootStateChanged)
        self.boot.last = boot
        for trouble in params.get("troubles", ()):
            self.troubles.follow(event_from_json(trouble))

    def _on_event(self, params: Mapping[str, Any]) -> None:
        event = event_from_json(params)
        if isinstance(event, BootStateChanged):
            self.boot.change(event)
        else:
            self.hub.publish(event)
            self.troubles.follow(event)
            self.session.on_event(event)
        if isinstance(event, Reset):
            self.link.abort()

    def _on_status(self, params: Mapping[str, Any]) -> None:
        self.status = Status(params["status"])
        self.pauses.set(**params["pauses"])
        if (settings := params.get("internet_settings")) is not None:
            update = {"internet_settings": InternetSettings(**settings)}
            self.config = self.config.model_copy(update=update)

    def _on_console(self, params: Mapping[str, Any]) -> None:
        self.console.feed(params["text"].encode("latin-1"))

    def _on_ended(self, params: Mapping[str, Any]) -> None:
        self._told_end = True
        self.status = Status.CRASHED if params["failure"] else Status.STOPPED
        self.report = TypeAdapter(ShutdownReport).validate_python(params["report"])
        if params["failure"] is not None:
            self.failure = error_from_json(params["failure"])
        if isinstance(self.failure, VMExpiredError):
            self.status = Status.DELETED

    def _end(self) -> None:
        """End all waiting calls, because the run, the owner or the connection has ended."""
        self._writer.transport.abort()
        self.pauses.close()
        self.link.close()
        if not self._told_end and not self._detached:
            self.status = Status.ORPHANED
            self.failure = VMCrashedError(
                f"{self.config.vm_id} crashed: its owner, process {self._owner_pid}, has died.",
                process="owner",
                console=self.console.quote(),
            )
        if self._detached:
            self.failure = self._gone()
        self.boot.end()
        self.hub.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._gone())
        if self.failure is not None and not isinstance(self.failure, VMNotRunningError):
            self.on_crash()

    def _gone(self) -> VMNotRunningError:
        if isinstance(self.failure, VMExpiredError):
            return self.failure
        reason = "the VM has ended"
        if self._detached:
            reason = "this process has detached from the VM, or the event loop has ended in which "
            reason += "it attached; attach again with from_id()"
        return VMNotRunningError(f"{self.config.vm_id} cannot be controlled: {reason}.")

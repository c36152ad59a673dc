"""The owner's side of a control socket.

The server sends `hello`, then events, console output and status changes, as fast as the client
reads. A client that reads slowly misses the oldest events and the oldest console output; the owner
never waits for a client. Meanwhile the client sends requests. The server runs a coroutine function
in a separate task, so that a slow request does not delay the next request, and then sends the
answer. It calls a plain function before it reads the next request, and sends no answer. At the end
of the run the server sends `ended` and closes the connection.

A client that dies or detaches does not cancel its requests: a `stop` still stops the VM. The server
releases the keys and buttons that this client holds down. If the owner dies, the kernel closes the
socket and kills QEMU, so a connection that ends without `ended` means a crash.

A client can call only methods that are marked with `@rpc`: the server looks up the name of each
request in a mapping of these methods. Other users cannot connect: the socket has the mode 0600.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from types import MethodType
from typing import Any

from smolvm_async.controls.interface import VM, Run
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.fork import end_in_child, private
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.rpc import arguments_from_json, rpc_methods
from smolvm_async.qemu.events import EventStream
from smolvm_async.qemu.input import InputEvent, pressed, released
from smolvm_async.vm.attach.messages import (
    MAX_MESSAGE,
    PROTOCOL,
    address,
    decode,
    encode,
    error_to_json,
    version,
)

logger = get_logger(__name__)

FLUSH = 1.0  # seconds that a client may take to read the last messages


def remote_methods(vm: VM, run: Run) -> dict[str, MethodType]:
    """Return the methods that a client can call, keyed by their names in requests."""
    objects: list[tuple[str, type, object]] = [("", VM, vm), ("", Run, run)]
    for name, peripheral in run.peripherals._asdict().items():
        objects.append((f"{name}.", type(peripheral), peripheral))
    return {
        prefix + name: getattr(target, name)
        for prefix, kind, target in objects
        for name in _names(kind)
    }


@cache  # the classes of a VM have so many members that this takes half a millisecond
def _names(kind: type) -> tuple[str, ...]:
    return tuple(rpc_methods(kind))


class ControlServer:
    """The server of one run of a VM, on the socket in the VM's directory."""

    def __init__(self, vm: VM, run: Run) -> None:
        self._vm = vm
        self._run = run
        self._methods = remote_methods(vm, run)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._requests: set[asyncio.Task[None]] = set()
        self._news: set[asyncio.Event] = set()
        self._over = False

    async def start(self, dir_fd: int) -> None:
        """Listen on the socket in an open directory; only this user can connect."""
        listener = socket.socket(socket.AF_UNIX)
        private(listener.fileno())
        try:
            os.fchmod(listener.fileno(), 0o600)  # the mode of the socket's file
            listener.bind(address(dir_fd))
            self._server = await asyncio.start_unix_server(
                self._serve, sock=listener, limit=MAX_MESSAGE
            )
        except BaseException:
            listener.close()
            raise

    def tell_status(self) -> None:
        """Send every client the VM's status if it has changed."""
        for news in self._news:
            news.set()

    async def close(self) -> None:
        """Send every client the remaining messages, and close all connections."""
        end_in_child()  # asyncio would remove the socket's file
        self._over = True
        if self._server is not None:
            self._server.close()
            self.tell_status()
            if self._connections:
                await asyncio.wait(self._connections, timeout=FLUSH)
            for task in [*self._connections]:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        private(writer.get_extra_info("socket").fileno())
        self._connections.add(task)
        reading = asyncio.ensure_future(self._read_requests(reader, writer))
        telling = asyncio.ensure_future(self._tell(writer))
        try:
            await asyncio.wait({reading, telling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections.discard(task)
            for part in (reading, telling):
                part.cancel()
            await asyncio.gather(reading, telling, return_exceptions=True)
            if self._over:
                writer.close()
            else:
                writer.transport.abort()

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        """Send events, console output and status to the client, as fast as the client reads."""
        news = asyncio.Event()
        events, console = self._vm.hub.subscribe(), self._run.console
        events.listeners.add(news)
        console.listeners.add(news)
        self._news.add(news)
        self._run.pauses.watchers.add(news.set)
        try:
            hello = {
                "protocol": PROTOCOL,
                "version": version(),
                "accelerator": self._vm.accelerator,
                "boot": asdict(self._run.boot.last),
                "troubles": [asdict(trouble) for trouble in self._run.troubles.known.values()],
            }
            self._notify(writer, "hello", hello)
            told: dict[str, Any] = {}
            read = max(0, console.count - console.limit)
            while True:
                over = self._over
                news.clear()
                read = self._send_news(writer, events, read)
                if told != (told := self._status()):
                    self._notify(writer, "status", told)
                await writer.drain()
                if over:
                    failure = self._run.failure and error_to_json(self._run.failure)
                    self._notify(writer, "ended", {"report": self._run.report, "failure": failure})
                    await writer.drain()
                    return
                await news.wait()
        finally:
            console.listeners.discard(news)
            self._run.pauses.watchers.discard(news.set)
            self._news.discard(news)

    def _status(self) -> dict[str, Any]:
        pauses = self._run.pauses
        state = {"active": pauses.active, "fault": pauses.fault, "held": pauses.held}
        settings = self._vm.config.internet_settings
        return {"status": str(self._vm.status), "pauses": state, "internet_settings": settings}

    def _send_news(self, writer: asyncio.StreamWriter, events: EventStream, read: int) -> int:
        for event in events.pending():
            self._notify(writer, "event", asdict(event))
        console = self._run.console
        if text := console.since(read):
            self._notify(writer, "console", {"text": text.decode("latin-1")})
        return console.count

    async def _read_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        held: list[InputEvent] = []  # keys and buttons that this client holds down
        try:
            while line := await reader.readline():
                request = decode(line)
                try:
                    method, arguments = self._find(request)
                except ConfigError as error:
                    self._answer(writer, request, {"error": error_to_json(error)})
                    continue
                if method.__self__ is self._run.peripherals.input:
                    held = pressed([*held, *arguments.get("events", ())])
                if not inspect.iscoroutinefunction(method):
                    method(**arguments)
                    continue
                # The connection must not own this task: it continues after the client has left.
                task = asyncio.ensure_future(self._call(writer, request, method, arguments))
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # a line that is not a message ends the connection
        finally:
            if held and not self._over:
                self._run.peripherals.input.post(released(held))

    async def _call(
        self,
        writer: asyncio.StreamWriter,
        request: Mapping[str, Any],
        method: MethodType,
        arguments: Mapping[str, Any],
    ) -> None:
        try:
            result = await method(**arguments)
        except Exception as error:
            logger.debug("a client's request failed: %s", repr(error))
            self._answer(writer, request, {"error": error_to_json(error)})
            return
        if isinstance(result, bytes):
            self._answer(writer, request, {"result": None, "bytes": len(result)}, result)
        else:
            self._answer(writer, request, {"result": result})

    def _answer(
        self,
        writer: asyncio.StreamWriter,
        request: Mapping[str, Any],
        answer: Mapping[str, Any],
        content: bytes = b"",
    ) -> None:
        if writer.is_closing():  # the client has disconnected
            return
        status = encode({"method": "status", "params": self._status()})
        with contextlib.suppress(OSError, RuntimeError):
            writer.write(status + encode({"id": request.get("id"), **answer}))  # one system call
            writer.write(content)

    def _find(self, request: Mapping[str, Any]) -> tuple[MethodType, dict[str, Any]]:
        """Return the requested method and its validated arguments."""
        name = request.get("method")
        method = self._methods.get(name) if isinstance(name, str) else None
        if method is None:
            raise ConfigError(
                f"unknown request {name!r}: does this process have another version of smolvm_async "
                f"than the VM's owner, which has {version()}? Use the same version in both."
            )
        return method, arguments_from_json(method.__func__, request.get("params") or {})

    def _notify(self, writer: asyncio.StreamWriter, method: str, params: Any) -> None:
        writer.write(encode({"method": method, "params": params}))

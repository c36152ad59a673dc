"""The owner's side of a control socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from smolvm_async.config.checks import check_timeout
from smolvm_async.controls.interface import VM, Run
from smolvm_async.errors import ConfigError
from smolvm_async.foundation.log import get_logger
from smolvm_async.qemu.events import EventStream, event_to_json
from smolvm_async.qemu.input import InputEvent, pressed, released
from smolvm_async.vm.attach.messages import (
    MAX_MESSAGE,
    address,
    decode,
    encode,
    error_to_json,
    report_to_json,
)

logger = get_logger(__name__)

FLUSH = 1.0  # seconds that a client may take to read the last messages


class ControlServer:
    """Serves one run of a VM on the socket in its directory."""

    def __init__(self, vm: VM, run: Run) -> None:
        self._vm = vm
        self._run = run
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._requests: set[asyncio.Task[None]] = set()
        self._news: set[asyncio.Event] = set()
        self._over = False

    async def start(self, dir_fd: int) -> None:
        """Listen on the socket in an open directory; only this user can connect to it.

        Raises:
            OSError: If it cannot be made.
        """
        listener = socket.socket(socket.AF_UNIX)
        try:
            os.fchmod(listener.fileno(), 0o600)  # the socket's file gets this mode
            listener.bind(address(dir_fd))
            self._server = await asyncio.start_unix_server(
                self._serve, sock=listener, limit=MAX_MESSAGE
            )
        except BaseException:
            listener.close()
            raise

    def tell_status(self) -> None:
        """Tell every client that the VM's status may have changed."""
        for news in self._news:
            news.set()

    async def close(self) -> None:
        """Send every client what is left to say, and close."""
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
        """Everything that happens, as fast as the client reads; the oldest is left out if slow."""
        news = asyncio.Event()
        events, console = self._vm.hub.subscribe(), self._run.console
        events.listeners.add(news)
        console.listeners.add(news)
        self._news.add(news)
        try:
            hello = {
                "accelerator": self._vm.accelerator,
                "boot": event_to_json(self._run.boot.last),
            }
            self._notify(writer, "hello", hello)
            told, read = "", max(0, console.count - console.limit)
            while True:
                over = self._over
                news.clear()
                read = self._send_news(writer, events, read)
                if told != (told := str(self._vm.status)):
                    self._notify(writer, "status", {"status": told})
                await writer.drain()
                if over:
                    self._notify(writer, "ended", self._end())
                    await writer.drain()
                    return
                await news.wait()
        finally:
            console.listeners.discard(news)
            self._news.discard(news)

    def _send_news(self, writer: asyncio.StreamWriter, events: EventStream, read: int) -> int:
        for event in events.pending():
            self._notify(writer, "event", event_to_json(event))
        console = self._run.console
        if text := console.since(read):
            self._notify(writer, "console", {"text": text.decode("latin-1")})
        return console.count

    def _end(self) -> dict[str, Any]:
        failure = self._run.failure
        return {
            "report": report_to_json(self._run.report),
            "failure": error_to_json(failure) if failure else None,
        }

    async def _read_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        held: list[InputEvent] = []
        try:
            while line := await reader.readline():
                request = decode(line)
                if request.get("method") in ("input.send", "input.strike", "input.deliver"):
                    held = pressed([*held, *request["params"]["events"]])
                # Not the connection's own: a client that leaves has still asked for it.
                task = asyncio.ensure_future(self._answer(request, writer))
                self._requests.add(task)
                task.add_done_callback(self._requests.discard)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # what is no message ends the connection
        finally:
            if held and not self._over:  # but a key that it held down would stay so
                self._run.input.post(released(held))

    async def _answer(self, request: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
        answer: dict[str, Any]
        content = b""
        try:
            method = self._methods().get(str(request.get("method")))
            if method is None:
                raise ConfigError(f"the VM's owner knows no {request.get('method')!r}")
            result = await method(**request.get("params") or {})
            if isinstance(result, bytes):
                answer, content = {"result": None, "bytes": len(result)}, result
            else:
                answer = {"result": result}
        except Exception as error:
            logger.debug("a client's request failed: %s", repr(error))
            answer = {"error": error_to_json(error)}
        if writer.is_closing():  # it has gone
            return
        with contextlib.suppress(OSError, RuntimeError):
            self._notify(writer, "status", {"status": str(self._vm.status)})
            writer.write(encode({"id": request.get("id"), **answer}))
            writer.write(content)

    def _methods(self) -> Mapping[str, Callable[..., Awaitable[Any]]]:
        """What a client can ask for."""
        vm, run = self._vm, self._run
        return {
            "start": vm.start,
            "stop": self._stop,
            "delete": vm.delete,
            "pause": vm.pause,
            "resume": vm.resume,
            "screen.dump": run.screen.dump,
            "input.send": run.input.send,
            "input.deliver": run.input.deliver,
            "input.strike": run.input.strike,
            "input.tablet_taken": run.input.tablet_taken,
            "ports.expose": run.ports.expose,
            "ports.unexpose": run.ports.unexpose,
            "ports.forwards": run.ports.forwards,
            "ssh.access": run.ssh_access,
            "vnc.start": run.vnc.start,
            "vnc.stop": run.vnc.stop,
            "vnc.url": run.vnc.url,
        }

    async def _stop(self, timeout: float | None) -> Any:
        check_timeout(timeout)
        return report_to_json(await self._vm.stop(timeout))

    def _notify(self, writer: asyncio.StreamWriter, method: str, params: Any) -> None:
        writer.write(encode({"method": method, "params": params}))

"""A real S3 server (moto's) on loopback, and a proxy before it that cuts, lies and is slow."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

PIECE = 64 << 10  # bytes

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[str]:
    """Moto's server as a process of its own; yields its endpoint."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    log = (directory / "moto.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        cwd=directory,
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (directory / "moto.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()
        log.close()


@dataclass
class Request:
    """A request, as the proxy saw it."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and last byte that it asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2])) if match else None


@dataclass
class Fault:
    """A change to an answer.

    Attributes:
        status: Another one, instead of asking the server.
        cut_after: Bytes of the body after which the connection is reset.
        flip: A byte of the body that is changed.
        lie: What is added to the announced length.
        rate: Bytes for each second.
        without_range: Whether the server does not get to see the range.
        hold: Wait for this before anything is answered.
    """

    status: int = 0
    cut_after: int | None = None
    flip: int | None = None
    lie: int = 0
    rate: float | None = None
    without_range: bool = False
    hold: threading.Event | None = None
    body: bytes = SLOW_DOWN


@dataclass
class Proxy:
    """Counts what is asked for; `fault` says what is done to each answer."""

    upstream: str
    fault: Callable[[Request], Fault | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def gets(self) -> list[Request]:
        """The requests for files other than manifests."""
        return [one for one in self.requests if one.method == "GET" and ".json" not in one.path]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's only request."""
        # Nothing else holds this task once the other side has closed its connection; the garbage
        # collector would end it in another thread, which may close another connection's socket.
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
                writer.write_eof()
                await reader.read()  # until the other side has closed it
        except asyncio.CancelledError:
            pass
        finally:
            writer.transport.abort()
            self.tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
        first, *lines = head.split("\r\n")[:-2]
        method, path, _ = first.split(" ", 2)
        headers = dict(line.split(": ", 1) for line in lines)
        request = Request(method, path, {key.lower(): value for key, value in headers.items()})
        self.requests.append(request)
        fault = self.fault(request) or Fault()
        while fault.hold is not None and not fault.hold.is_set():
            await asyncio.sleep(0.01)
        if fault.status:
            writer.write(
                b"HTTP/1.1 %d Fault\r\nContent-Length: %d\r\nConnection: close\r\n"
                b"x-amz-bucket-region: eu-west-1\r\n\r\n"
                % (fault.status, len(fault.body))
                + (b"" if method == "HEAD" else fault.body)
            )
            await writer.drain()
            return
        if fault.without_range:
            lines = [line for line in lines if not line.lower().startswith("range:")]
        if "expect" in request.headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        ours = ("connection:", "expect:")
        lines = [line for line in lines if not line.lower().startswith(ours)]
        host, port = self.upstream.removeprefix("http://").split(":")
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        try:
            text = "\r\n".join([first, *lines, "Connection: close", "", ""])
            up_writer.write(text.encode("latin1"))
            length = int(request.headers.get("content-length", 0))
            if length:
                up_writer.write(await reader.readexactly(length))
            await self._relay(up_reader, writer, fault, method)
        finally:
            up_writer.transport.abort()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault, method: str
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
        if fault.lie:
            head = re.sub(
                r"(?i)(content-length: )(\d+)",
                lambda match: f"{match[1]}{int(match[2]) + fault.lie}",
                head,
            )
        writer.write(head.encode("latin1"))
        at = 0
        while method != "HEAD" and (piece := await reader.read(PIECE)):
            if fault.flip is not None and at <= fault.flip < at + len(piece):
                changed = bytearray(piece)
                changed[fault.flip - at] ^= 1
                piece = bytes(changed)
            if fault.cut_after is not None and at + len(piece) > fault.cut_after:
                writer.write(piece[: fault.cut_after - at])
                await writer.drain()
                writer.transport.abort()
                return
            writer.write(piece)
            await writer.drain()
            at += len(piece)
            self.sent += len(piece)
            if fault.rate:
                await asyncio.sleep(len(piece) / fault.rate)


@contextlib.contextmanager
def proxy_before(upstream: str) -> Iterator[Proxy]:
    """A proxy, in a thread with an event loop of its own."""
    proxy = Proxy(upstream)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def run() -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        async with server:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # the aborted transports close their sockets

    task = loop.create_task(run())
    thread = threading.Thread(target=loop.run_until_complete, args=(task,))
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def settings(endpoint: str) -> dict[str, str]:
    """The environment that S3's clients take their settings from."""
    return {
        "SMOLVM_S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.asynccontextmanager
async def plain_client(endpoint: str) -> AsyncIterator[Any]:
    """Open a client of aioboto3 without this library."""
    import aioboto3

    session = aioboto3.Session("testing", "testing", region_name="us-east-1")
    async with session.client("s3", endpoint_url=endpoint) as client:
        yield client

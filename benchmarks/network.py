"""What the guard of the network costs: a guest under the default policy, against one without guard.

python benchmarks/network.py [-n 5] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.figures import Figure, Results, show
from smolvm_async import AcceleratorWarning, AsyncSmolVM, HostError, NetworkWarning
from smolvm_async.qemu.internet.trial import find_problem
from smolvm_async.vm import plan

CONNECTIONS, DATAGRAMS, ROUND_TRIPS = 100, 500, 100
SIZE = 64 << 20  # bytes to download
# Prints seconds: for a connection, a download, and a datagram with its answer.
GUEST = f"""
import socket, sys, time
host, connections, download, echo = "10.0.2.2", *map(int, sys.argv[1:])
began = time.perf_counter()
for _ in range({CONNECTIONS}):
    socket.create_connection((host, connections)).close()
print((time.perf_counter() - began) / {CONNECTIONS})
with socket.create_connection((host, download)) as server:
    began, left = time.perf_counter(), {SIZE}
    while left:
        left -= len(server.recv(1 << 20))
print(time.perf_counter() - began)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
    datagrams.settimeout(1)
    began, answers = time.perf_counter(), 0
    for number in range({DATAGRAMS}):
        datagrams.sendto(b"%d" % number, (host, echo))
        datagrams.recv(100)
print((time.perf_counter() - began) / {DATAGRAMS})
"""


class _Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self._transport.sendto(data, address)


@asynccontextmanager
async def servers() -> AsyncIterator[list[int]]:
    """Serve connections, a download and an echo of datagrams; yield the ports."""

    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(bytes(SIZE))
            await writer.drain()
        writer.close()

    accepting = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    sending = await asyncio.start_server(send, "127.0.0.1", 0)
    loop = asyncio.get_running_loop()
    echo, _ = await loop.create_datagram_endpoint(_Echo, local_addr=("127.0.0.1", 0))
    sockets: list[socket.socket] = [accepting.sockets[0], sending.sockets[0]]
    ports = [each.getsockname()[1] for each in (*sockets, echo.get_extra_info("socket"))]
    async with accepting, sending:
        yield ports
    echo.close()


async def one(data_dir: Path) -> Mapping[str, float]:
    """Start the built-in Debian, and let it use the network; return the seconds."""
    async with servers() as ports:
        began = time.perf_counter()
        settings = {"allowed_host_ports": ports}
        async with AsyncSmolVM(data_dir=data_dir, internet_settings=settings) as vm:
            started = time.perf_counter() - began
            command = f"python3 - {' '.join(map(str, ports))}"
            said = (await vm.run(command, input=GUEST, check=True)).stdout.split()
            owner: Any = vm._vm
            began = time.perf_counter()
            for _ in range(ROUND_TRIPS):
                await owner.run.guest_status()  # `query-status` of QMP
            status = (time.perf_counter() - began) / ROUND_TRIPS
    connected, downloaded, echoed = map(float, said)
    return {
        "start of the built-in Debian": started,
        "one TCP connection": connected,
        f"a download of {SIZE >> 20} MiB": downloaded,
        "one UDP datagram and its answer": echoed,
        "one QMP command": status,
    }


def unguarded() -> HostError:
    """Return the reason of a host that cannot guard."""
    return HostError("The benchmark measures without a guard.")


async def measure(count: int) -> Results:
    """Measure both in turns."""
    ways: dict[str, Callable[[], HostError | None]] = {
        "without a guard": unguarded,
        "with the default policy": find_problem,
    }
    found: dict[str, list[Mapping[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", NetworkWarning)
        await one(Path(name))  # the first start of all makes the snapshot to start from
        for _ in range(count):
            for way, problem in ways.items():
                with mock.patch.object(plan, "find_problem", problem):
                    found[way].append(await one(Path(name)))
    results = Results("The guard of the network (built-in Debian)")
    bare, guarded = ways
    for what in found[bare][0]:
        floor, library = (Figure(way, [each[what] for each in found[way]]) for way in ways)
        results.compare(what, floor, library, headline=what.startswith(("one TCP", "a download")))
    results.notes.append(f"Server and guest are on one machine. {bare} / {guarded}, in turns.")
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore", AcceleratorWarning)
    results = asyncio.run(measure(options.n)).to_json()
    print(json.dumps(results, indent=1)) if options.json else show(results)


if __name__ == "__main__":
    main()

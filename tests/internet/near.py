"""The host of the tests, in a network namespace: one guest tries everything, under each policy.

The arguments are a data directory, and the image of a guest that stands in for Windows, if any.
Prints the results as JSON; `tests/integration/test_internet.py` judges them.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smolvm_async import AsyncSmolVM, EventStream, NetworkDenied

HERE = Path(__file__).parent
GUEST = (HERE / "guest.py").read_text()
TARGETS = [
    ("tcp", "203.0.113.1", 80),
    ("tcp", "198.51.100.1", 80),
    ("tcp", "2001:db8::1", 80),
    ("udp", "203.0.113.1", 9000),
    ("udp", "2001:db8::1", 9000),
    ("udp", "198.51.100.1", 9000),
    ("tcp", "10.0.2.2", 8000),  # allowed_host_ports= opens it
    ("udp", "10.0.2.2", 8000),
    ("tcp", "10.0.2.2", 8001),
    ("tcp", "fec0::2", 8000),  # 10.0.2.2 of IPv6
    ("tcp", "fec0::2", 8001),
    ("tcp", "192.0.2.1", 8000),  # the host's own address
    ("tcp", "2001:db8:f::1", 8000),
    ("udp", "192.0.2.1", 8000),
    ("tcp", "169.254.169.254", 80),
    ("udp", "169.254.169.254", 9000),
    ("tcp", "100.100.100.200", 80),
    ("udp", "224.0.0.251", 5353),
    ("udp", "255.255.255.255", 9000),
    ("icmp", "203.0.113.1", 0),
    ("raw", "203.0.113.1", 81),
    ("frame", "127.0.0.1", 8002),  # straight to the gateway
    ("frame", "192.0.2.1", 8002),
    ("routed", "203.0.113.1", 82),
]
BLOCKED = 5  # seconds
# Names with an address that no name may have.
FORBIDDEN = ["loopback.example", "metadata.example", "own.example"]
FROM_WINDOWS = """
reach() { answer=$(echo x | nc -w 9 $1 $2 2>/dev/null); echo "$1 $2 ${answer:-refused}"; }
reach 203.0.113.1 80; reach 198.51.100.1 80; reach 192.0.2.1 8000; reach 169.254.169.254 80
reach 10.0.2.2 8000; reach 10.0.2.2 8001; reach 10.0.2.3 22
ping -c 1 -W 2 203.0.113.1 >/dev/null && echo "a ping is answered"
for name in one.example secret.example loopback.example; do
    address=$(nslookup $name 8.8.8.8 | awk '/^Name/ { named = 1 } named && /^Address/ { print $2 }')
    case $address in
        198.1[89].*) echo "$name $(reach $address 80 | cut -d " " -f 3)" ;;
        *) echo "$name $address" ;;
    esac
done
"""
heard: list[tuple[str, int]] = []


def listen(address: str, port: int) -> None:
    """Serve TCP and UDP on the host, and note every contact."""

    def serve(kind: socket.SocketKind) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen(100)
        while True:
            if kind == socket.SOCK_STREAM:
                peer, _ = server.accept()
                peer.sendall(b"hello\n")
                peer.close()
            else:
                _, sender = server.recvfrom(4096)
                server.sendto(b"hello\n", sender)
            heard.append((address, port))

    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        threading.Thread(target=serve, args=(kind,), daemon=True).start()


def make_links(far: subprocess.Popen[str]) -> None:
    """Connect this namespace with the internet's."""
    commands = [
        "link set lo up",
        f"link add near type veth peer name far netns {far.pid}",
        "addr add 192.0.2.1/24 dev near",
        "addr add 2001:db8:f::1/64 dev near nodad",
        "link set near up",
    ]
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
    ask(far)
    for gateway in ("192.0.2.2", "2001:db8:f::2"):
        subprocess.run(["ip", "route", "add", "default", "via", gateway], check=True)
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write("nameserver 203.0.113.53\n")
    for family in "ipv4", "ipv6":  # a host with such settings is no exception
        Path(f"/proc/sys/net/{family}/ip_nonlocal_bind").write_text("1")
    mount = ["mount", "--bind", file.name, str(Path("/etc/resolv.conf").resolve())]
    subprocess.run(mount, check=True)


def ask(far: subprocess.Popen[str]) -> Any:
    """Return what the internet has seen since the last question."""
    assert far.stdin is not None
    assert far.stdout is not None
    far.stdin.write("\n")
    far.stdin.flush()
    line = far.stdout.readline().strip()
    return None if line == "ready" else json.loads(line)


async def attempt(vm: AsyncSmolVM, far: subprocess.Popen[str], events: EventStream) -> Any:
    """Let the guest try everything; return its results, and what the servers saw."""
    ask(far)
    heard.clear()
    result = await vm.run(f"python3 /guest.py '{json.dumps(TARGETS)}'", timeout=120)
    denied = [event for event in events.pending() if isinstance(event, NetworkDenied)]
    return {
        **json.loads(result.stdout),
        "seen": ask(far),
        "heard": sorted(set(heard)),
        "denied": sorted({(event.protocol, event.address, event.port) for event in denied}),
        "omitted": sum(event.omitted for event in denied),
    }


async def try_from_windows(far: subprocess.Popen[str], data_dir: Path, image: str) -> Any:
    """Let the stand-in for Windows, which has no Python, try a little under one policy."""
    settings = {
        "allowed_cidrs": ["198.51.100.0/24"],
        "allowed_domains": ["one.example", *FORBIDDEN],
        "allowed_host_ports": [8000],
    }
    async with AsyncSmolVM(
        os="windows",
        image=image,
        cpus=1,
        accel="tcg",
        data_dir=data_dir,
        internet_settings=settings,
    ) as vm:
        await vm.wait_for("ready")
        said = (await vm.run(FROM_WINDOWS, timeout=120)).stdout.splitlines()
    return {"said": said, "seen": ask(far), "heard": sorted(set(heard))}


async def try_all(far: subprocess.Popen[str], data_dir: Path) -> Mapping[str, Any]:
    results: dict[str, Any] = {}
    settings = {"allowed_host_ports": [8000]}
    async with AsyncSmolVM(accel="tcg", data_dir=data_dir, internet_settings=settings) as vm:
        events = vm.events()
        script = data_dir / "guest.py"
        script.write_text(GUEST)
        await vm.upload_file(script, "/guest.py")
        script.unlink()
        results["open"] = await attempt(vm, far, events)
        async with vm.fork() as (clone,):  # has the policy of this moment
            results["clone"] = await attempt(clone, far, clone.events())
        holding = asyncio.ensure_future(vm.run("python3 /guest.py hold"))
        while not [seen for seen in ask(far) if seen[2] == 443]:
            await asyncio.sleep(0.1)
        await vm.set_internet_settings(
            {
                "allowed_cidrs": ["198.51.100.0/24"],
                "allowed_domains": ["one.example", "*.two.example", *FORBIDDEN],
            }
        )
        results["held"] = (await holding).stdout.strip()
        results["restricted"] = await attempt(vm, far, events)
        beating = asyncio.ensure_future(vm.run("python3 /guest.py beat"))
        await asyncio.sleep(1)
        time.sleep(BLOCKED)  # the event loop is blocked: a thread answers
        results["beat"] = float((await beating).stdout)
        await vm.set_internet_settings({"mode": "off"})
        results["off"] = await attempt(vm, far, events)
    return results


def main() -> None:
    command = ["unshare", "--net", sys.executable, str(HERE / "far.py")]
    far = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        make_links(far)
        for address in ("127.0.0.1", "::1", "192.0.2.1", "2001:db8:f::1"):
            for port in (8000, 8001, 8002):
                listen(address, port)
        data_dir, *images = sys.argv[1:]
        attempts = (
            try_from_windows(far, Path(data_dir), *images)
            if images
            else try_all(far, Path(data_dir))
        )
        results = asyncio.run(attempts)
    finally:
        far.kill()
        far.wait()
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""What the guest tries; runs in the guest, with its Python. See `near.py`."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import socket
import struct
import sys
import time

NAMES = (
    "one.example",
    "deep.two.example",
    "two.example",
    "secret.example",
    "loopback.example",
    "metadata.example",
    "own.example",
)
TO_NAMES = [("udp", "one.example", 9000), ("icmp", "one.example", 0), ("udp", "own.example", 8000)]
ICMP_ECHO = b"\x08\x00\xf7\xff\x00\x00\x00\x00"
LINK = next(name for _, name in socket.if_nameindex() if name != "lo")
GATEWAY = bytes.fromhex("52550a000202")
LOOSE_SOURCE_ROUTE = b"\x83\x07\x04" + socket.inet_aton("203.0.113.1") + b"\x00"


def attempt(protocol: str, address: str, port: int) -> str:
    """Return `ok` if a server has answered, or the reason in a word."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        if protocol in ("icmp", "raw", "frame"):
            return send_raw(protocol, address, port)
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        with socket.socket(family, kind) as own:
            own.settimeout(1.5 if protocol == "udp" else 8)
            if protocol == "udp":
                own.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            if protocol == "routed":
                own.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, LOOSE_SOURCE_ROUTE)
            own.connect((address, port))
            own.send(b"x")
            return "ok" if own.recv(100) else "closed"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


def send_raw(protocol: str, address: str, port: int) -> str:
    """Send an echo request, or a TCP packet with headers of our own, as root."""
    if protocol == "icmp":
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as own:
            own.settimeout(1.5)
            own.sendto(ICMP_ECHO, (address, 0))
            while True:  # also packets for others arrive
                packet, (sender, _) = own.recvfrom(100)
                if sender == address and packet[20:22] == b"\0\0":
                    return "ok"
    packet = tcp_packet(address, port)
    if protocol == "raw":
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as own:
            own.sendto(packet, (address, 0))
    else:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as own:
            own.bind((LINK, 0))
            own.send(GATEWAY + own.getsockname()[4] + b"\x08\x00" + packet)
    return "sent"


def tcp_packet(address: str, port: int) -> bytes:
    """Return an IPv4 packet that opens a TCP connection."""
    ends = socket.inet_aton("10.0.2.15") + socket.inet_aton(address)
    tcp = struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 0x50, 2, 1000, 0, 0)
    sum_of_tcp = checksum(ends + struct.pack("!BBH", 0, 6, len(tcp)) + tcp)
    tcp = tcp[:16] + sum_of_tcp + tcp[18:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 7, 0, 64, 6, 0) + ends
    return header[:10] + checksum(header) + header[12:] + tcp


def checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)


def query(name: str, server: str, *, tcp: bool) -> str:
    """Ask a DNS server for a name; return the address, or the code of the answer."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    message = struct.pack("!HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1"
    kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    try:
        with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, kind) as own:
            own.settimeout(3)
            own.connect((server, 53))
            own.send(struct.pack("!H", len(message)) + message if tcp else message)
            answer = own.recv(4096)[2 if tcp else 0 :]
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    code, count = answer[3] & 15, int.from_bytes(answer[6:8], "big")
    return socket.inet_ntoa(answer[-4:]) if count else f"code {code}"


def fetch(name: str) -> str:
    try:
        with socket.create_connection((name, 80), timeout=8) as own:
            own.send(f"GET / HTTP/1.0\r\nHost: {name}\r\n\r\n".encode())
            return "ok" if own.recv(4096).startswith(b"HTTP/1.0 200") else "closed"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


def send_to_name(protocol: str, name: str, port: int) -> str:
    try:
        return attempt(protocol, socket.gethostbyname(name), port)
    except OSError:
        return "no such name"


def hold() -> str:
    """Keep a connection until it ends."""
    with socket.create_connection(("203.0.113.1", 443), timeout=60) as own:
        own.send(b"x")
        own.recv(100)
        try:
            return "ended" if not own.recv(100) else "data"
        except OSError as error:
            return "ended" if error.errno == errno.ECONNRESET else str(error)


def beat() -> float:
    """Connect all the time for seven seconds; return the longest time in seconds."""
    longest, end = 0.0, time.monotonic() + 7
    while time.monotonic() < end:
        began = time.monotonic()
        socket.create_connection(("198.51.100.1", 80), timeout=30).close()
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.05)
    return longest


def main() -> None:
    if sys.argv[1] in ("hold", "beat"):
        print(hold() if sys.argv[1] == "hold" else beat())
        return
    targets = json.loads(sys.argv[1])
    with open("/etc/resolv.conf", "w") as file:
        file.write("nameserver 10.0.2.3\noptions timeout:2 attempts:1\n")
    servers = ("10.0.2.3", "8.8.8.8", "2001:db8::53")
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        results = list(pool.map(lambda target: attempt(*target), targets))
        asked = [(name, server, tcp) for name in NAMES for server in servers for tcp in (0, 1)]
        answers = list(pool.map(lambda one: query(one[0], one[1], tcp=bool(one[2])), asked))
        fetched = list(pool.map(fetch, NAMES))
        sent = [send_to_name(*each) for each in TO_NAMES]
    ways = {
        f"{p} {address} {port}": r for (p, address, port), r in zip(targets, results, strict=True)
    }
    names = {
        f"{name} {s} {'tcp' if t else 'udp'}": a
        for (name, s, t), a in zip(asked, answers, strict=True)
    }
    print(
        json.dumps(
            {
                "ways": ways,
                "names": names,
                "fetched": dict(zip(NAMES, fetched, strict=True)),
                "sent": sent,
            }
        )
    )


if __name__ == "__main__":
    main()

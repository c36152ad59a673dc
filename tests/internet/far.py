"""The internet of the tests: servers on documentation addresses, in a network namespace of its own.

Prints a line when the servers listen; then, for each line on stdin, the destinations of all packets
that have arrived since the last line, as JSON.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable

ADDRESSES = (
    "203.0.113.1",
    "203.0.113.53",
    "198.51.100.1",
    "198.51.100.2",
    "169.254.169.254",
    "100.100.100.200",
    "2001:db8::1",
    "2001:db8:1::1",
)
NAMES = {
    "one.example": "203.0.113.1",
    "deep.two.example": "198.51.100.2",
    "secret.example": "203.0.113.1",
    "loopback.example": "127.0.0.1",
    "metadata.example": "169.254.169.254",
    "own.example": "192.0.2.1",
}
ETH_P_ALL, ETH_P_IP, ETH_P_IPV6 = 3, 0x0800, 0x86DD
PACKET_OUTGOING = 4
seen: list[tuple[str, str, int]] = []


def start(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


def sniff() -> None:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    while True:
        packet, (_, kind, way, *_) = wire.recvfrom(65535)
        if way == PACKET_OUTGOING:
            continue
        if kind == ETH_P_IP:
            header, number = 4 * (packet[0] & 15), packet[9]
            address = str(ipaddress.ip_address(packet[16:20]))
        elif kind == ETH_P_IPV6:
            header, number = 40, packet[6]
            address = str(ipaddress.ip_address(packet[24:40]))
            if number == 0 or (number == socket.IPPROTO_ICMPV6 and packet[header] >= 130):
                continue  # the link's own neighbour discovery
        else:
            continue
        protocol = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp"}.get(number, str(number))
        port = 0 if protocol == "icmp" else int.from_bytes(packet[header + 2 : header + 4], "big")
        seen.append((protocol, address, port))


def serve_tcp(server: socket.socket) -> None:
    while True:
        start(hold, server.accept()[0])


def hold(connection: socket.socket) -> None:
    """Greet a client, answer its requests, and keep the connection."""
    with connection:
        try:
            while request := connection.recv(4096):
                if request.startswith(b"GET"):
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nhello\n")
                else:
                    connection.sendall(b"hello\n")
        except OSError:
            pass


def start_udp(address: str, port: int, answer: Callable[[bytes], bytes]) -> None:
    server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, port))  # answers come from this address
    start(serve_udp, server, answer)


def serve_udp(server: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    while True:
        data, peer = server.recvfrom(4096)
        server.sendto(answer(data), peer)


def resolve(query: bytes) -> bytes:
    """Answer a DNS query from NAMES."""
    at, labels = 12, []
    while size := query[at]:
        labels.append(query[at + 1 : at + 1 + size].decode())
        at += 1 + size
    question = query[12 : at + 5]
    kind = int.from_bytes(query[at + 1 : at + 3], "big")
    address = NAMES.get(".".join(labels).lower())
    found = address is not None and kind == 1
    flags = 0x8180 if address is not None else 0x8183
    answer = b""
    if found and address is not None:
        answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
    return query[:2] + struct.pack("!HHHHH", flags, 1, int(found), 0, 0) + question + answer


def main() -> None:
    input()  # the link is here
    for command in (
        "link set lo up",
        "link set far up",
        "addr add 192.0.2.2/24 dev far",
        "addr add 2001:db8:f::2/64 dev far nodad",
        *(f"addr add {address} dev lo nodad" for address in ADDRESSES),
    ):
        subprocess.run(["ip", *command.split()], check=True)
    start(sniff)
    for family in (socket.AF_INET, socket.AF_INET6):
        for port in (80, 443):
            start(serve_tcp, socket.create_server(("", port), family=family, backlog=100))
    for address in ADDRESSES:
        start_udp(address, 9000, lambda data: data)
    start_udp("203.0.113.53", 53, resolve)
    print("ready", flush=True)
    for _ in sys.stdin:
        news, seen[:] = list(seen), []
        print(json.dumps(sorted(set(news))), flush=True)


if __name__ == "__main__":
    main()

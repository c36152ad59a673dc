"""Calls on a duplicate of QEMU's socket: like Python's, but none of them waits.

Python's own calls give up the interpreter's lock. Beside a busy thread, each of them would take
5 ms, and QEMU waits for the answer. See `host/seccomp.py`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple

_libc = ctypes.PyDLL(None, use_errno=True)

SO_COOKIE = 57  # <asm-generic/socket.h>: a number that the kernel never uses again
RTM_NEWROUTE, RTM_GETROUTE, RTA_DST, RTN_UNICAST = 24, 26, 1, 1  # <linux/rtnetlink.h>
NLM_F_REQUEST = 1  # <linux/netlink.h>
LARGEST = 128  # bytes, struct sockaddr_storage
AT_ONCE = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
V4_MAPPED = bytes(10) + b"\xff\xff"


class SocketAddress(NamedTuple):
    """An address and a port, as the guest means them: IPv4 in IPv6's form is IPv4."""

    address: IPv4Address | IPv6Address
    port: int


def unpack(data: bytes) -> SocketAddress | None:
    """Return the address in a struct sockaddr; `None` if its family is not IPv4 or IPv6."""
    port = int.from_bytes(data[2:4], "big")
    if family(data) == socket.AF_INET and len(data) >= 8:
        return SocketAddress(IPv4Address(data[4:8]), port)
    if family(data) == socket.AF_INET6 and len(data) >= 24:
        mapped = data[8:20] == V4_MAPPED
        return SocketAddress(ip_address(data[20:24] if mapped else data[8:24]), port)
    return None


def pack(to: SocketAddress, form: int) -> bytes:
    """Return a struct sockaddr of the address family `form`."""
    start, address = struct.pack("=H", form) + to.port.to_bytes(2, "big"), to.address.packed
    if form == socket.AF_INET:
        return start + address + bytes(8)
    return start + bytes(4) + (V4_MAPPED + address if len(address) == 4 else address) + bytes(4)


def family(data: bytes) -> int:
    """Return the address family of a struct sockaddr."""
    return int.from_bytes(data[:2], "little")


def protocol(fd: int) -> int:
    """Return the protocol of a socket, such as `socket.IPPROTO_TCP`."""
    return int.from_bytes(_option(fd, socket.SO_PROTOCOL, 4), "little")


def cookie(fd: int) -> int:
    """Return a number that identifies a socket for ever."""
    return int.from_bytes(_option(fd, SO_COOKIE, 8), "little")


def waits(fd: int) -> bool:
    """Return whether calls on a socket wait."""
    return not _libc.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


def connect(fd: int, to: bytes) -> int:
    """Connect a socket to `to`, a struct sockaddr."""
    return _checked(_libc.connect(fd, to, len(to)))


def bind_to_loopback(fd: int, form: int) -> int:
    """Bind a socket to a free port of 127.0.0.1, and return the port."""
    any_port = pack(SocketAddress(IPv4Address("127.0.0.1"), 0), form)
    _checked(_libc.bind(fd, any_port, len(any_port)))
    name, size = ctypes.create_string_buffer(LARGEST), ctypes.c_uint(LARGEST)
    _checked(_libc.getsockname(fd, name, ctypes.byref(size)))
    return int.from_bytes(name.raw[2:4], "big")


def is_local(address: IPv4Address | IPv6Address) -> bool:
    """Return whether this host has the address, or it is a broadcast address of its links."""
    form = socket.AF_INET if address.version == 4 else socket.AF_INET6
    fd = _checked(_libc.socket(form, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0))
    try:
        packed = pack(SocketAddress(address, 0), form)
        bound = not _libc.bind(fd, packed, len(packed))
    finally:
        close(fd)
    # With net.ipv4.ip_nonlocal_bind=1, a socket can have any address.
    return bound and not _leaves(address, form)


def _leaves(address: IPv4Address | IPv6Address, form: int) -> bool:
    """Return whether packets to an address leave this host; see rtnetlink(7)."""
    to = address.packed
    wanted = struct.pack("=BBBBBBBBI", form, 8 * len(to), 0, 0, 0, 0, 0, 0, 0)
    wanted += struct.pack("=HH", 4 + len(to), RTA_DST) + to
    request = struct.pack("=IHHII", 16 + len(wanted), RTM_GETROUTE, NLM_F_REQUEST, 0, 0) + wanted
    fd = _libc.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    if fd < 0:  # by systemd's RestrictAddressFamilies=
        return False
    try:
        answer = ctypes.create_string_buffer(4096)
        _libc.send(fd, request, ctypes.c_size_t(len(request)), AT_ONCE)
        _libc.recv(fd, answer, ctypes.c_size_t(len(answer)), AT_ONCE)
    finally:
        close(fd)
    kind, route = struct.unpack_from("=4xH17xB", answer)
    return (kind, route) == (RTM_NEWROUTE, RTN_UNICAST)


def send(fd: int, data: bytes, flags: int, to: bytes) -> int:
    """Send a datagram, as sendto(2) does."""
    size = ctypes.c_size_t(len(data))
    return _checked(_libc.sendto(fd, data, size, flags | AT_ONCE, to, len(to)))


def receive(fd: int, size: int, flags: int) -> tuple[int, bytes, bytes]:
    """Receive a datagram; return the result of recvfrom(2), the data and the sender's address."""
    data, sender = ctypes.create_string_buffer(size), ctypes.create_string_buffer(LARGEST)
    length = ctypes.c_uint(LARGEST)
    arguments = (ctypes.c_size_t(size), flags | AT_ONCE, sender, ctypes.byref(length))
    count = _checked(_libc.recvfrom(fd, data, *arguments))
    return count, data.raw[:count], sender.raw[: length.value]


def end(fd: int) -> None:
    """End a connection in both directions."""
    _libc.shutdown(fd, socket.SHUT_RDWR)


def close(fd: int) -> None:
    """Close a descriptor."""
    _libc.close(fd)


def _option(fd: int, number: int, size: int) -> bytes:
    value, length = ctypes.create_string_buffer(size), ctypes.c_uint(size)
    _checked(_libc.getsockopt(fd, socket.SOL_SOCKET, number, value, ctypes.byref(length)))
    return value.raw


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

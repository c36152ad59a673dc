"""The host names in the first bytes of a client."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smolvm_async.qemu.internet.first_packet import (
    LARGEST,
    BadGreetingError,
    IncompleteError,
    stated_names,
)


def hello(name: str | None) -> bytes:
    """Return the first bytes of a client of OpenSSL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    sent = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name).do_handshake()
    return sent.read()


def records(greeting: bytes, size: int) -> bytes:
    """Return the same handshake message in TLS records of `size` bytes."""
    body = greeting[5:]
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(greeting[:3] + len(part).to_bytes(2, "big") + part for part in parts)


HELLO = hello("pypi.org")
REQUEST = b"GET / HTTP/1.1\r\nAccept: */*\r\nHost: pypi.org\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (REQUEST, {"pypi.org"}),
        (REQUEST.replace(b"\r", b""), {"pypi.org"}),
        (b"\r\n\n " + REQUEST, {"pypi.org"}),
        (b"GET / HTTP/1.0\r\nhost:\tPyPI.org.:80 \r\n\r\nbody", {"pypi.org"}),
        (b"GET / HTTP/1.0\r\n\r\n", set()),
        (b"GET http://me@a.org:80?x HTTP/1.1\r\nHost: b.org\r\n\r\n", {"a.org", "b.org"}),
        (b"CONNECT a.org:443 HTTP/1.1\r\nHost: b.org\r\nHost: c.org\r\n\r\n", {*"abc"}),
        (b"x" * 40 + b" / HTTP/1.1\r\nHost: a.org\r\n\r\n", {"a.org"}),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", set()),
        (b"EHLO pypi.org\r\n", set()),
        (b"0032git-upload-pack /project\0host=pypi.org\0", set()),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", set()),
        (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", set()),
        (hello("PyPI.org"), {"pypi.org"}),
        (hello(None), set()),
        (records(HELLO, 7), {"pypi.org"}),
    ],
)
def test_names_are_found(data: bytes, names: set[str]) -> None:
    short = {f"{name}.org" if len(name) == 1 else name for name in names}
    assert stated_names(data) == short


@pytest.mark.parametrize(
    "data",
    [
        b"GET  / HTTP/1.1\r\nHost: other.org\r\n\r\n",
        b"GET / HTTP/1.1 \r\nHost: other.org\r\n\r\n",
        b"GET\t/ HTTP/1.1\r\nHost: other.org\r\n\r\n",
        b"GET / http/1.1\r\nHost: other.org\r\n\r\n",
        b"GET / HTTP/1.2\r\nHost: other.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : other.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\r\n Host: other.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\rHost: other.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: b\0\r\nHost: other.org\r\n\r\n",
        b"GET / HTTP/1.1\r\n: b\r\nHost: other.org\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"b" * LARGEST,
        b"\x16GET / HTTP/1.1\r\nHost: other.org\r\n\r\n",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00",
        HELLO.replace(b"\0\0\0\x0d\0\x0b\0\0\x08", b"\0\0\0\x0d\0\x0b\0\0\x09"),
        HELLO.replace(b"\0\x0b\0\0\x08pypi", b"\0\x0b\1\0\x08pypi"),
    ],
)
def test_malformed_greetings_are_refused(data: bytes) -> None:
    with pytest.raises(BadGreetingError):
        stated_names(data)


@pytest.mark.parametrize("data", [REQUEST, b"\n" + REQUEST, HELLO])
def test_no_part_of_a_greeting_goes_unchecked(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises(IncompleteError):
            stated_names(data[:size])


@given(st.binary(max_size=200), st.integers(0, 300))
@example(b"\x16\x03", 0)
def test_anything_has_an_answer(data: bytes, cut: int) -> None:
    for each in data, HELLO[:cut] + data, REQUEST[:cut] + data:
        with contextlib.suppress(IncompleteError, BadGreetingError):
            assert isinstance(stated_names(each), set)

"""The host names that a client states in the first bytes that it sends: in TLS and in HTTP/1.

A `restricted` guest connects to a name. It could then ask the server for another name of the same
address ("domain fronting"). So the relay compares the names. Text that mentions HTTP has to be
correct: a lenient server may find a name where a strict parser finds none.

Not seen are: the name in TLS's encrypted ClientHello, all that is inside an encrypted connection,
HTTP/2 without TLS, other protocols, and all requests after the first one of a connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LARGEST = 1 << 16  # bytes; a greeting that is not complete by then is refused
HANDSHAKE, CLIENT_HELLO = 22, 1  # RFC 8446, 5.1 and 4
SERVER_NAME, HOST_NAME = 0, 0  # RFC 6066, 3
HTTP2 = b"PRI * HTTP/2.0\r\n"  # RFC 9113, 3.4

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, 5.6.2
# A line that may still become a request line: with a method, and without control characters.
BEGINNING = re.compile(TOKEN + rb"([ \t][^\x00-\x08\x0a-\x1f\x7f]*)?\r?")
REQUEST_LINE = re.compile(TOKEN + rb" ([^\x00-\x20\x7f]+) HTTP/1\.[01]\r?\n")
FIELD_LINE = re.compile(rb"(" + TOKEN + rb"):([^\x00\r\n]*)\r?\n")


class IncompleteError(Exception):
    """More bytes are needed."""


class BadGreetingError(Exception):
    """The first bytes are malformed, or too many."""


def stated_names(data: bytes) -> set[str]:
    """Return the host names in the first bytes of a client, in lower case; perhaps none.

    Raises:
        IncompleteError: More bytes are needed, and `LARGEST` is not reached.
        BadGreetingError: The greeting is malformed, or too long.
    """
    try:
        if data[:1] == bytes([HANDSHAKE]):
            return set(_server_names(_client_hello(data)))
        return set(_http_hosts(data.lstrip()))  # servers skip empty lines
    except IncompleteError:
        if len(data) >= LARGEST:
            raise BadGreetingError("the client's greeting is too long") from None
        raise


def is_harmless(data: bytes) -> bool:
    """Return whether a server cannot do anything yet with first bytes that are not complete."""
    return data[:1] != bytes([HANDSHAKE]) and b"\n" not in data.lstrip()


def at_end(data: bytes) -> bytes:
    """Return first bytes at the end of file as a lenient server understands them."""
    return data + b"\r\n\r\n" if data.strip() else b"\0"


def _http_hosts(data: bytes) -> Iterator[str]:
    line, newline, _ = data.partition(b"\n")
    if not newline and (not data or BEGINNING.fullmatch(line)):
        raise IncompleteError
    if b"HTTP/" not in line.upper() or data.startswith(HTTP2):
        return
    request = REQUEST_LINE.match(data)
    if request is None:
        raise BadGreetingError("the client's HTTP request line is malformed")
    target = request[1].decode("latin-1")
    if line.startswith(b"CONNECT "):
        yield _host_name(target)
    elif "://" in target:
        yield _host_name(re.split("[/?#]", target.partition("://")[2])[0].rpartition("@")[2])
    at = request.end()
    while data[at : at + 1] != b"\n" and data[at : at + 2] != b"\r\n":
        field = FIELD_LINE.match(data, at)
        if field is None:
            if b"\n" in data[at:]:
                raise BadGreetingError("a line of the client's HTTP request is malformed")
            raise IncompleteError
        if field[1].lower() == b"host":
            yield _host_name(field[2].decode("latin-1"))
        at = field.end()


def _host_name(text: str) -> str:
    """Return the name of a host with or without a port, in lower case and without a last dot."""
    host = text.strip(" \t")
    if not host.startswith("["):
        host = host.partition(":")[0]
    return host.lower().removesuffix(".")


class _Fields:
    """Reads fields from a message that is complete."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        if len(part) < size:
            raise BadGreetingError("a length in the client's TLS greeting is wrong")
        self._at += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """Read a vector whose length has `size` bytes."""
        return self.take(self.number(size))


def _client_hello(data: bytes) -> bytes:
    """Return the body of the first handshake message, which may lie in several records."""
    message, at = b"", 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        header = data[at : at + 5]
        if header[:2] not in (b"", b"\x16", b"\x16\x03"):
            raise BadGreetingError("the client's greeting is not one of TLS")
        size = int.from_bytes(header[3:5], "big")
        if len(header) < 5 or len(data) < at + 5 + size:
            raise IncompleteError
        if not size:
            raise BadGreetingError("the client's TLS greeting has an empty record")
        message += data[at + 5 : at + 5 + size]
        at += 5 + size
    if message[0] != CLIENT_HELLO:
        raise BadGreetingError("the client's first TLS message is not a greeting")
    return message[4 : 4 + int.from_bytes(message[1:4], "big")]


def _server_names(hello: bytes) -> Iterator[str]:
    fields = _Fields(hello)
    fields.take(2 + 32)  # version and random
    fields.vector(1)  # session id
    fields.vector(2)  # cipher suites
    fields.vector(1)  # compression methods
    if not fields:
        return
    extensions = _Fields(fields.vector(2))
    while extensions:
        kind, body = extensions.number(2), _Fields(extensions.vector(2))
        if kind == SERVER_NAME:
            names = _Fields(body.vector(2))
            while names:
                if names.number(1) != HOST_NAME:
                    raise BadGreetingError("the client's TLS greeting has an unknown kind of name")
                yield names.vector(2).decode("latin-1").lower().removesuffix(".")

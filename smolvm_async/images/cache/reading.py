"""Reads a file while it arrives: its digest, and what it holds if it is compressed."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from smolvm_async.images.manifest import ImageFile

if TYPE_CHECKING:
    from backports.zstd import ZstdDecompressor

PIECE = 256 << 10  # bytes
WINDOW_LOG = 23  # 8 MiB: what zstd's levels up to 19 take, and what fits beside the rest
SLICE = 16 << 10  # bytes that are decompressed at a time: what follows a frame's end is copied
HOLE = bytes(1 << 16)  # zeroes that are not written: a file system keeps them for nothing


class WrongContentError(Exception):
    """What arrived is not what the manifest says, or cannot be used."""


class Reading:
    """Reads what is there of a file, in order; every method is for a thread.

    Args:
        path: The file.
        expected: What its manifest says.
        content: Where to what it holds goes, if it is compressed.
    """

    def __init__(self, path: Path, expected: ImageFile, content: Path, uri: str) -> None:
        self.at = 0
        self.abandoned = False  # nobody waits for it any more
        self._expected = expected
        self._uri = uri
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._digest = hashlib.sha256()
        self._content: _Content | None = None
        if expected.compression is not None:
            try:
                self._content = _Content(content, expected, uri)
            except BaseException:
                os.close(self._fd)
                raise

    def go_on(self, end: int) -> None:
        """Read on, up to `end`.

        Raises:
            WrongContentError: If it cannot be decompressed.
            OSError: If the disk is full.
        """
        while self.at < end and not self.abandoned:
            piece = os.pread(self._fd, min(PIECE, end - self.at), self.at)
            if not piece:
                raise WrongContentError(f"{self._uri} became shorter while it was read: try again.")
            self._digest.update(piece)
            self.at += len(piece)
            if self._content is not None:
                self._decompress(self._content, piece)

    def _decompress(self, content: _Content, piece: bytes) -> None:
        for start in range(0, len(piece), SLICE):
            if not self.abandoned:
                content.add(piece[start : start + SLICE])

    def check(self) -> None:
        """Compare the digests, at the end.

        Raises:
            WrongContentError: If one is wrong; it names both.
        """
        _compare(self._uri, self._expected.sha256, self._digest.hexdigest())
        if self._content is not None:
            self._content.check()

    def close(self) -> None:
        """Close the files."""
        os.close(self._fd)
        if self._content is not None:
            self._content.close()


class _Content:
    """What a compressed file holds."""

    def __init__(self, path: Path, expected: ImageFile, uri: str) -> None:
        assert expected.content_size is not None
        assert expected.content_sha256 is not None
        self._size, self._sha256 = expected.content_size, expected.content_sha256
        self._uri = uri
        self._digest = hashlib.sha256()
        self._decompressor = _decompressor()
        self._written = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def add(self, piece: bytes) -> None:
        try:
            self._decompress(piece)
        except _zstd_error() as error:
            raise WrongContentError(
                f"{self._uri} cannot be decompressed: {error}. A window of over 8 MiB (zstd "
                "--long, or a level above 19) is not accepted; else publish it again."
            ) from error

    def _decompress(self, piece: bytes) -> None:
        while True:
            if self._decompressor.eof:  # another frame may follow
                if not piece:
                    return
                self._decompressor = _decompressor()
            self._write(self._decompressor.decompress(piece, PIECE))
            piece = self._decompressor.unused_data if self._decompressor.eof else b""
            if not piece and (self._decompressor.eof or self._decompressor.needs_input):
                return

    def _write(self, content: bytes) -> None:
        self._digest.update(content)
        if self._written + len(content) > self._size:
            raise WrongContentError(
                f"{self._uri} holds more than the {self._size} bytes that its manifest says: "
                "publish it again."
            )
        for start in range(0, len(content), len(HOLE)):
            block = content[start : start + len(HOLE)]
            at = self._written + start
            while block and not HOLE.startswith(block):
                written = os.pwrite(self._fd, block, at)
                block, at = block[written:], at + written
        self._written += len(content)

    def check(self) -> None:
        if not self._decompressor.eof:
            raise WrongContentError(
                f"{self._uri} ends within what is compressed: publish it again."
            )
        _compare(f"What {self._uri} holds", self._sha256, self._digest.hexdigest())
        if self._written != self._size:
            raise WrongContentError(
                f"{self._uri} holds {self._written} bytes, and its manifest says {self._size}: "
                "publish it again."
            )
        os.ftruncate(self._fd, self._size)  # a hole at the end

    def close(self) -> None:
        os.close(self._fd)


def _compare(what: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise WrongContentError(
            f"{what} has the SHA-256 {actual}, and its manifest says {expected}: it was damaged "
            "on its way, or changed without its manifest. Nothing of it is kept; try again, or "
            "publish it again."
        )


def _decompressor() -> ZstdDecompressor:
    if sys.version_info >= (3, 14):
        from compression.zstd import DecompressionParameter, ZstdDecompressor
    else:
        from backports.zstd import DecompressionParameter, ZstdDecompressor
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: WINDOW_LOG})


def _zstd_error() -> type[Exception]:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdError
    else:
        from backports.zstd import ZstdError
    return ZstdError


def digest_of(path: Path) -> str:
    """The SHA-256 of a file; for a thread."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

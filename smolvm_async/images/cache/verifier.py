"""Verify a file while it is being downloaded, and decompress it if it is compressed."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from smolvm_async.images.manifest import ImageFile

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE = 256 << 10  # bytes
WINDOW_LOG = 23  # 8 MiB, enough for zstd's levels up to 19; a larger window takes more memory
SLICE = 16 << 10  # bytes to decompress at a time; zstd copies the rest when a frame ends
HOLE = bytes(1 << 16)  # zeros; they are not written, so they take no space on the disk


class WrongContentError(Exception):
    """The file does not match its manifest, or cannot be used."""


class Verifier:
    """Reads a growing file from the front to compute its digest; decompresses a compressed file.

    Every method runs in a thread.

    Attributes:
        at: Number of bytes read so far.
        abandoned: Set by the caller, from another thread, to make `read_to()` return early.

    Args:
        path: The file.
        expected: The file's entry in the manifest.
        content: The file to write the decompressed content to.
    """

    def __init__(self, path: Path, expected: ImageFile, content: Path, uri: str) -> None:
        self.at = 0
        self.abandoned = False
        self._expected = expected
        self._uri = uri
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._digest = hashlib.sha256()
        self._content: _Decompression | None = None
        if expected.compression is not None:
            try:
                self._content = _Decompression(content, expected, uri)
            except BaseException:
                os.close(self._fd)
                raise

    def read_to(self, end: int) -> None:
        """Read the file up to byte `end`, and decompress a compressed file."""
        while self.at < end and not self.abandoned:
            piece = os.pread(self._fd, min(PIECE, end - self.at), self.at)
            if not piece:
                raise WrongContentError(
                    f"{self._uri} became shorter during the download: try again."
                )
            self._digest.update(piece)
            self.at += len(piece)
            if self._content is not None:
                self._decompress(self._content, piece)

    def _decompress(self, content: _Decompression, piece: bytes) -> None:
        for start in range(0, len(piece), SLICE):
            if not self.abandoned:
                content.add(piece[start : start + SLICE])

    def check(self) -> None:
        """Compare the digests, and the content's size, after the last byte was read.

        Raises:
            WrongContentError: If a digest or a size is wrong; the message names both values.
        """
        _compare(self._uri, self._expected.sha256, self._digest.hexdigest())
        if self._content is not None:
            self._content.check()

    def close(self) -> None:
        """Close the files."""
        os.close(self._fd)
        if self._content is not None:
            self._content.close()


class _Decompression:
    """Decompresses a file into another file, and checks the content."""

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
        except zstd.ZstdError as error:
            raise WrongContentError(
                f"{self._uri} cannot be decompressed: {error}. Windows of more than 8 MiB (zstd "
                "--long, or a level above 19) are not supported: publish the image again."
            ) from error

    def _decompress(self, piece: bytes) -> None:
        while True:
            if self._decompressor.eof:  # the frame has ended; another frame may follow
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
                f"The decompressed content of {self._uri} has more than {self._size} bytes, its "
                "size in the manifest: publish the image again."
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
                f"{self._uri} is cut off inside a compressed frame: publish the image again."
            )
        subject = f"The decompressed content of {self._uri}"
        _compare(subject, self._sha256, self._digest.hexdigest())
        if self._written != self._size:
            raise WrongContentError(
                f"{subject} has {self._written} bytes, but the manifest says {self._size}: "
                "publish the image again."
            )
        os.ftruncate(self._fd, self._size)  # the content may end in zeros, which were not written

    def close(self) -> None:
        os.close(self._fd)


def _compare(subject: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise WrongContentError(
            f"{subject} has the SHA-256 {actual}, but the manifest says {expected}: the download "
            "is damaged, or the file was replaced but its manifest was not. The download was "
            "removed: try again, or publish the image again."
        )


def _decompressor() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})

"""Download one S3 object into one file, in parallel parts; resume a part where it broke off.

A download works as follows:

1. `begin()` asks the server for size and ETag. It creates a sparse file of that size, or uses the
   journal of an earlier process to resume its partial file (see `partial_file`).
2. `transfer()` cuts the missing ranges into parts of 8 to 64 MiB. Eight workers each take the next
   part and stream it to its place in the file in pieces of 384 KiB. So a larger object does not
   need more memory.
3. The `PartialFile` notes each piece. It writes its journal to the disk twice a second, and at the
   end. So a process that is killed or gives up loses half a second of work.
4. The client library retries a request until its answer begins. If the answer breaks off later, the
   worker repeats the request from the first missing byte. The worker retries up to 5 failures in a
   row without a byte between them; after 120 s without a byte, the next failure is the last.
5. Every request sends the ETag (If-Match), so that parts of two versions of an object never mix.
6. Meanwhile, `images.cache.fetching` reads the file from the front up to the first gap, computes
   the digest, and decompresses. When the last byte arrives, little is left to verify.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from contextlib import closing, suppress
from operator import methodcaller
from pathlib import Path
from typing import Any

import anyio

from smolvm_async.config.uri import Location
from smolvm_async.errors import HostError, ImageError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import Slots, acquired, first_of, settle
from smolvm_async.images.kinds import words
from smolvm_async.images.s3.client import CONNECTIONS, READ_TIMEOUT
from smolvm_async.images.s3.errors import explain, is_temporary
from smolvm_async.images.s3.partial_file import PartialFile
from smolvm_async.images.sample import HEAD

logger = get_logger(__name__)

SMALLEST_PART, LARGEST_PART = 8 << 20, 64 << 20  # bytes
PIECE = 384 << 10  # bytes that a worker collects before it writes them
PATIENCE = 5  # failures in a row, without a byte between them, that a worker retries
BACKOFF, MAX_BACKOFF = 0.2, 5.0  # seconds; each retry doubles the delay, up to the maximum
SILENCE = 120.0  # seconds without a byte; after this time, the next failure is not retried


class BrokenAnswerError(Exception):
    """An answer broke off or cannot be used; the request is repeated."""


class Part:
    """A range of bytes of the object; `at` is the first byte that has not arrived."""

    def __init__(self, start: int, end: int) -> None:
        self.at = start
        self.end = end


# All downloads of an event loop share these connections, since each connection needs a buffer, and
# all of them write to the same disk.
_slots = Slots(CONNECTIONS)


class Download:
    """The download of one object into one partial file.

    Args:
        size: The size that the object must have, in bytes; `None` if only the server knows it.
        largest: The largest size that the object may have, in bytes.
    """

    def __init__(
        self, client: Any, place: Location, size: int | None, largest: int, partial: PartialFile
    ) -> None:
        self._client = client
        self._where = {"Bucket": place.bucket, "Key": place.key}
        self._uri = place.uri
        self._size, self._largest = size, largest
        self._partial = partial

    async def begin(self, *, extra_space: int = 0) -> None:
        """Ask for the object's size and ETag, and create or resume the file.

        Args:
            extra_space: Free bytes that the disk must have in addition to the object's size.
        """
        await self._partial.begin(*await self._size_and_etag())
        needed = sum(end - start for start, end in self._partial.missing) + extra_space
        _check_space(self._partial.path, self._uri, needed)

    async def transfer(self) -> None:
        """Download the missing ranges, after `begin()`. A failure does not remove any bytes."""
        partial = self._partial
        step = max(SMALLEST_PART, min(LARGEST_PART, partial.size // (2 * CONNECTIONS)))
        parts = deque(
            Part(at, min(at + step, end))
            for start, end in partial.missing
            for at in range(start, end, step)
        )
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(partial.keep_saving)
                async with anyio.create_task_group() as workers:
                    for _ in range(min(CONNECTIONS, len(parts))):
                        workers.start_soon(self._work, parts)
                        await asyncio.sleep(0)  # signing all requests at once would block the loop
                group.cancel_scope.cancel()
        except* Exception as errors:
            raise first_of(errors) from None
        finally:
            await settle(self._save())

    async def _save(self) -> None:
        try:
            await self._partial.save()
        except OSError as error:  # the disk is full: the next try repeats some of the download
            logger.warning("the journal of %s could not be written: %s", self._partial.path, error)

    async def _size_and_etag(self) -> tuple[int, str]:
        client = self._client
        try:
            try:
                head = await client.head_object(**self._where)
            except client.exceptions.ClientError:
                # The reason is in the body of an error; an error for a HEAD request has no body.
                answer = await client.get_object(**self._where, Range="bytes=0-0")
                answer["Body"].close()
                raise
            size, etag = int(head["ContentLength"]), str(head.get("ETag", ""))
        except Exception as error:
            raise explain(error, self._uri) from error
        if self._size is not None and size != self._size:
            raise ImageError(
                f"{self._uri} has {size} bytes, but its manifest says {self._size}: the file was "
                f"changed or cut off after it was published{await self._other_kind()}; publish the "
                "image again."
            )
        if not 0 < size <= self._largest:
            raise ImageError(
                f"{self._uri} has {size} bytes; only 1 to {self._largest} are supported: publish "
                "another file."
            )
        return size, etag

    async def _other_kind(self) -> str:
        """Return what the object is by its first bytes, for a message; empty if that is unknown."""
        with suppress(Exception):  # the message is complete without it
            answer = await self._client.get_object(**self._where, Range=f"bytes=0-{HEAD - 1}")
            with closing(answer["Body"]) as body:
                if kind := words(await _read(body), "qcow2"):
                    return f" (it is now {kind})"
        return ""

    async def _work(self, parts: deque[Part]) -> None:
        import aiofiles

        opening = aiofiles.open(self._partial.path, "r+b", buffering=0)
        async with acquired(opening, methodcaller("close")) as file:
            while parts:
                part = parts.popleft()
                await file.seek(part.at)
                await self._download(part, file)

    async def _download(self, part: Part, file: Any) -> None:
        """Download a part; repeat the request from the first missing byte if an answer fails."""
        uri = self._uri
        failures, since = 0, time.monotonic()
        while part.at < part.end:
            before = part.at
            try:
                async with _slots.of_this_loop():
                    await self._stream(part, file)
            except BrokenAnswerError as error:
                if part.at > before:
                    failures, since = 0, time.monotonic()
                failures += 1
                if failures > PATIENCE or time.monotonic() - since > SILENCE:
                    raise ImageError(
                        f"{uri}: the download failed {failures} times in a row, over "
                        f"{time.monotonic() - since:.0f} s ({error}). Check the network, and try "
                        "again: the download resumes where it stopped."
                    ) from error
                logger.info("%s: retrying from byte %d: %s", uri, part.at, error)
                longest = min(MAX_BACKOFF, BACKOFF * 2 ** (failures - 1))
                await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    async def _stream(self, part: Part, file: Any) -> None:
        """Request a part, and write it in pieces; after a failure, keep the bytes that arrived."""
        body = await self._request(part)
        held = bytearray()
        try:
            while (left := part.end - part.at - len(held)) > 0:
                data = await _read(body)
                if not data:
                    raise BrokenAnswerError(f"the answer ended {left} bytes too early")
                held += data[:left]
                if len(held) >= PIECE or len(data) >= left:
                    await self._write(part, file, held)
                    held = bytearray()
        except BrokenAnswerError:
            if held:
                await self._write(part, file, held)
            raise
        finally:
            body.close()  # if bytes are missing, this also closes the connection

    async def _write(self, part: Part, file: Any, data: bytearray) -> None:
        view = memoryview(data)
        while view:  # write() may write only a part of the data
            view = view[await settle(file.write(view)) :]
        self._partial.add(part.at, part.at + len(data))
        part.at += len(data)

    async def _request(self, part: Part) -> Any:
        """Request a part, and return the body of the answer."""
        options = {"IfMatch": self._partial.etag} if self._partial.etag else {}
        span = f"bytes={part.at}-{part.end - 1}"
        try:
            answer = await self._client.get_object(**self._where, Range=span, **options)
        except Exception as error:
            explained = explain(error, self._uri)
            if is_temporary(error):
                raise BrokenAnswerError(str(explained)) from error
            raise explained from error
        try:
            self._check_answer(answer, part)
        except BaseException:
            answer["Body"].close()
            raise
        return answer["Body"]

    def _check_answer(self, answer: Any, part: Part) -> None:
        uri, size, etag = self._uri, self._partial.size, self._partial.etag
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        if status != 206 and (part.at, part.end) != (0, size):
            raise ImageError(
                f"{uri}: the server ignores Range requests (status {status}, not 206): use a "
                "server that supports them."
            )
        if answer.get("ETag", etag) != etag:
            raise ImageError(f"{uri} was changed during the download: try again.")
        span = f"bytes {part.at}-{part.end - 1}/{size}"
        got, length = answer.get("ContentRange", span), answer.get("ContentLength")
        if got != span or length not in (None, part.end - part.at):
            raise BrokenAnswerError(f"the server sent {got} ({length} bytes) instead of {span}")


async def _read(body: Any) -> bytes:
    try:
        async with asyncio.timeout(READ_TIMEOUT + 5):  # aiohttp hangs after a malformed chunk
            data: bytes = await body.read(PIECE)
    except Exception as error:
        raise BrokenAnswerError(f"{type(error).__name__}: {error}") from error
    return data


def _check_space(path: Path, uri: str, needed: int) -> None:
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise HostError(
            f"{uri} does not fit into {str(path.parent)!r}: it needs {needed} bytes, and {free} "
            "are free.",
            hint="Free some space (smolvm-async image prune), or set SMOLVM_IMAGE_DIR to a "
            "directory on another disk.",
            missing=("disk space",),
        )

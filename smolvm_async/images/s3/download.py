"""One object → one file: parts in parallel, each from where it broke off.

A worker streams one part at a time through a buffer of bounded size. The client library retries
what has not begun; what breaks off in the middle is asked for again here, from there on.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

import anyio

from smolvm_async.errors import HostError, ImageError
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import Slots, acquired, first_of, settle
from smolvm_async.images.s3.client import CONNECTIONS, READ_TIMEOUT
from smolvm_async.images.s3.errors import explained, is_passing
from smolvm_async.images.s3.partial_file import Arrival

logger = get_logger(__name__)

SMALLEST_PART, LARGEST_PART = 8 << 20, 64 << 20  # bytes
PIECE = 384 << 10  # bytes that a worker holds before they are written
PATIENCE = 5  # failures in a row, without a byte between them, that a part survives
BACKOFF, MAX_BACKOFF = 0.2, 5.0  # seconds after the first of them, doubled each time
SILENCE = 120.0  # seconds without a byte of a part, however many failures they had


class BrokenAnswerError(Exception):
    """An answer that cannot be used, or breaks off: the object is asked for again."""


class RemoteFile(NamedTuple):
    """An object.

    Attributes:
        bucket: Its bucket.
        key: Its key.
        uri: Both, for messages.
        size: Bytes that it has to have; `None` if only the server knows.
        largest: Bytes that it may have.
    """

    bucket: str
    key: str
    uri: str
    size: int | None
    largest: int


class Part:
    """A range of bytes of the object; `at` moves on as they arrive."""

    def __init__(self, start: int, end: int) -> None:
        self.at = start
        self.end = end


# All downloads of a loop share so many connections: each has a buffer, and one disk writes.
_slots = Slots(CONNECTIONS)


async def begin(client: Any, remote: RemoteFile, arrival: Arrival, *, besides: int = 0) -> None:
    """Look at the object, and make the file.

    Args:
        besides: Bytes that the disk has to have room for, besides the object's.

    Raises:
        ImageError: If there is no such object, or it is not what the manifest says.
        HostError: If it does not fit on the disk.
        OSError: If the file cannot be made.
    """
    size, etag = await _look(client, remote)
    await arrival.begin(size, etag)
    needed = sum(end - start for start, end in arrival.missing) + besides
    _check_space(arrival.path, remote.uri, needed)


async def transfer(client: Any, remote: RemoteFile, arrival: Arrival) -> None:
    """Download what is missing of an object, after `begin()`.

    Raises:
        ImageError: If it cannot be had; what has arrived stays, for another try.
        OSError: If it cannot be written.
    """
    step = max(SMALLEST_PART, min(LARGEST_PART, arrival.size // (2 * CONNECTIONS)))
    parts = deque(
        Part(at, min(at + step, end))
        for start, end in arrival.missing
        for at in range(start, end, step)
    )
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(arrival.keep_saving)
            async with anyio.create_task_group() as workers:
                for _ in range(min(CONNECTIONS, len(parts))):
                    workers.start_soon(_work, client, remote, arrival, parts)
                    await asyncio.sleep(0)  # to sign all requests in one go would be too long
            group.cancel_scope.cancel()
    except* Exception as errors:
        raise first_of(errors) from None
    finally:
        await settle(_save(arrival))


async def _save(arrival: Arrival) -> None:
    try:
        await arrival.save()
    except OSError as error:  # a full disk: the next try asks for more than it would have to
        logger.warning("what has arrived of %s could not be noted: %s", arrival.path, error)


async def _look(client: Any, remote: RemoteFile) -> tuple[int, str]:
    """The object's size and ETag.

    Raises:
        ImageError: If there is none, or it is not what the manifest says.
    """
    where = {"Bucket": remote.bucket, "Key": remote.key}
    try:
        try:
            head = await client.head_object(**where)
        except client.exceptions.ClientError:
            # Such an answer has no body that says why. One that has:
            answer = await client.get_object(**where, Range="bytes=0-0")
            answer["Body"].close()
            raise
        size, etag = int(head["ContentLength"]), str(head.get("ETag", ""))
    except Exception as error:
        raise explained(error, remote.uri) from error
    if remote.size is not None and size != remote.size:
        raise ImageError(
            f"{remote.uri} has {size} bytes, and its manifest says {remote.size}: it was changed "
            "or cut off since; publish it again."
        )
    if not 0 < size <= remote.largest:
        raise ImageError(f"{remote.uri} has {size} bytes: from 1 to {remote.largest} can be used.")
    return size, etag


def _check_space(path: Path, uri: str, needed: int) -> None:
    status = os.statvfs(path.parent)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise HostError(
            f"{uri} does not fit into {str(path.parent)!r}: {needed} bytes are needed, and {free} "
            "are free. Free some (smolvm-async image prune), or set SMOLVM_IMAGE_DIR to another "
            "disk."
        )


async def _work(client: Any, remote: RemoteFile, arrival: Arrival, parts: deque[Part]) -> None:
    import aiofiles

    opening = aiofiles.open(arrival.path, "r+b", buffering=0)
    async with acquired(opening, methodcaller("close")) as file:
        while parts:
            part = parts.popleft()
            await file.seek(part.at)
            await _insist(client, remote, arrival, part, file)


async def _insist(client: Any, remote: RemoteFile, arrival: Arrival, part: Part, file: Any) -> None:
    """Stream a part, and again from where it broke off."""
    failures, since = 0, time.monotonic()
    while part.at < part.end:
        before = part.at
        try:
            async with _slots.of_this_loop():
                await _stream(client, remote, arrival, part, file)
        except BrokenAnswerError as error:
            if part.at > before:
                failures, since = 0, time.monotonic()
            failures += 1
            if failures > PATIENCE or time.monotonic() - since > SILENCE:
                raise ImageError(
                    f"{remote.uri}: its download broke off {failures} times in a row, over "
                    f"{time.monotonic() - since:.0f} s ({error}). What has arrived is kept, and "
                    "the next try goes on there."
                ) from error
            logger.info("%s, again from byte %d on: %s", remote.uri, part.at, error)
            await asyncio.sleep(_backoff(failures))


def _backoff(failures: int) -> float:
    longest: float = min(MAX_BACKOFF, BACKOFF * 2 ** (failures - 1))
    return longest * random.uniform(0.5, 1.0)


async def _stream(client: Any, remote: RemoteFile, arrival: Arrival, part: Part, file: Any) -> None:
    """Write what comes of a part, in pieces; what had come before a failure counts."""
    async with aclosing(_pieces(client, remote, arrival, part)) as pieces:
        async for piece in pieces:
            view = memoryview(piece)
            while view:  # the system may take less than all
                view = view[await settle(file.write(view)) :]
            arrival.add(part.at, part.at + len(piece))
            part.at += len(piece)


async def _pieces(
    client: Any, remote: RemoteFile, arrival: Arrival, part: Part
) -> AsyncGenerator[bytes]:
    """The bytes of a part as they come, some at a time.

    Raises:
        BrokenAnswerError: If they break off; whatever has come before was yielded.
        ImageError: If they cannot be had.
    """
    left = part.end - part.at
    held: list[bytes] = []
    failure: Exception | None = None
    amount = 0
    body = await _ask(client, remote, arrival, part)
    try:
        while left > 0 and (data := await _next(body)):
            data = data[:left]
            held.append(data)
            left, amount = left - len(data), amount + len(data)
            if amount >= PIECE or not left:
                yield b"".join(held)
                held, amount = [], 0
    except (BrokenAnswerError, ImageError, GeneratorExit):
        raise
    except Exception as error:
        failure = error
    finally:
        body.close()  # the connection goes with it, unless all has come
    if held:
        yield b"".join(held)
    if failure is not None:
        raise BrokenAnswerError(f"{type(failure).__name__}: {failure}") from failure
    if left:
        raise BrokenAnswerError(f"it ended {left} bytes before it had promised to")


async def _next(body: Any) -> bytes:
    async with asyncio.timeout(READ_TIMEOUT + 5):  # after a malformed chunk nothing else ends it
        data: bytes = await body.read(PIECE)
    return data


async def _ask(client: Any, remote: RemoteFile, arrival: Arrival, part: Part) -> Any:
    """Ask for a part; its body."""
    options = {"IfMatch": arrival.etag} if arrival.etag else {}
    span = f"bytes={part.at}-{part.end - 1}"
    try:
        answer = await client.get_object(
            Bucket=remote.bucket, Key=remote.key, Range=span, **options
        )
    except Exception as error:
        meant = explained(error, remote.uri)
        if is_passing(error):
            raise BrokenAnswerError(str(meant)) from error
        raise meant from error
    try:
        _check_answer(answer, remote, arrival, part)
    except BaseException:
        answer["Body"].close()
        raise
    return answer["Body"]


def _check_answer(answer: Any, remote: RemoteFile, arrival: Arrival, part: Part) -> None:
    whole = (part.at, part.end) == (0, arrival.size)
    if answer["ResponseMetadata"]["HTTPStatusCode"] != 206 and not whole:
        raise ImageError(
            f"{remote.uri}: the server sends all of it where a range was asked for (status "
            f"{answer['ResponseMetadata']['HTTPStatusCode']}, not 206): use one that knows Range."
        )
    if answer.get("ETag", arrival.etag) != arrival.etag:
        raise ImageError(f"{remote.uri} was changed while it was downloaded: try again.")
    span = f"bytes {part.at}-{part.end - 1}/{arrival.size}"
    got, length = answer.get("ContentRange", span), answer.get("ContentLength")
    if got != span or length not in (None, part.end - part.at):
        raise BrokenAnswerError(f"it announces {got} in {length} bytes, where {span} was asked for")

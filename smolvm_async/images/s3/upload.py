"""Upload a file as an S3 object, in parallel parts if it is large; never leave half an object."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio

from smolvm_async.config.uri import Location
from smolvm_async.foundation.log import get_logger
from smolvm_async.foundation.tasks import acquired, first_of, in_background
from smolvm_async.images.s3.errors import explain

logger = get_logger(__name__)

PART = 5 << 20  # bytes: S3's minimum; signing a larger part blocks the event loop too long
MAX_PARTS = 9_000  # S3 allows 10,000 parts for an upload
WORKERS = 4
DIGEST = "sha256"  # key of the metadata; an object with the same digest is not uploaded again


async def upload(
    client: Any, place: Location, fd: int, digest: str, on_bytes: Callable[[int], None]
) -> None:
    """Upload the open file `fd`, whose SHA-256 is `digest`, unless the object already has it.

    Args:
        on_bytes: Called with the number of bytes sent so far.
    """
    size = os.fstat(fd).st_size
    where = {"Bucket": place.bucket, "Key": place.key}
    try:
        if not await _exists(client, where, size, digest):
            metadata = {DIGEST: digest}
            if size <= PART:
                body = await in_background(os.pread, fd, size, 0)
                await client.put_object(**where, Body=body, Metadata=metadata)
            else:
                await _upload_parts(client, where, metadata, fd, size, on_bytes)
    except Exception as error:
        raise explain(error, place.uri) from error
    on_bytes(size)


async def _exists(client: Any, where: dict[str, str], size: int, digest: str) -> bool:
    try:
        head = await client.head_object(**where)
    except client.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500:
            raise
        return False  # the object is missing, or these credentials cannot read it: try to write it
    return bool(head["ContentLength"] == size and head.get("Metadata", {}).get(DIGEST) == digest)


async def _upload_parts(
    client: Any,
    where: dict[str, str],
    metadata: dict[str, str],
    fd: int,
    size: int,
    on_bytes: Callable[[int], None],
) -> None:
    step = max(PART, -(-size // MAX_PARTS))
    starts = deque(enumerate(range(0, size, step), 1))
    tags: dict[int, str] = {}
    sent = 0
    complete = False

    async def work(upload_id: dict[str, str]) -> None:
        nonlocal sent
        while starts:
            number, start = starts.popleft()
            body = await in_background(os.pread, fd, min(step, size - start), start)
            part = await client.upload_part(**where, **upload_id, PartNumber=number, Body=body)
            tags[number] = part["ETag"]
            sent += len(body)
            on_bytes(sent)

    async def abort(begun: dict[str, str]) -> None:
        # Otherwise the server keeps the parts, hides them, and charges for them.
        if not complete:
            try:
                await client.abort_multipart_upload(**where, UploadId=begun["UploadId"])
            except Exception as error:
                logger.warning("the upload to %s could not be aborted: %s", where, error)

    creating = client.create_multipart_upload(**where, Metadata=metadata)
    async with acquired(creating, abort) as begun:
        upload_id = {"UploadId": begun["UploadId"]}
        try:
            async with anyio.create_task_group() as workers:
                for _ in range(WORKERS):
                    workers.start_soon(work, upload_id)
        except* Exception as errors:
            raise first_of(errors) from None
        parts = [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]
        await client.complete_multipart_upload(
            **where, **upload_id, MultipartUpload={"Parts": parts}
        )
        complete = True

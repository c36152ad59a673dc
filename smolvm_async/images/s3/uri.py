"""`s3://bucket/prefix/` → a bucket, and the key of the manifest in it."""

from __future__ import annotations

import re
from typing import NamedTuple

from smolvm_async.config.checks import shown
from smolvm_async.config.vm_config import S3, is_published
from smolvm_async.errors import ImageError

MANIFEST = "smolvm-image.json"  # the name of the manifest under a prefix
MAX_KEY = 1024  # bytes of UTF-8, as S3 has it


class Location(NamedTuple):
    """Where a published image is.

    Attributes:
        bucket: Its bucket.
        key: The manifest's.
    """

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """The manifest's URI: one image has one, however it was written."""
        return f"{S3}{self.bucket}/{self.key}"

    def beside(self, name: str) -> str:
        """The key of a file of the image."""
        return f"{self.key.rpartition('/')[0]}/{name}".lstrip("/")


def parse_uri(uri: object, argument: str = "image") -> Location:
    """What an `s3://` URI means: a prefix with a manifest under it, or the manifest itself.

    Raises:
        ImageError: If it is malformed.
    """
    wanted = (
        f"pass s3://BUCKET/PREFIX/, under which there is a {MANIFEST}, or s3://BUCKET/NAME.json"
    )
    if not isinstance(uri, str) or not is_published(uri):
        raise ImageError(f"{argument}={shown(uri)} is no s3:// URI: {wanted}.")
    bucket, _, key = uri[len(S3) :].partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,253}[a-z0-9]", bucket):
        raise ImageError(
            f"{argument}={shown(uri)} names no bucket: they have 3 to 255 lower-case letters, "
            f"digits, dots, hyphens and underscores; {wanted}."
        )
    if not key.isprintable() or re.search(r"(^|/)\.{1,2}(/|$)|[?#]", key):
        raise ImageError(
            f"{argument}={shown(uri)} has '..', '?', '#' or control characters in its key: "
            f"{wanted}."
        )
    if not key.endswith(".json"):
        key = f"{key.rstrip('/')}/{MANIFEST}".lstrip("/")
    if len(key.encode()) > MAX_KEY:
        raise ImageError(f"{argument}={shown(uri)} is too long: a key has at most {MAX_KEY} bytes.")
    return Location(bucket, key)

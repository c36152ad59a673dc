"""Parse `s3://bucket/prefix/` into a bucket and the key of the manifest."""

from __future__ import annotations

import re
from typing import NamedTuple

from smolvm_async.config.checks import shown
from smolvm_async.errors import ImageError

S3 = "s3://"
MANIFEST = "smolvm-image.json"  # the name of the manifest under a prefix
MAX_KEY = 1024  # bytes of UTF-8; S3's limit


def is_published(image: str) -> bool:
    """Return whether `image=` is the URI of a published image."""
    return image[: len(S3)].lower() == S3


class Location(NamedTuple):
    """The place of a published image."""

    bucket: str
    key: str  # of the manifest

    @property
    def uri(self) -> str:
        """Return the URI of the manifest: the same for every spelling of the image's URI."""
        return f"{S3}{self.bucket}/{self.key}"

    def beside(self, name: str) -> str:
        """Return the key of a file of the image."""
        return f"{self.key.rpartition('/')[0]}/{name}".lstrip("/")


def parse_uri(uri: object, argument: str = "image") -> Location:
    """Parse an `s3://` URI: a prefix with a manifest under it, or the manifest itself."""
    expected = f"pass s3://BUCKET/PREFIX/, which contains a {MANIFEST}, or s3://BUCKET/NAME.json"
    if not isinstance(uri, str) or not is_published(uri):
        raise ImageError(f"{argument}={shown(uri)} is not an s3:// URI: {expected}.")
    bucket, _, key = uri[len(S3) :].partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,253}[a-z0-9]", bucket):
        raise ImageError(
            f"{argument}={shown(uri)} has no valid bucket name: 3 to 255 lower-case letters, "
            f"digits, dots, hyphens and underscores; {expected}."
        )
    if not key.isprintable() or re.search(r"(^|/)\.{1,2}(/|$)|[?#]", key):
        raise ImageError(
            f"{argument}={shown(uri)} has '..', '?', '#' or control characters in its key: "
            f"{expected}."
        )
    if not key.endswith(".json"):
        key = f"{key.rstrip('/')}/{MANIFEST}".lstrip("/")
    if len(key.encode()) > MAX_KEY:
        raise ImageError(
            f"{argument}={shown(uri)} is too long: use a key of at most {MAX_KEY} bytes."
        )
    return Location(bucket, key)

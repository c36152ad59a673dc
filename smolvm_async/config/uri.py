"""Parse `image=`: the path of a local file, a `file://` URI, or the `s3://` URI of a manifest."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from smolvm_async.config.checks import shown
from smolvm_async.errors import ImageError
from smolvm_async.foundation.paths import PathError, absolute, expand

S3 = "s3://"
MANIFEST = "smolvm-image.json"  # the name of the manifest under a prefix
MAX_KEY = 1024  # bytes of UTF-8; the limit of S3
SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*)://|(file):"
FILE_URI = r"file:(?://(?P<host>[^/]*))?(?P<path>.*)"


def is_published(image: str) -> bool:
    """Return whether `image=` is the URI of a published image."""
    return image[: len(S3)].lower() == S3


class Location(NamedTuple):
    """The location of an object in S3."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """Return the object's URI; all spellings of an image's URI give the same manifest URI."""
        return f"{S3}{self.bucket}/{self.key}"

    def beside(self, name: str) -> Location:
        """Return the location of another file of an image; `self` is the image's manifest."""
        return Location(self.bucket, f"{self.key.rpartition('/')[0]}/{name}".lstrip("/"))


def parse_uri(uri: object, argument: str = "image") -> Location:
    """Parse the `s3://` URI of a manifest, or of a prefix with a manifest under it."""
    expected = f"pass s3://BUCKET/PREFIX/, which contains a {MANIFEST}, or s3://BUCKET/NAME.json"
    if not isinstance(uri, str) or not is_published(uri):
        raise ImageError(f"{argument}={shown(uri)} is not an s3:// URI: {expected}.")
    bucket, _, key = uri[len(S3) :].partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,253}[a-z0-9]", bucket):
        raise ImageError(
            f"{argument}={shown(uri)} has an invalid bucket name (allowed: 3 to 255 lower-case "
            f"letters, digits, dots, hyphens and underscores): {expected}."
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


def local_path(image: str) -> Path:
    """Return the absolute path that `image` names.

    `image` is an absolute path, a relative path, a path that begins with `~`, or a `file://` URI.
    """
    match = re.match(SCHEME, image, re.IGNORECASE)
    if match is not None and (match[1] or match[2]).lower() != "file":
        raise ImageError(
            f"image={image!r}: {match[1]}:// images are not supported; "
            "download the qcow2 and pass its path."
        )
    try:
        text = expand(image) if match is None else _path_of_uri(image)
        path = absolute(text)
    except PathError as error:
        raise ImageError(
            f"image={image!r} {error}: pass the absolute path of a qcow2 file."
        ) from None
    if text.endswith("/"):
        raise ImageError(f"image={image!r} names a directory: pass the qcow2 file inside it.")
    return path


def _path_of_uri(image: str) -> str:
    parts = re.fullmatch(FILE_URI, image, re.IGNORECASE | re.DOTALL)
    assert parts is not None
    if (parts["host"] or "localhost").lower() != "localhost":
        raise ImageError(
            f"image={image!r} names the host {parts['host']!r}: only files on this machine can be "
            "used; write file:///absolute/path (three slashes)."
        )
    if bad := re.search(r"[?#\x00-\x1f\x7f]", image):
        raise ImageError(
            f"image={image!r}: '?' and '#' and control characters must be escaped in a URI; "
            f"write {bad[0]!r} as %{ord(bad[0]):02X}, or pass the plain path."
        )
    if re.search(r"%(?![0-9A-Fa-f]{2})", image):
        raise ImageError(
            f"image={image!r}: a '%' in a URI must be followed by two hex digits; "
            "write a literal '%' as %25, or pass the plain path."
        )
    if not parts["path"].startswith("/"):
        raise ImageError(
            f"image={image!r} has no absolute path: write file:///absolute/path (three slashes)."
        )
    try:
        return os.fsdecode(unquote_to_bytes(parts["path"]))
    except UnicodeEncodeError:
        return parts["path"]  # local_path() raises the error

"""Parse `image=` as the path of a local file: a plain path, or a `file://` URI."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from smolvm_async.errors import ImageError
from smolvm_async.foundation.paths import PathError, absolute, expand

SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*)://|(file):"
FILE_URI = r"file:(?://(?P<host>[^/]*))?(?P<path>.*)"


def local_path(image: str) -> Path:
    """Return the absolute path that `image` names.

    `image` is an absolute path, a relative path, one that begins with `~`, or a `file://` URI.
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
            f"image={image!r} names the host {parts['host']!r}: only files of this machine can be "
            "used; write file:///absolute/path (three slashes)."
        )
    if bad := re.search(r"[?#\x00-\x1f\x7f]", image):
        raise ImageError(
            f"image={image!r}: '?' and '#' and control characters must be escaped in a URI; "
            f"write {bad[0]!r} as %{ord(bad[0]):02X}, or pass the plain path."
        )
    if re.search(r"%(?![0-9A-Fa-f]{2})", image):
        raise ImageError(
            f"image={image!r}: a '%' in a URI is followed by two hex digits; "
            "write a literal one as %25, or pass the plain path."
        )
    if not parts["path"].startswith("/"):
        raise ImageError(
            f"image={image!r} has no absolute path: write file:///absolute/path (three slashes)."
        )
    try:
        return os.fsdecode(unquote_to_bytes(parts["path"]))
    except UnicodeEncodeError:
        return parts["path"]  # local_path() refuses it

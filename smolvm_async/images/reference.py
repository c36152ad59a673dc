"""What `image=` may say: a path, or a `file://` URI."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from smolvm_async.errors import ImageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(file):", re.IGNORECASE)


def local_path(image: str) -> Path:
    """The absolute path that `image` names: absolute, `~`, relative, or a `file://` URI.

    Raises:
        ImageError: If it is a URI of another kind, or a malformed one.
    """
    match = _SCHEME.match(image)
    if match is None:
        text = os.path.expanduser(image)
    elif (match[1] or match[2]).lower() == "file":
        text = _path_of_uri(image)
    else:
        raise ImageError(
            f"image={image!r}: {match[1]}:// images are not supported; "
            "download the qcow2 and pass its path."
        )
    if "\0" in text:
        raise ImageError(f"image={image!r} contains a NUL character; no file name can.")
    return Path(os.path.abspath(text))


def _path_of_uri(image: str) -> str:
    parts = urlsplit(image)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(
            f"image={image!r} names the host {parts.netloc!r}: only files of this machine can be "
            f"used; write file:///absolute/path (three slashes)."
        )
    if "?" in image or "#" in image:
        raise ImageError(
            f"image={image!r}: '?' and '#' have a meaning of their own in a URI; "
            "write them as %3F and %23, or pass the plain path."
        )
    if re.search(r"%(?![0-9A-Fa-f]{2})", image):
        raise ImageError(
            f"image={image!r}: a '%' in a URI is followed by two hex digits; "
            "write a literal one as %25, or pass the plain path."
        )
    text = os.fsdecode(unquote_to_bytes(parts.path))
    if not text.startswith("/"):
        raise ImageError(f"image={image!r}: a file:// URI holds an absolute path.")
    return text

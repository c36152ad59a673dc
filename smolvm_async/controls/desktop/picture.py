"""Screenshots as data: read them from QEMU or a file, convert and save them, without a VM.

Each function imports Pillow itself, so that only programs that take screenshots wait for Pillow. No
call here holds Python's global lock for long, so a thread beside an event loop can run every call.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from smolvm_async.config.checks import check_path, shown
from smolvm_async.errors import ConfigError, PictureError
from smolvm_async.foundation.files import replace_file

if TYPE_CHECKING:
    from PIL import Image

PNG_START = rb"(?s)\x89PNG\r\n\x1a\n.{4}IHDR(.{4})(.{4})"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PPM_HEADER = rb"P6\s+(\d{1,6})\s+(\d{1,6})\s+255\s"
PNG_LEVEL = 1  # zlib's level; level 6 takes 2 to 4 times as long, and saves a fifth of the bytes
CHANNELS = 3  # bytes per pixel

Reference: TypeAlias = "Screenshot | Image.Image | bytes | str | os.PathLike[str]"


@dataclass(frozen=True, eq=False, repr=False)
class Screenshot:
    """A picture of a screen. Two pictures are equal if their pixels are equal.

    `png` and `pixels` are computed on first use, unless the picture was made from them. Encoding a
    PNG takes about 100 ms: `await asyncio.to_thread(picture.save, path)` keeps the event loop free.

    Attributes:
        width: The width in pixels.
        height: The height in pixels.
        timestamp: The time of the picture, in seconds since the epoch; 0 if unknown.
        elapsed: The duration of the screenshot in seconds.
    """

    width: int
    height: int
    timestamp: float
    elapsed: float
    _forms: dict[str, bytes]

    @classmethod
    def from_png(cls, data: bytes, *, timestamp: float = 0.0, elapsed: float = 0.0) -> Screenshot:
        """Make a screenshot from a PNG; do not decode the PNG yet.

        Raises:
            PictureError: The data is not a PNG, or only the beginning of a PNG.
        """
        header = re.match(PNG_START, data)
        width, height = (int.from_bytes(size) for size in header.groups()) if header else (0, 0)
        if not width or not height:
            raise PictureError(
                f"The data is not a PNG; it begins with {data[:8]!r}: pass a whole PNG."
            )
        if not data.endswith(PNG_END):
            raise PictureError(
                f"This PNG of {width}x{height} pixels is cut off after {len(data)} bytes: "
                "pass the whole file."
            )
        return cls(width, height, timestamp, elapsed, {"png": data})

    @classmethod
    def from_ppm(cls, data: bytes, *, timestamp: float = 0.0, elapsed: float = 0.0) -> Screenshot:
        """Make a screenshot from the output of QEMU's `screendump`: a PPM (P6, up to 255).

        Raises:
            PictureError: The data is not such a PPM (comments are not allowed), or is cut off.
        """
        header = re.match(PPM_HEADER, data)
        width, height = map(int, header.groups()) if header else (0, 0)
        if header is None or not width or not height:
            raise PictureError(
                f"The data is not a PPM of the kind P6 with values up to 255; it begins with "
                f"{data[:16]!r}: pass the output of QEMU's screendump."
            )
        pixels = data[header.end() :]
        if len(pixels) != width * height * CHANNELS:
            raise PictureError(
                f"The PPM has {len(pixels)} bytes of pixels, but {width}x{height} pixels take "
                f"{width * height * CHANNELS}: pass the whole file, and nothing else."
            )
        return cls(width, height, timestamp, elapsed, {"pixels": pixels})

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def png(self) -> bytes:
        """The picture as a PNG."""
        if "png" not in self._forms:
            self._forms["png"] = _encode(self.image(), "PNG", compress_level=PNG_LEVEL)
        return self._forms["png"]

    @property
    def pixels(self) -> bytes:
        """Red, green and blue of each pixel, rows from top to bottom, without padding.

        Raises:
            PictureError: The PNG that the screenshot was made from is damaged.
        """
        if "pixels" not in self._forms:
            self._forms["pixels"] = _decode(self._forms["png"]).tobytes()
        return self._forms["pixels"]

    def image(self) -> Image.Image:
        """Return a new Pillow image of the screenshot; the caller may change it."""
        from PIL import Image

        return Image.frombytes("RGB", (self.width, self.height), self.pixels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the screenshot to a file: .png, .ppm, or the suffix of another Pillow format.

        The file is replaced as a whole: no reader ever sees half a picture.

        Raises:
            ConfigError: Pillow cannot write the format, or the file cannot be written.
        """
        file = check_path(path, "path", "a picture")
        content = self.png if file.suffix.lower() == ".png" else self._written(file)
        try:
            replace_file(file, content)
        except OSError as error:
            raise ConfigError(
                f"path={str(file)!r} cannot be written: {error.strerror}; pass the path of a file "
                "in a directory that exists, has space, and is writable for this user."
            ) from error

    def _written(self, file: Path) -> bytes:
        """Encode the picture in the format of the file's suffix."""
        from PIL import Image

        try:
            return _encode(self.image(), Image.registered_extensions()[file.suffix.lower()])
        except (KeyError, OSError, ValueError) as error:
            raise ConfigError(
                f"path={str(file)!r} ends in {file.suffix!r}, and Pillow cannot write this picture "
                "in such a format: pass a path that ends in .png or .ppm."
            ) from error

    def _repr_png_(self) -> bytes:
        """Return the PNG that a notebook shows."""
        return self.png

    def __repr__(self) -> str:
        size = f"{self.width}x{self.height}"
        return f"Screenshot({size}, timestamp={self.timestamp:.3f}, elapsed={self.elapsed:.3f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Screenshot):
            return NotImplemented
        return self.size == other.size and self.pixels == other.pixels

    def __hash__(self) -> int:
        return hash((self.size, self.pixels))


def load_picture(reference: Reference) -> Screenshot:
    """Load a picture to compare with. Transparent pixels keep their stored colour."""
    if isinstance(reference, Screenshot):
        return reference
    from PIL import Image

    try:
        loaded = reference if isinstance(reference, bytes | Image.Image) else _read(reference)
        image = _decode(loaded)
    except PictureError as error:
        raise PictureError(f"like={shown(reference)} is wrong: {error}") from error
    return Screenshot(*image.size, 0.0, 0.0, {"pixels": image.tobytes()})


def _read(path: object) -> bytes:
    file = check_path(path, "like", "a picture, or the picture itself")
    try:
        reason = "is not a file" if not file.is_file() else ""  # reading a FIFO could block forever
        if not reason:
            return file.read_bytes()
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise ConfigError(f"like={str(file)!r} {reason}: check the path.")


def _decode(source: bytes | Image.Image) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(BytesIO(source)) if isinstance(source, bytes) else source
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise PictureError("The data is not a picture that Pillow knows: pass a PNG.") from None
    except Exception as error:  # each of Pillow's decoders raises its own errors
        raise PictureError(f"The picture cannot be read ({error}): make it again.") from error


def _encode(image: Image.Image, format_name: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()

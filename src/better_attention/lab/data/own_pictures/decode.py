"""One picture file as an array of pixels: upright, square, of one size, whatever the file says of itself."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from better_attention.lab.data.archives import MIB
from better_attention.lab.data.samples import DataError, UInt8

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif")
"""How the name of a picture ends, in small or capital letters."""

UNREAD = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".tif", ".tiff", ".svg", ".ico", ".tga", ".psd"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
)
"""Pictures of kinds that are not read: they are counted, so that a set does not shrink in silence."""

FILE_LIMIT = 256 * MIB
PIXEL_LIMIT = 1 << 27
"""134 million: the largest telephone cameras stay below; a few bytes that promise more are made to fill memory."""

_LARGE = 1 << 24
"""Pixels above which one picture at a time is decoded, however many threads there are: each takes some 16 bytes."""
_one_large = threading.Lock()

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""The formats that are decoded: by Pillow itself, from pixels. Others start programs (EPS), or load what they name."""
_GREY = ("1", "L", "LA", "La")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the picture upright."""
_ORIENTATION = 0x0112

_DAMAGE = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)
"""What Pillow's readers raise of damaged files."""


def read_picture(name: str, source: bytes | Path, size: int, channels: int) -> UInt8:
    """A JPEG, PNG, WebP, BMP or GIF (its first frame), as :func:`fit` makes it.

    Args:
        name: the picture's name, for messages.
        source: the file, or its contents.
        size: side of the result.
        channels: 1 (grey) or 3.

    Returns:
        uint8 ``(size, size)`` or ``(size, size, 3)``.

    Raises:
        DataError: no such picture, a damaged one, or one that is too large.
    """
    with _opened(name, source) as image:
        image.draft(image.mode, (2 * size, 2 * size))  # a JPEG can be decoded at an eighth of its size, in less time
        with _one_large if image.width * image.height > _LARGE else nullcontext():
            whole = image.copy()  # decodes it
            orientation = 1
            with suppress(Exception):  # whatever is wrong with its EXIF block, the picture is there
                orientation = image.getexif().get(_ORIENTATION, 1)
            return fit(whole, size, channels, orientation)


def sides(name: str, source: bytes | Path) -> tuple[int, int]:
    """Width and height of a picture file as it is stored, read from its header.

    Raises:
        DataError: no such picture.
    """
    with _opened(name, source) as image:
        return image.size


def is_grey(name: str, source: bytes | Path) -> bool:
    """Whether a picture file stores grey values, by its header; a palette counts as colour.

    Raises:
        DataError: no such picture.
    """
    with _opened(name, source) as image:
        return _has_grey_mode(image)


def fit(image: Image.Image, size: int, channels: int, orientation: int = 1) -> UInt8:
    """The middle square of a picture, scaled to ``size``, brought upright; transparent parts become white.

    Args:
        image: of any size and mode.
        size: side of the result; the shorter side of the picture is scaled to it.
        channels: 1 (grey) or 3.
        orientation: EXIF's number, 1 to 8; 1: upright.

    Returns:
        uint8 ``(size, size)`` or ``(size, size, 3)``.

    >>> fit(Image.new("RGB", (7, 5), (9, 8, 7)), size=3, channels=3)[2, 2].tolist()
    [9, 8, 7]
    """
    plain = _opaque(image).convert("L" if channels == 1 else "RGB")
    side = min(plain.size)
    left, top = (plain.width - side) / 2, (plain.height - side) / 2
    square = plain.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    turn = _TURNS.get(orientation)
    # Turned last, when the picture is small.
    return np.asarray(square if turn is None else square.transpose(turn))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Pillow's warnings about odd metadata to itself. Not safe to enter from several threads: enter it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, with a limit of our own
        yield


def _opaque(image: Image.Image) -> Image.Image:
    """The picture in 8 bits without transparency."""
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
        values = np.asarray(image)
        # Files that use 12 of the 16 bits come out nearly black, which a note on the data tells.
        plain = (values >> 8).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):  # the value that stands for no ink
            plain[values == clear] = 255
        return Image.fromarray(plain)
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white


def _has_grey_mode(image: Image.Image) -> bool:
    return image.mode in _GREY or image.mode.startswith("I")


@contextmanager
def _opened(name: str, source: bytes | Path) -> Iterator[Image.Image]:
    """Open a picture, and turn whatever goes wrong with it into an error that names it."""
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > FILE_LIMIT:
            raise DataError(f"{name} has {size:,} bytes; a picture may have {FILE_LIMIT:,}.")
        if size == 0:
            raise DataError(f"{name} is empty (0 bytes). Remove it, or put the picture there.")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            # From the header: nothing has been decoded yet.
            if image.width * image.height > PIXEL_LIMIT:
                raise DataError(
                    f"{name} has {image.width:,} × {image.height:,} pixels; at most {PIXEL_LIMIT:,} are decoded. "
                    "Scale it down."
                )
            yield image
    except DataError:
        raise
    # Pillow's own bound, which it looks at before it gives the picture out.
    except Image.DecompressionBombError:
        raise DataError(f"{name} has far more than {PIXEL_LIMIT:,} pixels. Scale it down.") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is no JPEG, PNG, WebP, BMP or GIF, or a damaged one. Remove it, or put a whole picture there."
        ) from None
    except _DAMAGE as error:
        raise DataError(
            f"{name} cannot be decoded ({error}): it is damaged or cut short. Remove it, or put a whole picture there."
        ) from None

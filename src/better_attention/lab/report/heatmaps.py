"""Small pictures of matrices, as PNG in data addresses: attention maps, alignment kernels, image inputs."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from PIL import Image

SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
LARGEST = 128
"""Matrices with more rows or columns than this are averaged down by blocks: a page shows no more."""


def data_uri(content: bytes, kind: str) -> Markup:
    """``content`` as an address that holds it; base64, so nothing in it needs escaping."""
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}")  # noqa: S704


def heat(matrix: NDArray[np.floating], *, top: float | None = None) -> bytes:
    """Values from 0 (dark) to ``top`` (bright; None: the greatest) as PNG, a pixel a value."""
    values = _shrunk(matrix)
    top = float(values.max(initial=0.0)) if top is None else top
    return _png(values / top if top > 0 else values, colormaps[SEQUENTIAL])


def diverging(matrix: NDArray[np.floating]) -> tuple[bytes, float]:
    """Values around zero as PNG, zero white, negative blue, positive red; and the value v of the scale -v ... v."""
    values = _shrunk(matrix)
    reach = float(np.abs(values).max(initial=0.0))
    return _png(values / (2 * reach) + 0.5 if reach > 0 else np.full_like(values, 0.5), colormaps[DIVERGING]), reach


def scale_bar(name: str) -> bytes:
    """The colours of a scale, left to right, as a PNG one pixel high."""
    return _png(np.linspace(0, 1, 64)[None], colormaps[name])


def photograph(picture: NDArray[np.uint8]) -> bytes:
    """An input image, (H, W) or (H, W, 3), as PNG."""
    return _encoded(Image.fromarray(np.ascontiguousarray(picture)))


def over_picture(received: NDArray[np.floating], picture: NDArray[np.uint8]) -> bytes | None:
    """How much attention each patch receives, as colour over the picture; None where no square grid of patches fits.

    Args:
        received: (S,), one value a patch, row by row; a class token in front of them is left out.
        picture: (H, W) or (H, W, 3).
    """
    side = math.isqrt(len(received))
    if side * side != len(received):
        received, side = received[1:], math.isqrt(len(received) - 1)
        if side * side != len(received) or side == 0:
            return None
    height, width = picture.shape[:2]
    if height < side or width < side:
        return None
    grid = _finite(received).reshape(side, side)
    # Each pixel takes the value of its patch, also where the sides of the picture are no multiples of the grid's.
    spread = grid[np.arange(height) * side // height][:, np.arange(width) * side // width]
    colour = colormaps[SEQUENTIAL](spread / spread.max() if spread.max() > 0 else spread)[..., :3]
    grey = (picture if picture.ndim == 2 else picture.mean(axis=2))[..., None] / 255
    return _encoded(Image.fromarray(np.uint8(255 * (0.7 * colour + 0.3 * grey))))


def _finite(values: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _shrunk(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    values = _finite(matrix)
    for axis in (0, 1):
        size = values.shape[axis]
        if size > LARGEST:
            starts = np.arange(LARGEST) * size // LARGEST
            sums = np.add.reduceat(values, starts, axis=axis)
            counts = np.diff(np.append(starts, size))
            values = sums / (counts[:, None] if axis == 0 else counts)
    return values


def _png(unit: NDArray[np.float64], colours: Colormap) -> bytes:
    """Values from 0 to 1 through a colour map; as a palette, which takes a third of the bytes."""
    # Converting to uint8 truncates; the added half makes it round.
    image = Image.fromarray(np.uint8(np.clip(unit, 0, 1) * 255 + 0.5), mode=None)
    image.putpalette((colours(np.arange(256), bytes=True)[:, :3]).tobytes())
    return _encoded(image)


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()

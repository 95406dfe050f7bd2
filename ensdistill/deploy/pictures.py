"""Single pictures as a data set of them is shown to a network in evaluation: the same decoder, cut and size.

A picture of the network's own size is shown whole, as in a data set whose pictures all have it. Any other goes the way
of those in a data set of many sizes: what a `.beton` would store of it (`read_stored`), by FFCV's decoder, its central
square, resized.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ensdistill.data.ffcv_guards import import_ffcv
from ensdistill.data.image_files import Stored, feed_decodes, image_size, read_rgb, read_stored
from ensdistill.data.prepare import stored_short_side
from ensdistill.runtime.errors import UserError


def read_picture(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Read a picture as uint8 (H, W, C), the `shape` that a network sees; colours are turned into grey where C is 1.

    Raises:
        UserError: not an image, damaged or truncated, or of another size where the network's images are not square.
    """
    H, W, C = shape
    assert C in (1, 3), shape
    size = image_size(path)
    if size == (H, W):
        pixels_HWC = read_rgb(path)
    elif H == W:
        pixels_HWC = _cut(path, H)
    else:
        raise UserError(
            f"{path}: {size[0]}x{size[1]} pixels; expected {H}x{W}, which the network takes: only squares are cut to"
        )
    if C == 3:
        return pixels_HWC
    return np.asarray(Image.fromarray(pixels_HWC).convert("L"))[..., None]


def _cut(path: Path, side: int) -> np.ndarray:
    """Show the centre of a picture as uint8 (side, side, 3)."""
    from ensdistill.data.feed import center_boxes  # loads numba, which takes a second

    stored = read_stored(path, max_short_side=stored_short_side(side))
    pixels_HWC = _decoded(stored, path)
    ((top, left, height, width),) = center_boxes(np.array([stored.height]), np.array([stored.width])).tolist()
    if (height, width) == (stored.height, stored.width) == (side, side):
        return pixels_HWC
    import_ffcv()
    from ffcv.libffcv import resize_crop

    shown_HWC = np.empty((side, side, 3), np.uint8)
    resize_crop(pixels_HWC, top, top + height, left, left + width, shown_HWC)
    return shown_HWC


def _decoded(stored: Stored, path: Path) -> np.ndarray:
    """Decode what a `.beton` stores to uint8 (H, W, 3)."""
    shape = stored.height, stored.width, 3
    data = np.frombuffer(stored.data, np.uint8)
    if not stored.is_jpeg:
        return data.reshape(shape)
    pixels_HWC = np.empty(shape, np.uint8)
    if not feed_decodes(data, pixels_HWC):
        raise UserError(f"{path}: FFCV's decoder cannot decode it; expected a whole image: replace or remove it")
    return pixels_HWC

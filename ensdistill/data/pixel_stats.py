"""Mean and standard deviation of each channel: known for the usual data sets, measured for others."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ensdistill.data.image_files import parallel_map, read_rgb
from ensdistill.data.sources.base import BetonRows, Split
from ensdistill.runtime.errors import UserError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KNOWN_STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5072, 0.4866, 0.4410), (0.2673, 0.2564, 0.2760)),
    "imagenet": _IMAGENET,
    "tiny-imagenet": _IMAGENET,
}
"""Mean and standard deviation of each channel by source name, of values in [0, 1], as the literature has them."""
MAX_MEASURED = 2_000
"""Number of image files, or images in a `.beton`, that are decoded for a measurement; of arrays all are used."""

Stats = tuple[tuple[float, ...], tuple[float, ...]]


def pixel_stats(name: str, train: Split, num_threads: int) -> Stats:
    """Return mean and standard deviation of each channel, of values in [0, 1].

    Measured ones count every pixel of all training images where they are an array, and of `MAX_MEASURED` images at
    equal distances otherwise.

    Raises:
        UserError: an image cannot be read, or a channel has one value everywhere.
    """
    if name in KNOWN_STATS:
        return KNOWN_STATS[name]
    mean, std = _measure(_train_images(train, num_threads))
    if min(std) == 0:
        raise UserError(
            f"{train.origin}: channel {std.index(0)} of the training images has one value everywhere; expected images"
        )
    return mean, std


def _train_images(train: Split, num_threads: int) -> Iterator[np.ndarray]:
    """Yield the images that are measured, in pieces uint8 (…, C)."""
    images = train.images
    if isinstance(images, np.ndarray):
        yield from (images[start : start + 4096] for start in range(0, len(images), 4096))
        return
    chosen = np.unique(np.linspace(0, len(train.labels) - 1, MAX_MEASURED).astype(np.int64))
    if isinstance(images, BetonRows):
        rows = chosen if images.indices is None else np.array(images.indices)[chosen]
        yield from read_beton_images(images.path, rows)
    else:
        yield from parallel_map(read_rgb, [images[i] for i in chosen], num_threads)


def _measure(pieces: Iterable[np.ndarray]) -> Stats:
    """Measure exactly, through the histogram of each channel's 256 values."""
    histogram: np.ndarray | int = 0
    for piece in pieces:
        histogram = histogram + np.stack(
            [np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(piece, -1, 0)]
        )
    assert isinstance(histogram, np.ndarray)
    share = histogram / histogram.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)
    return tuple(map(float, mean)), tuple(map(float, np.sqrt(variance)))


def read_beton_images(path: Path, rows: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield the images uint8 (H, W, C) of a few rows of a `.beton` that `read_index` has checked.

    Raises:
        UserError: a compressed image is damaged.
    """
    from ensdistill.data.beton_file import bytes_of_images, read_index  # loads numba, which takes a second

    index = read_index(path)
    stored = bytes_of_images(index)
    for row in rows:
        encoded = stored(row)
        if index.is_jpeg_N[row]:
            try:
                yield np.asarray(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(
                    f"{path}: image {row} is damaged ({error}); write the file again from its source"
                ) from error
        else:
            yield encoded.reshape(int(index.heights_N[row]), int(index.widths_N[row]), index.num_channels)

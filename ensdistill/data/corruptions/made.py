"""Twelve corruptions at five severities, made of the images of any data set.

The kinds and their strengths are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019: for images of up to 84 pixels a side the constants of CIFAR-10-C, else those
of ImageNet-C, lengths in pixels in proportion to the side (of images below 32 pixels they stay those of 32). The images
are ours: three kinds are left out (glass blur takes its pixels one by one, snow and frost are made of others' programs
and pictures), a Gaussian stands for the defocus, fog is drawn in the frequency domain. So a number measured on them is
compared with others measured on them, not with published ones: those are of CIFAR-10-C's own files (`stored`).

OpenCV blurs, resizes, warps and compresses. What is drawn hangs on (seed, corruption, severity, image) alone: one image
is the same in every batch, by any number of threads. Other versions of NumPy or OpenCV may round otherwise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.random import Generator

from ensdistill.data.feed import Batch, Feed
from ensdistill.data.image_files import parallel_map
from ensdistill.runtime.environment import usable_cores

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE, LARGE_SIDE = 32, 224
"""Sides in pixels of CIFAR-10-C's and ImageNet-C's images, of which the two columns of constants are."""
MIN_THREADED_SIDE = 96
"""Smaller images cost less than handing them to a thread."""

_Image = np.ndarray
"""float32 (H, W, C) in [0, 1]."""


class Corruption(NamedTuple):
    """One kind of corruption and its strengths."""

    corrupt: Callable[[_Image, Any, float, Generator], _Image]
    """(image, constants, pixels, draws) -> the corrupted image, not yet clipped; (H, W) where OpenCV drops a C of 1.

    `pixels`: see `pixels_of`.
    """
    small: tuple[Any, ...]
    """Constants of the five severities for images of 32 pixels, CIFAR-10-C's."""
    large: tuple[Any, ...]
    """Constants of the five severities for images of 224 pixels, ImageNet-C's."""


def constants_of(corruption: Corruption, side: int) -> tuple[Any, ...]:
    """Constants of the five severities for images of `side` pixels: of the table whose side is nearer in proportion."""
    return corruption.large if side * side > SMALL_SIDE * LARGE_SIDE else corruption.small


def pixels_of(side: int) -> float:
    """Factor of lengths in pixels for images of `side` pixels; 1 at the side of its table, and below 32."""
    return side / LARGE_SIDE if side * side > SMALL_SIDE * LARGE_SIDE else max(1.0, side / SMALL_SIDE)


def corrupt(image_HWC: np.ndarray, name: str, severity: int, *, index: int, seed: int = 0) -> np.ndarray:
    """Corrupt one image, uint8 (H, W, C) with C 1 or 3, and return it as uint8 (H, W, C).

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        index: number of the image in its split; with seed, name and severity it decides what is drawn.
    """
    corruption, side = CORRUPTIONS[name], min(image_HWC.shape[:2])
    draws = np.random.default_rng((seed, zlib.crc32(name.encode()), severity, index))
    x_HWC = image_HWC.astype(np.float32) / 255
    y_HWC = corruption.corrupt(x_HWC, constants_of(corruption, side)[severity - 1], pixels_of(side), draws)
    return np.rint(np.clip(y_HWC, 0, 1) * 255).astype(np.uint8).reshape(image_HWC.shape)


class MadeCorruptions:
    """The images of a feed, corrupted in each of the twelve ways."""

    extra: tuple[str, ...] = ()
    """Corruptions that are no part of the mean."""

    def __init__(self, feed: Feed, seed: int) -> None:
        self.feed, self.seed = feed, seed
        self.names = tuple(CORRUPTIONS)
        self.num_images = feed.num_images
        self.image_shape = feed.image_shape
        self.description = f"{len(self.names)} corruptions made here, seed {seed}"

    def batches(self, name: str, severity: int) -> Iterator[Batch]:
        """Corrupted batches in the feed's order: uint8 (B, H, W, C) and labels int64 (B,)."""
        threads = usable_cores() if min(self.image_shape[:2]) >= MIN_THREADED_SIDE else 1
        first = 0
        with self.feed.epoch(0) as batches:
            for images_BHWC, labels_B in batches:
                pairs = list(enumerate(images_BHWC.numpy(), start=first))
                one = partial(self._corrupt, name, severity)
                yield torch.from_numpy(np.stack(list(parallel_map(one, pairs, threads)))), labels_B
                first += len(pairs)

    def _corrupt(self, name: str, severity: int, pair: tuple[int, np.ndarray]) -> np.ndarray:
        index, image_HWC = pair
        return corrupt(image_HWC, name, severity, index=index, seed=self.seed)


def _gaussian_noise(x_HWC: _Image, std: float, pixels: float, draws: Generator) -> _Image:
    return x_HWC + draws.normal(scale=std, size=x_HWC.shape)


def _shot_noise(x_HWC: _Image, photons: float, pixels: float, draws: Generator) -> _Image:
    """Poisson noise of so many photons at full brightness."""
    return draws.poisson(x_HWC * photons) / photons


def _impulse_noise(x_HWC: _Image, share: float, pixels: float, draws: Generator) -> _Image:
    """A share of the values becomes 0 or 1, each as often."""
    drawn_HWC = draws.random(x_HWC.shape)
    return np.where(drawn_HWC < share / 2, 0.0, np.where(drawn_HWC < share, 1.0, x_HWC))


def _gaussian_blur(x_HWC: _Image, sigma: float, pixels: float, draws: Generator) -> _Image:
    return _blur(x_HWC, sigma * pixels)


def _motion_blur(x_HWC: _Image, constants: tuple[float, float], pixels: float, draws: Generator) -> _Image:
    """A trail to one side, as long as the radius, whose weights fall as a normal density; ± 45° from the horizontal."""
    radius, sigma = (length * pixels for length in constants)
    angle = math.radians(draws.uniform(-45, 45))
    middle = math.ceil(radius)
    kernel = np.zeros((2 * middle + 2, 2 * middle + 2), np.float32)  # one more for the neighbour of the last point
    for t in np.linspace(0, radius, 4 * middle + 1):
        row, column = middle + t * math.sin(angle), middle + t * math.cos(angle)
        top, left = math.floor(row), math.floor(column)
        down, right = row - top, column - left  # shared out among the four pixels around
        weight = math.exp(-(t**2) / (2 * sigma**2))
        kernel[top : top + 2, left : left + 2] += weight * np.outer((1 - down, down), (1 - right, right))
    return cv2.filter2D(x_HWC, -1, kernel[:-1, :-1] / kernel[:-1, :-1].sum(), borderType=cv2.BORDER_REFLECT_101)


def _zoom_blur(x_HWC: _Image, largest: float, pixels: float, draws: Generator) -> _Image:
    """The mean of the image and of itself enlarged about its centre by 1.00, 1.01, …, `largest`."""
    height, width = x_HWC.shape[:2]
    factors = 1 + 0.01 * np.arange(round((largest - 1) * 100) + 1)
    total = x_HWC.astype(np.float64)
    for factor in factors:
        about = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 0, factor)
        enlarged = cv2.warpAffine(x_HWC, about, (width, height), borderMode=cv2.BORDER_REFLECT_101)
        total += enlarged.reshape(x_HWC.shape)
    return total / (len(factors) + 1)


def _fog(x_HWC: _Image, constants: tuple[float, float], pixels: float, draws: Generator) -> _Image:
    """Add a cloud, and darken what is then too bright.

    The cloud is noise whose amplitude falls by the square of the second constant an octave, as that of the original's
    plasma fractal does: in the frequency domain, of two dimensions, by f^−(1 + 2 log2 of it).
    """
    strength, decay = constants
    height, width = x_HWC.shape[:2]
    noise_HW = np.fft.rfft2(draws.normal(size=(height, width)))
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency_HW[0, 0] = 1  # the mean, which goes anyway
    cloud_HW = np.fft.irfft2(noise_HW * frequency_HW ** -(1 + 2 * math.log2(decay)), (height, width))
    cloud_HW -= cloud_HW.min()
    cloud_HW /= max(cloud_HW.max(), 1e-12)
    brightest = x_HWC.max()
    return (x_HWC + strength * cloud_HW[..., None]) * brightest / max(brightest + strength, 1e-12)


def _brightness(x_HWC: _Image, step: float, pixels: float, draws: Generator) -> _Image:
    """Add to the value of HSV, the largest channel; hue and saturation stay, so that all channels grow alike."""
    value_HW1 = x_HWC.max(axis=2, keepdims=True)
    brighter_HW1 = np.minimum(value_HW1 + step, 1)
    return np.where(value_HW1 > 0, x_HWC * (brighter_HW1 / np.maximum(value_HW1, 1e-12)), brighter_HW1)


def _contrast(x_HWC: _Image, share: float, pixels: float, draws: Generator) -> _Image:
    """Leave a share of the distance to each channel's mean."""
    mean_C = x_HWC.mean(axis=(0, 1), keepdims=True)
    return (x_HWC - mean_C) * share + mean_C


def _elastic_transform(x_HWC: _Image, constants: tuple[float, float, float], pixels: float, draws: Generator) -> _Image:
    """Move three points by up to the third constant and the image with them, then each pixel along a smooth field.

    The field is uniform noise, smoothed by the second constant, times the first: all three as shares of the side.
    """
    height, width = x_HWC.shape[:2]
    side = min(height, width)
    strength, smooth, shift = (share * side for share in constants)
    arm, middle = side // 3, np.array([width // 2, height // 2], np.float32)
    corners = middle + np.array([(arm, arm), (arm, -arm), (-arm, -arm)], np.float32)
    moved = corners + draws.uniform(-shift, shift, (3, 2)).astype(np.float32)
    field_HW2 = draws.uniform(-1, 1, (height, width, 2)).astype(np.float32)
    affine_23 = cv2.getAffineTransform(moved, corners).astype(np.float32)  # from a pixel to where it is taken from
    y_HW, x_HW = np.mgrid[:height, :width].astype(np.float32)
    from_HW2 = np.stack([x_HW, y_HW, np.ones_like(x_HW)], axis=2) @ affine_23.T + strength * _blur(field_HW2, smooth)
    map_x_HW, map_y_HW = np.ascontiguousarray(from_HW2.transpose(2, 0, 1))
    return cv2.remap(x_HWC, map_x_HW, map_y_HW, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def _pixelate(x_HWC: _Image, share: float, pixels: float, draws: Generator) -> _Image:
    """Shrink to a share of the side, by area, and enlarge again in blocks."""
    height, width = x_HWC.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    shrunk = cv2.resize(x_HWC, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_NEAREST)


def _jpeg_compression(x_HWC: _Image, quality: int, pixels: float, draws: Generator) -> _Image:
    pixels_HWC = np.rint(x_HWC[..., ::-1] * 255).astype(np.uint8)  # OpenCV takes blue first
    _, data = cv2.imencode(".jpg", pixels_HWC, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded_HWC = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    assert decoded_HWC is not None, "what OpenCV encoded it cannot decode"
    return decoded_HWC.reshape(x_HWC.shape)[..., ::-1].astype(np.float32) / 255


def _blur(x_HWC: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by a Gaussian, cut off at 4 sigma; of sigma 0 nothing."""
    if sigma == 0:
        return x_HWC
    side = 2 * math.ceil(4 * sigma) + 1
    return cv2.GaussianBlur(x_HWC, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": Corruption(_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    "motion_blur": Corruption(
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(_zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25), (1.10, 1.15, 1.20, 1.24, 1.28)),
    "fog": Corruption(
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": Corruption(_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""Kinds of corruption by name, in the order of the tables; constants from CIFAR-10-C and ImageNet-C.

CIFAR-10-C's of `gaussian_blur` are those of its own extra set; ImageNet-C's elastic shares are of 244 pixels there.
"""

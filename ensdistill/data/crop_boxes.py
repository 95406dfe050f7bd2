"""Which part of each image is shown: boxes (top, left, height, width) in pixels, int64 (B, 4), for a batch at once.

Random boxes are a function of (seed, epoch, index of the image in its file) alone. They are drawn here and not inside
the compiled decoder, so that they can depend on no thread, no compiler option and no other draw.
"""

from __future__ import annotations

import math

import numpy as np

from ensdistill.kernels.philox import STREAM_RESIZED_CROP, below, philox

NUM_ATTEMPTS = 10
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3


def whole_boxes(heights_B: np.ndarray, widths_B: np.ndarray) -> np.ndarray:
    """The whole image."""
    zero_B = np.zeros_like(heights_B)
    return np.stack([zero_B, zero_B, heights_B, widths_B], axis=1)


def center_boxes(heights_B: np.ndarray, widths_B: np.ndarray, ratio: float) -> np.ndarray:
    """The central square whose side is `ratio` of the shorter side (224 / 256 is the usual evaluation crop)."""
    sides_B = np.maximum(np.rint(ratio * np.minimum(heights_B, widths_B)), 1).astype(np.int64)
    return _centered(heights_B, widths_B, sides_B, sides_B)


def random_boxes(
    heights_B: np.ndarray, widths_B: np.ndarray, *, indices_B: np.ndarray, seed: int, epoch: int, min_area: float
) -> np.ndarray:
    """Random-resized crops (Szegedy et al., "Going deeper with convolutions", CVPR 2015, as everyone trains ImageNet).

    Area uniform in [min_area, 1] of the image, aspect (width / height) log-uniform in [3/4, 4/3], position uniform; the
    first of ten attempts that fits, else the largest central box of an aspect in that range.
    """
    attempts = np.arange(NUM_ATTEMPTS, dtype=np.int64)
    words = philox(seed, indices_B[:, None], epoch, STREAM_RESIZED_CROP, attempts[None, :])
    area_BA, aspect_BA = ((word + 0.5) * 2.0**-32 for word in words[:2])  # middle of the word's bin, in (0, 1)
    area_BA = (min_area + (1 - min_area) * area_BA) * (heights_B * widths_B)[:, None]
    low, high = math.log(MIN_ASPECT), math.log(MAX_ASPECT)
    aspect_BA = np.exp(low + (high - low) * aspect_BA)
    h_BA = np.rint(np.sqrt(area_BA / aspect_BA)).astype(np.int64)
    w_BA = np.rint(np.sqrt(area_BA * aspect_BA)).astype(np.int64)
    fits_BA = (h_BA > 0) & (h_BA <= heights_B[:, None]) & (w_BA > 0) & (w_BA <= widths_B[:, None])

    rows, first_B = np.arange(len(indices_B)), fits_BA.argmax(axis=1)
    h_B, w_B = h_BA[rows, first_B], w_BA[rows, first_B]
    top_B = below(words[2][rows, first_B], np.maximum(heights_B - h_B, 0) + 1)
    left_B = below(words[3][rows, first_B], np.maximum(widths_B - w_B, 0) + 1)
    boxes_B4 = np.stack([top_B, left_B, h_B, w_B], axis=1)

    fallback_h_B = np.minimum(heights_B, np.rint(widths_B / MIN_ASPECT)).astype(np.int64)
    fallback_w_B = np.minimum(widths_B, np.rint(heights_B * MAX_ASPECT)).astype(np.int64)
    fallback_B4 = _centered(heights_B, widths_B, fallback_h_B, fallback_w_B)
    return np.where(fits_BA.any(axis=1)[:, None], boxes_B4, fallback_B4)


def _centered(heights_B: np.ndarray, widths_B: np.ndarray, h_B: np.ndarray, w_B: np.ndarray) -> np.ndarray:
    return np.stack([(heights_B - h_B) // 2, (widths_B - w_B) // 2, h_B, w_B], axis=1)

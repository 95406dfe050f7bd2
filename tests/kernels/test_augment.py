"""Zero-padded crops and flips against NumPy, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensdistill.kernels.augment import augment
from ensdistill.kernels.philox import STREAM_CROP_FLIP, below, philox


def by_hand(image_HWC: np.ndarray, row: int, *, seed: int, step: int, pad: int, flip: bool) -> np.ndarray:
    H, W, _ = image_HWC.shape
    y, x, f, _ = philox(seed, row, step, STREAM_CROP_FLIP)
    top, left = below(y, 2 * pad + 1), below(x, 2 * pad + 1)
    crop = np.pad(image_HWC, ((pad, pad), (pad, pad), (0, 0)))[top : top + H, left : left + W]
    return (crop[:, ::-1] if flip and f >> 31 else crop).astype(np.float32) / np.float32(255)


@pytest.mark.parametrize(
    ("shape", "pad", "flip"), [((17, 7, 5, 3), 2, True), ((9, 8, 8, 1), 1, False), ((6, 5, 5, 3), 0, True)]
)
def test_matches_padding_and_cropping_by_hand(shape, pad, flip):
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    y = augment(x, seed=11, step=5, first_row=100, pad=pad, flip=flip)
    for i in range(len(x)):
        np.testing.assert_array_equal(y[i].numpy(), by_hand(x[i].numpy(), 100 + i, seed=11, step=5, pad=pad, flip=flip))


def test_every_shift_and_both_flips_occur():
    x = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5, 1).repeat(600, 1, 1, 1)
    seen = {tuple(image.flatten().tolist()) for image in augment(x, seed=0, step=0, pad=1)}
    assert len(seen) == 3 * 3 * 2


def test_depends_on_the_global_row_not_on_the_batch():
    x = torch.randint(0, 256, (12, 6, 6, 3), dtype=torch.uint8)
    whole = augment(x, seed=1, step=2, pad=2)
    halves = torch.cat([augment(x[:6], seed=1, step=2, pad=2), augment(x[6:], seed=1, step=2, first_row=6, pad=2)])
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, augment(x, seed=1, step=3, pad=2))


def test_without_pad_or_flip_it_only_converts():
    x = torch.randint(0, 256, (3, 4, 4, 1), dtype=torch.uint8)
    assert torch.equal(augment(x, seed=1, step=2, pad=0, flip=False), x / 255)


def test_bad_arguments():
    x = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="x_BHWC: expected a uint8 tensor"):
        augment(x.float(), seed=0, step=0)
    with pytest.raises(ValueError, match="pad: expected 0 ≤ pad < 4"):
        augment(x, seed=0, step=0, pad=4)

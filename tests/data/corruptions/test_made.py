"""Corruptions made here: what each does to images of which it is known, and that a draw hangs on its key alone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch

from ensdistill.data.corruptions import made
from ensdistill.data.corruptions.made import CORRUPTIONS, SEVERITIES, MadeCorruptions, corrupt
from ensdistill.data.feed import Feed


def picture(height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A few blobs, uint8 (H, W, C): like a photograph, its neighbours are alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:height, :width]


def distance(image: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(image.astype(float) - other).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (100, 90, 3)], ids=str)
def test_images_keep_shape_and_type_and_are_changed(name: str, shape: tuple[int, int, int]) -> None:
    image = picture(*shape)
    before = image.copy()
    changed = [corrupt(image, name, severity, index=3) for severity in SEVERITIES]
    assert all(one.shape == shape and one.dtype == np.uint8 for one in changed)
    assert np.array_equal(image, before)
    assert distance(changed[4], image) > 0.2  # one level of 256 in five values


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in ("elastic_transform", "pixelate")])
def test_a_severer_corruption_changes_more(name: str) -> None:
    image = picture()
    mild, severe = (
        np.mean([distance(corrupt(image, name, severity, index=i), image) for i in range(6)]) for severity in (1, 5)
    )
    assert severe > 1.3 * mild


def test_draws_hang_on_seed_kind_severity_and_image_alone() -> None:
    image = picture()
    again = [corrupt(image, "gaussian_noise", 3, index=5, seed=2) for _ in range(2)]
    assert np.array_equal(*again)
    others: list[dict[str, Any]] = [{"index": 6}, {"seed": 3}, {"severity": 4}]
    for other in others:
        asked: dict[str, Any] = {"index": 5, "seed": 2, "severity": 3} | other
        severity = asked.pop("severity")
        assert not np.array_equal(corrupt(image, "gaussian_noise", severity, **asked), again[0])


class ListFeed:
    """Batches of known images, as a feed has them."""

    def __init__(self, images_NHWC: np.ndarray, batch_size: int) -> None:
        self.images_NHWC, self.batch_size = images_NHWC, batch_size
        self.num_images, self.image_shape = len(images_NHWC), images_NHWC.shape[1:]

    @contextmanager
    def epoch(self, epoch: int) -> Any:
        starts = range(0, self.num_images, self.batch_size)
        yield (
            (
                torch.from_numpy(self.images_NHWC[i : i + self.batch_size]),
                torch.arange(self.num_images)[i : i + self.batch_size],
            )
            for i in starts
        )


@pytest.mark.parametrize("side", [32, 96])  # 96: in threads
def test_batches_of_any_size_have_the_same_images(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "usable_cores", lambda: 3)
    images = np.stack([picture(side, side, seed=i) for i in range(5)])
    found = []
    for batch_size in (1, 2, 5):
        corrupted = MadeCorruptions(cast(Feed, ListFeed(images, batch_size)), seed=7)
        batches = list(corrupted.batches("shot_noise", 2))
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 3, 4]
        found.append(torch.cat([images_BHWC for images_BHWC, _ in batches]).numpy())
    expected = np.stack([corrupt(images[i], "shot_noise", 2, index=i, seed=7) for i in range(5)])
    assert all(np.array_equal(one, expected) for one in found)


def test_every_kind_has_five_constants_for_small_and_large_images() -> None:
    for name, corruption in CORRUPTIONS.items():
        assert len(corruption.small) == len(corruption.large) == len(SEVERITIES), name
    assert made.constants_of(CORRUPTIONS["gaussian_noise"], 84) == (0.04, 0.06, 0.08, 0.09, 0.10)
    assert made.constants_of(CORRUPTIONS["gaussian_noise"], 96) == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert [made.pixels_of(side) for side in (8, 32, 64, 224, 448)] == [1, 1, 2, 1, 2]


def test_noise_has_the_strength_that_is_stated() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    values = corrupt(grey, "gaussian_noise", 5, index=0) / 255
    assert values.std() == pytest.approx(0.10, rel=0.03) and values.mean() == pytest.approx(128 / 255, abs=0.005)
    values = corrupt(grey, "shot_noise", 5, index=0) / 255  # Poisson of 50 photons: variance x / 50
    assert values.var() == pytest.approx(128 / 255 / 50, rel=0.06)
    changed = corrupt(grey, "impulse_noise", 5, index=0)
    assert (changed == 0).mean() == pytest.approx(0.035, abs=0.006) == (changed == 255).mean()
    assert ((changed == 0) | (changed == 128) | (changed == 255)).all()


def test_blurs_and_compression_leave_a_plain_image() -> None:
    plain = np.full((32, 32, 3), (200, 90, 30), np.uint8)
    for name in ("gaussian_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast"):
        assert np.abs(corrupt(plain, name, 5, index=0).astype(int) - plain).max() <= 1, name
    assert np.abs(corrupt(plain, "jpeg_compression", 5, index=0).astype(int) - plain).max() <= 6  # red stays red


def test_a_blurred_point_is_the_kernel() -> None:
    point = np.zeros((33, 33, 1), np.uint8)
    point[16, 16] = 255
    blurred = corrupt(point, "gaussian_blur", 5, index=0)[..., 0].astype(float)
    y, x = np.mgrid[-16:17, -16:17]
    kernel = np.exp(-(x**2 + y**2) / (2 * (33 / 32) ** 2))  # sigma 1 pixel at 32 pixels
    assert np.abs(blurred - 255 * kernel / kernel.sum()).max() <= 0.51
    trail = corrupt(point, "motion_blur", 5, index=0)[..., 0].astype(float)
    assert trail.sum() == pytest.approx(255, rel=0.1)
    _, columns = np.nonzero(trail)
    assert columns.max() - columns.min() <= 10 and (columns.min() >= 15 or columns.max() <= 17)  # to one side


def test_brightness_keeps_the_hue() -> None:
    image = np.full((8, 8, 3), (100, 50, 25), np.uint8)
    brighter = corrupt(image, "brightness", 5, index=0)[0, 0].astype(float)
    assert brighter.tolist() == pytest.approx([100 + 76.5, (100 + 76.5) / 2, (100 + 76.5) / 4], abs=1)
    assert corrupt(np.zeros((8, 8, 3), np.uint8), "brightness", 5, index=0)[0, 0].tolist() == [76, 76, 76]


def test_contrast_is_about_each_channel_s_mean() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = (200, 100, 0)
    changed = corrupt(image, "contrast", 2, index=0)  # half of the distance is left
    assert changed[0, 0].tolist() == [150, 75, 0] and changed[7, 7].tolist() == [50, 25, 0]

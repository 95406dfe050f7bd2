"""Batches come in our order with the right pixels, whatever the workers, the cache and the start."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import (
    BATCH,
    SEED,
    Written,
    feed_of,
    random_resized,
    same,
    stored_regions,
    take,
    write,
)
from PIL import Image

from ensdistill.data import ffcv_guards
from ensdistill.data.beton_file import read_index
from ensdistill.data.feed import center_boxes, random_boxes
from ensdistill.kernels.philox import epoch_order
from ensdistill.runtime.errors import UserError


@pytest.mark.parametrize("cache", ["none", "host"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("indices", [None, range(4, 33), range(36, 2, -3)])
def test_images_and_labels_come_in_our_order(arrays: Written, cache: str, shuffle: bool, indices: range | None) -> None:
    feed = feed_of(arrays, cache=cache, shuffle=shuffle, indices=indices)
    chosen = np.array(indices or range(37))
    assert feed.num_images == len(chosen) and feed.num_steps == -(-len(chosen) // BATCH)
    assert feed.image_shape == (5, 7, 3)
    for epoch in (0, 3):
        order = chosen[epoch_order(len(chosen), SEED, epoch)] if shuffle else chosen
        batches = take(feed, epoch)
        assert [len(labels) for _, labels in batches] == [
            len(order[i : i + BATCH]) for i in range(0, len(order), BATCH)
        ]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), np.stack(arrays.images)[order])
        assert np.array_equal(labels.numpy(), arrays.labels[order])
    feed.close()


@pytest.mark.parametrize("cache", ["none", "host"])
def test_a_batch_of_one_keeps_its_shape_and_is_dropped_on_demand(arrays: Written, cache: str) -> None:
    kept, dropped = feed_of(arrays, cache=cache), feed_of(arrays, cache=cache, drop_last=True)
    assert (kept.num_steps, dropped.num_steps) == (7, 6)
    assert len(kept.epoch(0)) == 7
    batches = take(kept)
    assert batches[-1][0].shape == (1, 5, 7, 3) and batches[-1][1].shape == (1,)
    assert same(batches[:-1], take(dropped))


@pytest.mark.parametrize("cache", ["none", "host"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_resumed_epoch_has_the_batches_that_were_left(arrays: Written, cache: str, drop_last: bool) -> None:
    feed = feed_of(arrays, cache=cache, drop_last=drop_last)
    whole = take(feed, 2)
    for first_step in range(feed.num_steps + 1):
        again = feed_of(arrays, cache=cache, drop_last=drop_last) if first_step == 2 else feed
        assert same(take(again, 2, first_step), whole[first_step:])


def test_auto_cache_keeps_what_is_small_and_not_random(
    arrays: Written, raw: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert feed_of(arrays).is_cached
    assert feed_of(raw, crop="center", image_size=9).is_cached
    assert not random_resized(raw).is_cached
    monkeypatch.setattr("ensdistill.data.feed.AUTO_CACHE_BYTES", 37 * 5 * 7 * 3)
    assert not feed_of(arrays).is_cached
    assert feed_of(arrays, indices=range(36)).is_cached


def test_file_is_decoded_once_for_the_cache(arrays: Written) -> None:
    feed = feed_of(arrays, cache="host")
    take(feed, 0)
    (kept,) = feed._kept
    take(feed, 1)
    assert feed._kept[0] is kept and feed.with_seed(3)._kept[0] is kept


def test_channels_need_not_be_three(folder: Path) -> None:
    from ffcv.fields import IntField, NDArrayField

    images = list(np.random.default_rng(5).integers(0, 256, (5, 8, 3, 1), dtype=np.uint8))
    grey = write(folder / "grey.beton", images, {"x": NDArrayField(np.dtype(np.uint8), (8, 3, 1)), "y": IntField()})
    feed = feed_of(grey, shuffle=False, cache="none")
    assert feed.image_shape == (8, 3, 1)
    assert np.array_equal(take(feed)[0][0].numpy(), np.stack(images))


def boxes_of(heights: np.ndarray, widths: np.ndarray, epoch: int = 0, seed: int = SEED) -> np.ndarray:
    indices = np.arange(len(heights), dtype=np.int64)
    return random_boxes(heights, widths, indices_B=indices, seed=seed, epoch=epoch)


def test_random_boxes_are_spread_as_the_recipe_says() -> None:
    n = 20_000
    heights, widths = np.full(n, 300), np.full(n, 400)
    top, left, h, w = boxes_of(heights, widths).T
    assert top.min() == 0 and left.min() == 0 and (top + h).max() == 300 and (left + w).max() == 400
    area, aspect = h * w / (300 * 400), np.log(w / h)
    assert 0.245 < area.min() < 0.26 and 0.95 < area.max() <= 1
    # Large boxes of a tall aspect do not fit a wide image and are drawn again: only the small ones are uniform.
    small = area[area < 0.5]
    assert abs(np.quantile(small, 0.5) - 0.375) < 0.005
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.01 and abs(aspect[area < 0.5].mean()) < 0.01
    free = h < 300
    assert abs((top[free] / (300 - h[free])).mean() - 0.5) < 0.01


def test_random_boxes_depend_on_seed_epoch_and_image_alone() -> None:
    rng = np.random.default_rng(7)
    heights, widths = rng.integers(20, 90, (2, 50))
    boxes = boxes_of(heights, widths)
    part = np.array([31, 4, 4, 49])
    again = random_boxes(heights[part], widths[part], indices_B=part, seed=SEED, epoch=0)
    assert np.array_equal(again, boxes[part])
    assert (boxes != boxes_of(heights, widths, epoch=1)).any(axis=1).mean() > 0.9
    assert (boxes != boxes_of(heights, widths, seed=SEED + (1 << 40))).any(axis=1).mean() > 0.9


def test_random_boxes_follow_the_plain_definition() -> None:
    """One image at a time, in Python's own numbers."""
    import math

    from ensdistill.kernels.philox import STREAM_RESIZED_CROP, philox

    def box(height: int, width: int, index: int, epoch: int) -> tuple[int, int, int, int]:
        for attempt in range(10):
            words = philox(SEED, index, epoch, STREAM_RESIZED_CROP, attempt)
            area = height * width * (0.25 + 0.75 * (words[0] + 0.5) / 2**32)
            aspect = (3 / 4) * (16 / 9) ** ((words[1] + 0.5) / 2**32)
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                return words[2] * (height - h + 1) >> 32, words[3] * (width - w + 1) >> 32, h, w
        h, w = min(height, round(width / (3 / 4))), min(width, round(height * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    rng = np.random.default_rng(8)
    heights, widths = rng.integers(1, 70, (2, 300))
    expected = [box(int(h), int(w), i, 5) for i, (h, w) in enumerate(zip(heights, widths, strict=True))]
    assert np.array_equal(boxes_of(heights, widths, epoch=5), expected)


def test_boxes_of_extreme_images_stay_inside() -> None:
    heights, widths = np.array([1, 1000, 3, 1, 7]), np.array([1000, 2, 3, 1, 4000])
    for boxes in (boxes_of(heights, widths), center_boxes(heights, widths)):
        top, left, h, w = boxes.T
        assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= heights).all() and (left + w <= widths).all()
    # No box of a permitted aspect and area fits: the largest central one, of aspect 4/3, is taken.
    assert np.array_equal(boxes_of(heights, widths)[4], [0, (4000 - 9) // 2, 7, 9])


def resized(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    import cv2

    top, left, h, w = box
    return cv2.resize(image[top : top + h, left : left + w], (size, size), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("crop", ["random-resized", "center"])
@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_crops_have_the_pixels_of_their_boxes(raw: Written, jpeg: Written, crop: str, kind: str) -> None:
    written = {"raw": raw, "jpeg": jpeg}[kind]
    feed = feed_of(written, crop=crop, image_size=21, shuffle=False, cache="none")
    images, labels = (torch.cat(parts).numpy() for parts in zip(*take(feed, 4), strict=True))
    assert images.shape == (19, 21, 21, 3) and np.array_equal(labels, written.labels)
    heights, widths = np.array([image.shape[:2] for image in written.images]).T
    boxes = boxes_of(heights, widths, 4) if crop != "center" else center_boxes(heights, widths)
    expected = np.stack([resized(i, box, 21) for i, box in zip(written.images, boxes, strict=True)])
    error = np.abs(images.astype(int) - expected)
    # OpenCV's versions may round differently; JPEG loses some levels of smooth pictures (seen: 26, and 2.6 on average),
    # where another picture or box is some 60 off.
    assert error.max() <= (1 if kind == "raw" else 32) and error.mean() < (0.05 if kind == "raw" else 4)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_crops_do_not_depend_on_workers_batch_order_or_resume(raw: Written, jpeg: Written, kind: str) -> None:
    written = {"raw": raw, "jpeg": jpeg}[kind]
    one, two = (random_resized(written, num_workers=n) for n in (1, 2))
    epochs = [take(one, epoch) for epoch in range(3)]
    assert not same(epochs[0], epochs[1])
    for epoch in (2, 0, 1):
        assert same(take(two, epoch), epochs[epoch])
    assert same(take(two, 1, 2), epochs[1][2:])
    in_file_order = take(random_resized(written, shuffle=False, batch_size=19), 1)[0][0]
    shuffled = torch.cat([images for images, _ in epochs[1]])
    assert torch.equal(shuffled, in_file_order[torch.from_numpy(epoch_order(19, SEED, 1))])
    assert not same(take(random_resized(written, seed=SEED + 1, shuffle=False), 1), take(one, 1))


def test_images_of_one_size_are_fed_whole(mixed: Written) -> None:
    is_jpeg = read_index(mixed.path).is_jpeg_N
    assert is_jpeg.any() and not is_jpeg.all()
    feeds = [feed_of(mixed, shuffle=False, num_workers=n, cache=c) for n, c in [(1, "none"), (2, "none"), (1, "host")]]
    assert feeds[0].image_shape == (24, 33, 3)
    batches = [take(feed) for feed in feeds]
    assert same(batches[0], batches[1]) and same(batches[0], batches[2])
    images = torch.cat([part for part, _ in batches[0]]).numpy()
    expected = np.stack(mixed.images)
    assert np.array_equal(images[~is_jpeg], expected[~is_jpeg])
    assert 0 < np.abs(images[is_jpeg].astype(int) - expected[is_jpeg]).mean() < 4


def test_jpegs_decode_as_in_pillow(jpeg: Written) -> None:
    index = read_index(jpeg.path)
    feed = feed_of(jpeg, shuffle=False, crop="center", image_size=17, cache="none")
    images = torch.cat([part for part, _ in take(feed)]).numpy()
    for i, stored in enumerate(stored_images(jpeg.path)):
        decoded = np.asarray(Image.open(io.BytesIO(stored)))
        box = center_boxes(index.heights_N, index.widths_N)[i]
        error = np.abs(images[i].astype(int) - resized(decoded, box, 17))
        assert error.max() <= 16 and error.mean() < 3  # FFCV takes libjpeg's fast transform (seen: 12, 2.5)


@pytest.mark.parametrize("cache", ["none", "host"])
def test_batches_are_the_receivers_own(arrays: Written, cache: str) -> None:
    feed = feed_of(arrays, cache=cache, batch_size=2)
    with feed.epoch(0) as batches:
        kept, copies = [], []
        for images, labels in batches:
            kept.append((images, labels))
            copies.append((images.clone(), labels.clone()))
    assert len(kept) == 19 and same(kept, copies)
    for images, labels in kept:
        images.add_(1)
        labels.add_(1)
    assert same(take(feed), copies)


def test_default_workers(arrays: Written, jpeg: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    assert feed_of(arrays).num_workers == 1
    assert random_resized(jpeg).num_workers == ffcv_guards.num_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * ffcv_guards.num_cores()))
    assert random_resized(jpeg).num_workers == 1


def stored_images(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return [content[start : start + size] for start, size in stored_regions(path)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"image_size": -3}, "image_size is -3; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected a number from 0"),
        ({"crop": "centre"}, r"crop 'centre' is unknown \(did you mean 'center'\?\); expected one of none, center"),
        ({"cache": "gpu"}, "cache 'gpu' is unknown; expected one of auto, host, none"),
        ({"crop": "center"}, "crop 'center' without image_size"),
        ({"crop": "random-resized", "image_size": 5, "cache": "host"}, "cannot be kept; set cache to 'none'"),
        ({"crop": "center", "image_size": 5}, "needs images in an RGBImageField, and 'pixels' is an NDArrayField"),
        ({"image_size": 32}, "images are 5x7, image_size 32 was asked for"),
        ({"indices": range(0)}, "holds no images; the file has 37"),
        ({"indices": range(30, 38)}, "goes past the 37 images"),
        ({"indices": range(-1, 5)}, "goes past the 37 images"),
        ({"drop_last": True, "batch_size": 38}, "37 images make no full batch of 38"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(arrays: Written, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"arrays.beton: .*{message}"):
        feed_of(arrays, **settings)


def test_images_of_many_sizes_need_a_crop(raw: Written) -> None:
    with pytest.raises(UserError, match=r"pixels high .* a batch needs one size; set image_size, and crop"):
        feed_of(raw)

"""Small data sets in every form, written for the tests of `data`, and what reads them back."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ensdistill.data.beton_file import read_index, write_arrays
from ensdistill.data.dataset import DataSet
from ensdistill.data.feed import Feed
from ensdistill.data.ffcv_guards import num_cores
from ensdistill.data.pixel_stats import read_beton_images
from ensdistill.data.sources.base import Content, Source, Split
from ensdistill.data.sources.registry import open_source
from ensdistill.runtime.errors import UserError

COUNTS = {"train": 23, "valid": 4, "test": 9}
SPLITS = tuple(COUNTS)
BATCH, SEED = 6, 11
"""Of `feed_of`."""


def refused(act: Callable[[], object], *parts: str) -> None:
    """Assert that `act` raises a UserError of one line with all the parts."""
    with pytest.raises(UserError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def array_source(
    shape: tuple[int, int, int] = (5, 7, 3), *, seed: int = 0, name: str = "npy", fingerprint: str = "1"
) -> Source:
    """A source of random arrays in `COUNTS` images a split and three classes."""
    rng = np.random.default_rng(seed)
    splits = {
        split: Split(
            images=rng.integers(0, 256, (num, *shape), dtype=np.uint8), labels=rng.permutation(num) % 3, origin="here"
        )
        for split, num in COUNTS.items()
    }
    return Source(
        name=name,
        fingerprint=fingerprint,
        read=lambda: Content(class_names=("a", "b", "c"), splits=splits, note="a note"),
    )


def read_back(dataset: DataSet, split: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Images and labels of a split, as its file has them."""
    stored = dataset.splits[split]
    rows = stored.indices if stored.indices is not None else range(stored.num_images)
    return list(read_beton_images(stored.path, rows)), read_index(stored.path).labels_N[list(rows)]


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A smooth picture, which JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_class_folders(folder: Path, sizes: list[tuple[int, int]], suffix: str) -> None:
    """Two classes with one image of each size, and a small training set's worth of splits."""
    for number, split in enumerate(("train", "valid", "test")):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i, (height, width) in enumerate(sizes):
                picture(height, width, 100 * number + 10 * i + label).save(folder / split / name / f"{i}{suffix}")


def distance(image: np.ndarray, other: Image.Image) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(image.astype(float) - np.asarray(other.convert("RGB"), float)).mean())


def write_beton(
    path: Path, labels: np.ndarray, *, shape: tuple[int, int, int] = (5, 7, 3), seed: int = 0
) -> np.ndarray:
    """Write random arrays with these labels; returns the images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    write_arrays(path, images, labels, shape, lambda: None)
    return images


def cycled(num: int, classes: int = 3) -> np.ndarray:
    """Labels 0, 1, 2, 0, 1, …"""
    return np.arange(num) % classes


@dataclass(frozen=True)
class Written:
    """A `.beton` and what was put in it."""

    path: Path
    images: list[np.ndarray]
    labels: np.ndarray


def write(path: Path, images: list[np.ndarray], fields: dict[str, Any], labels: np.ndarray | None = None) -> Written:
    """Write a file with FFCV's own writer: the images, and the labels in every other field."""
    from ffcv.writer import DatasetWriter

    labels = np.random.default_rng(1).permutation(len(images)) * 3 if labels is None else labels
    samples = [
        tuple(image if i == 0 else int(label) for i in range(len(fields)))
        for image, label in zip(images, labels, strict=True)
    ]
    with contextlib.redirect_stderr(io.StringIO()):
        DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(samples)
    return Written(path, images, labels)


def smooth_images(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Pictures of a few random blobs, which survive JPEG."""
    import cv2

    rng = np.random.default_rng(2)
    coarse = [rng.integers(0, 256, (3, 4, 3), dtype=np.uint8) for _ in sizes]
    return [cv2.resize(c, (w, h), interpolation=cv2.INTER_CUBIC) for c, (h, w) in zip(coarse, sizes, strict=True)]


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return the function's result; a test that hangs fails instead."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function).result(seconds)
    finally:
        pool.shutdown(wait=False)


def take(feed: Feed, epoch: int = 0, first_step: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All batches that are left of an epoch."""
    with feed.epoch(epoch, first_step) as batches:
        return list(batches)


def same(one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether two lists of batches are equal."""
    return len(one) == len(other) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True)
    )


def feed_of(written: Written, *, num_workers: int | None = None, **settings: Any) -> Feed:
    """A feed of a file, with other threads than it would take by itself where `num_workers` is given."""
    defaults: dict[str, Any] = {"batch_size": BATCH, "seed": SEED, "shuffle": True, "drop_last": False}
    feed = Feed(written.path, **(defaults | settings))
    if num_workers is not None:
        feed.num_workers = min(num_workers, num_cores())
    return feed


def random_resized(written: Written, **settings: Any) -> Feed:
    """A feed of random-resized crops."""
    return feed_of(written, **({"crop": "random-resized", "image_size": 21} | settings))


def decode_threads() -> list[threading.Thread]:
    """Threads of feeds that are still running."""
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "WorkerThread"]


def stored_regions(path: Path) -> list[tuple[int, int]]:
    """Offset and size of each image, in the order of the samples."""
    from ffcv.reader import Reader

    table = Reader(str(path)).alloc_table
    return [(int(row["ptr"]), int(row["size"])) for row in np.sort(table, order="sample_id")]


def content_of(name: str, path: Path | None = None) -> Content:
    """What reading a source gives."""
    return open_source(name, path).content


def pixels(split: Split) -> np.ndarray:
    """The images of a split that is an array."""
    assert isinstance(split.images, np.ndarray)
    return split.images


def files(split: Split) -> tuple[Path, ...]:
    """The files of a split of image files."""
    assert isinstance(split.images, tuple)
    return split.images


def write_npy(folder: Path, prefix: str, num: int, *, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Write a pair of .npy files of random images; returns images and labels."""
    images = np.random.default_rng(seed).integers(0, 256, (num, 5, 7, 3), dtype=np.uint8)
    labels = np.arange(num) % classes
    np.save(folder / f"{prefix}images.npy", images)
    np.save(folder / f"{prefix}labels.npy", labels.astype(np.int32))
    return images, labels


def write_images(folder: Path, num: int, *, suffix: str = ".png") -> None:
    """Write random image files 000, 001, …"""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(num)
    for i in range(num):
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(folder / f"{i:03d}{suffix}")

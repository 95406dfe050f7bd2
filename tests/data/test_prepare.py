"""A source is written once, whole or not at all, and every mistake is named in one line."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import (
    COUNTS,
    SPLITS,
    array_source,
    distance,
    picture,
    read_back,
    refused,
    write_class_folders,
)
from PIL import Image

from ensdistill.data import beton_file
from ensdistill.data import prepare as beton_prepare
from ensdistill.data.beton_file import read_index
from ensdistill.data.dataset import DATASET_FILE, load_dataset
from ensdistill.data.feed import Feed
from ensdistill.data.pixel_stats import read_beton_images
from ensdistill.data.prepare import image_size_for, prepare
from ensdistill.data.sources.arrays import FASHION_MNIST_FOLDER
from ensdistill.data.sources.base import Source
from ensdistill.data.sources.registry import open_source

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1), (33, 31, 3)])
def test_arrays_come_back(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    source = array_source(shape)
    dataset = prepare(source, tmp_path / "new" / "folder")
    assert dataset.image_shape == shape
    assert dataset.num_classes == 3 and dataset.class_names == ("a", "b", "c")
    assert dataset.num_channels == shape[2]
    assert (dataset.image_field, dataset.label_field) == ("image", "label")
    assert dataset.note == "a note"
    assert dataset.counts == COUNTS and dataset.indices == dict.fromkeys(SPLITS)
    assert dataset.paths == {name: tmp_path / "new" / "folder" / f"{name}.beton" for name in SPLITS}
    for name in SPLITS:
        images, labels = read_back(dataset, name)
        assert np.array_equal(np.stack(images), source.splits[name].images)  # type: ignore[arg-type]
        assert np.array_equal(labels, source.splits[name].labels)


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (prepare(array_source(), tmp_path / name) for name in ("a", "b"))
    for name in SPLITS:
        assert first.splits[name].checksum == second.splits[name].checksum
        assert first.splits[name].checksum.startswith("sha256:")
    other = prepare(array_source(seed=1), tmp_path / "c")
    assert other.splits["train"].checksum != first.splits["train"].checksum


def test_a_second_run_writes_nothing(tmp_path: Path) -> None:
    first = prepare(array_source(), tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    source = replace(array_source(), read=lambda: pytest.fail("the source was read again"))
    assert prepare(source, tmp_path) == first == load_dataset(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


@pytest.mark.parametrize("what", ["source changed", "other image size", "file missing", "file cut", "json damaged"])
def test_what_does_not_fit_is_written_again(tmp_path: Path, what: str) -> None:
    shape = (6, 6, 3)
    prepare(array_source(shape), tmp_path)
    source, size = array_source(shape, seed=1), None
    if what == "source changed":
        source = array_source(shape, seed=1, fingerprint="2")
    elif what == "other image size":
        size = 6
    elif what == "file missing":
        (tmp_path / "valid.beton").unlink()
    elif what == "file cut":
        (tmp_path / "valid.beton").write_bytes(b"cut")
    else:
        (tmp_path / DATASET_FILE).write_text('{"format": 1}')
    dataset = prepare(source, tmp_path, image_size=size)
    assert np.array_equal(np.stack(read_back(dataset, "valid")[0]), source.splits["valid"].images)  # type: ignore[arg-type]


def test_progress_counts_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_prepare, "PROGRESS_EVERY", 10)
    seen: list[tuple[int, int]] = []
    prepare(array_source(), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 36), (20, 36), (30, 36), (36, 36)]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert prepare(open_source("digits"), tmp_path).counts == {"train": 400, "valid": 397, "test": 1000}
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(
    not FASHION_MNIST_FOLDER.is_dir(), reason=f"needs Debian's dataset-fashion-mnist in {FASHION_MNIST_FOLDER}"
)
def test_fashion_mnist_of_debian(tmp_path: Path) -> None:
    source = open_source("fashion-mnist")
    dataset = prepare(source, tmp_path)
    assert dataset.counts == {"train": 55_000, "valid": 5_000, "test": 10_000}
    assert dataset.pixel_mean == pytest.approx((0.286,), abs=1e-3) and dataset.pixel_std == pytest.approx(
        (0.353,), abs=1e-3
    )
    rows = [0, 777, 9_999]
    images = source.splits["test"].images
    assert isinstance(images, np.ndarray)
    assert np.array_equal(np.stack(list(read_beton_images(tmp_path / "test.beton", rows))), images[rows])


def test_too_little_space_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    folder = tmp_path / "new"
    refused(lambda: prepare(array_source(), folder), str(folder), "3 MB are free", "choose another folder")
    assert not folder.exists()


def test_prediction_of_space_is_from_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted: list[int] = []
    predict = beton_file.predict_bytes

    def spy(*args: Any, **kwargs: Any) -> int:
        predicted.append(predict(*args, **kwargs))
        return predicted[-1]

    monkeypatch.setattr(beton_prepare, "predict_bytes", spy)
    dataset = prepare(array_source((91, 90, 3)), tmp_path)
    for split, bytes_predicted in zip(dataset.splits.values(), predicted, strict=True):
        assert split.num_bytes <= bytes_predicted <= 3 * split.num_bytes


class FullDisk:
    """A file that takes `room` bytes, then does what a full disk does."""

    def __init__(self, file: Any, room: int, *, silently: bool) -> None:
        self.file, self.room, self.silently = file, room, silently

    def write(self, data: bytes) -> int:
        if len(data) > self.room and not self.silently:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("silently", [False, True])
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silently: bool) -> None:
    from ffcv.memory_allocator import MemoryAllocator

    before = prepare(array_source(), tmp_path)
    enter = MemoryAllocator.__enter__

    def enter_full(self: Any) -> None:
        enter(self)
        self.fp = FullDisk(self.fp, 100, silently=silently)

    monkeypatch.setattr(MemoryAllocator, "__enter__", enter_full)
    source = array_source(seed=1, fingerprint="2")
    refused(
        lambda: prepare(source, tmp_path), "bytes were written; free space" if silently else "no space left on the disk"
    )
    monkeypatch.undo()
    assert load_dataset(tmp_path) == before  # what was there is still whole


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    refused(lambda: prepare(array_source(), tmp_path / "file"), str(tmp_path / "file"), "cannot be written")


def test_image_size_of_arrays_must_be_theirs(tmp_path: Path) -> None:
    refused(
        lambda: prepare(array_source((5, 7, 3)), tmp_path, image_size=5), "here", "5x7 pixels", "image size 5 was asked"
    )
    assert prepare(array_source((6, 6, 3)), tmp_path, image_size=6).image_shape == (6, 6, 3)


def test_small_images_of_one_size_are_kept_exactly(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "in", [(12, 12)] * 3, ".png")
    for size in (None, 12):
        dataset = prepare(open_source("folder", tmp_path / "in"), tmp_path / f"out{size}", image_size=size)
        assert dataset.image_shape == (12, 12, 3) and dataset.num_channels == 3
        images, labels = read_back(dataset, "valid")
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        for i, image in enumerate(images):
            assert np.array_equal(image, np.asarray(picture(12, 12, 100 + 10 * (i % 3) + i // 3)))
    assert prepare(open_source("folder", tmp_path / "in"), tmp_path / "other", image_size=32).image_shape is None


@pytest.fixture(params=[1, 3])
def num_workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Threads that decode image files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(request.param)))
    return request.param


@pytest.mark.parametrize("size", [None, 100])
def test_large_images_of_one_size_are_kept_exactly_and_shown_whole(tmp_path: Path, size: int | None) -> None:
    write_class_folders(tmp_path / "in", [(100, 100)] * 3, ".png")
    source = open_source("folder", tmp_path / "in")
    dataset = prepare(source, tmp_path / "out", image_size=size, one_size=size is None)
    assert dataset.image_shape == (100, 100, 3)
    images, _ = read_back(dataset, "valid")
    fed, labels = Feed(
        dataset.paths["valid"], batch_size=6, seed=0, shuffle=False, drop_last=False
    ).all_images()  # fmt: skip
    for i, image in enumerate(images):
        assert np.array_equal(image, np.asarray(picture(100, 100, 100 + 10 * (i % 3) + i // 3)))
        assert np.array_equal(fed[i], image)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    cropped = Feed(
        dataset.paths["valid"], batch_size=6, seed=0, shuffle=False, drop_last=False, crop="random-resized",
        image_size=100, cache="none",
    )  # fmt: skip
    with cropped.epoch(0) as batches:
        assert next(batches)[0].shape == (6, 100, 100, 3)
    assert image_size_for(source, (100, 100)) is None and image_size_for(source, (64, 64)) == 64
    assert prepare(source, tmp_path / "small", image_size=64).image_shape is None


def test_too_many_pixels_are_kept_as_jpegs_of_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "in", [(100, 100)] * 3, ".jpg")
    monkeypatch.setattr(beton_prepare, "MAX_PIXEL_BYTES", 18 * 30_000 - 1)
    dataset = prepare(open_source("folder", tmp_path / "in"), tmp_path / "out")
    assert dataset.image_shape == (100, 100, 3)
    assert read_index(dataset.paths["train"]).is_jpeg_N.all()
    assert (tmp_path / "in" / "train" / "cat" / "1.jpg").read_bytes() in dataset.paths["train"].read_bytes()


@pytest.mark.parametrize("place", ["train/cat/0.png", "train/cat/9.png", "test/dog/9.png"])
def test_an_odd_image_among_many_is_named(tmp_path: Path, place: str) -> None:
    write_class_folders(tmp_path / "in", [(32, 32)] * 10, ".png")
    picture(33, 34, 1).save(tmp_path / "in" / place)
    source = open_source("folder", tmp_path / "in")
    refused(
        lambda: prepare(source, tmp_path / "out", one_size=True),
        "image-size: not given, but folder has images of many sizes; give --image-size 224",
        f"1 of 60 images are not 32x32: {tmp_path / 'in' / place} is 33x34",
    )
    assert not (tmp_path / "out").exists()
    note = prepare(source, tmp_path / "out", image_size=32).note
    assert f"{place} is 33x34" in note and "stored as JPEGs" in note
    assert prepare(source, tmp_path / "other", image_size=16).note == ""


def test_photographs_of_many_sizes_are_no_odd_ones(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "in", [(32 + i, 32) for i in range(5)], ".png")
    source = open_source("folder", tmp_path / "in")
    refused(lambda: prepare(source, tmp_path / "out", one_size=True), "has images of many sizes; give --image-size 224")
    assert not (tmp_path / "out").exists()
    assert prepare(source, tmp_path / "out", image_size=32).note == ""


def test_large_images_become_jpegs_of_limited_size(tmp_path: Path, num_workers: int) -> None:
    sizes = [(40, 50), (61, 33), (200, 103)]
    write_class_folders(tmp_path / "in", sizes, ".png")
    source = open_source("folder", tmp_path / "in")
    dataset = prepare(source, tmp_path / "out", image_size=35)  # shorter side at most 40
    assert dataset.image_shape is None
    index = read_index(dataset.paths["train"])
    assert index.is_jpeg_N.all()
    expected = [(40, 50), (61, 33), (78, 40)]
    assert list(zip(index.heights_N.tolist(), index.widths_N.tolist(), strict=True)) == expected * 2
    images, labels = read_back(dataset, "train")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    for i, image in enumerate(images):
        height, width = expected[i % 3]
        original = picture(*sizes[i % 3], 10 * (i % 3) + i // 3)
        assert image.shape == (height, width, 3)
        assert distance(image, original.resize((width, height), Image.Resampling.BICUBIC)) < 2


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "in", [(40, 50), (61, 33), (200, 103)], ".png")
    source = open_source("folder", tmp_path / "in")
    datasets = []
    for n in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=n: set(range(n)))
        datasets.append(prepare(source, tmp_path / str(n), image_size=35))
    one, three = datasets
    assert [split.checksum for split in one.splits.values()] == [split.checksum for split in three.splits.values()]


def test_ffcv_decodes_the_jpegs(tmp_path: Path) -> None:
    """Kept bytes, RGB and grey, and encoded ones give FFCV's decoder the pixels that PIL gives."""
    from ffcv.libffcv import imdecode
    from ffcv.reader import Reader

    write_class_folders(tmp_path / "in", [(100, 97)], ".jpg")
    picture(98, 99, 5).convert("L").save(tmp_path / "in" / "train" / "cat" / "1.jpg")
    picture(101, 120, 6).save(tmp_path / "in" / "train" / "cat" / "2.png")
    dataset = prepare(open_source("folder", tmp_path / "in"), tmp_path / "out")
    reader, index = Reader(str(dataset.paths["train"])), read_index(dataset.paths["train"])
    data = np.fromfile(dataset.paths["train"], np.uint8)
    expected = list(read_beton_images(dataset.paths["train"], range(4)))
    sizes = dict(zip(reader.alloc_table["ptr"], reader.alloc_table["size"], strict=True))
    for i in range(4):
        offset, height, width = reader.metadata["f0"]["data_ptr"][i], int(index.heights_N[i]), int(index.widths_N[i])
        decoded = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        jpeg = data[offset : offset + sizes[offset]].copy()
        imdecode(jpeg, decoded, height, width, height, width, 0, 0, 1, 1, False, False)
        assert distance(decoded, Image.fromarray(expected[i])) < 1
    first = (tmp_path / "in" / "train" / "cat" / "0.jpg").read_bytes()
    assert first in data.tobytes()


@pytest.mark.parametrize("size", [(97, 98), (20, 20)])
def test_a_damaged_image_is_named(tmp_path: Path, size: tuple[int, int], num_workers: int) -> None:
    write_class_folders(tmp_path / "in", [size] * 30, ".png")
    damaged = tmp_path / "in" / "test" / "dog" / "27.png"
    whole = damaged.read_bytes()
    source = open_source("folder", tmp_path / "in")
    for content in (whole[: len(whole) * 2 // 3], whole[:20], b"", b"text"):
        damaged.write_bytes(content)
        refused(lambda: prepare(source, tmp_path / "out"), str(damaged), "cannot be read", "replace or remove it")
    assert not (tmp_path / "out" / DATASET_FILE).exists() and not (tmp_path / "out" / "test.beton").exists()


def test_an_image_of_another_size_than_all_are_said_to_have(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "in", [(20, 20), (20, 21)], ".png")
    source = open_source("folder", tmp_path / "in")
    content = replace(source.content, image_shape=(20, 20, 3))
    known = Source(name="tiny-imagenet", fingerprint="1", read=lambda: content)
    refused(lambda: prepare(known, tmp_path / "out"), "1.png", "20x21 pixels; expected 20x20")
    refused(lambda: prepare(known, tmp_path / "out", image_size=32), "20x20 pixels, image size 32")

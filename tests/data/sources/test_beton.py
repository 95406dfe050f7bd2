"""Existing `.beton` files are used in place, split by rows where a split is missing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from data_sets import (
    COUNTS,
    SPLITS,
    content_of,
    cycled,
    picture,
    pixels,
    read_back,
    refused,
    write_beton,
)

from ensdistill.data import beton_file, image_files
from ensdistill.data.beton_file import read_index
from ensdistill.data.dataset import DATASET_FILE, load_dataset
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.registry import open_source, recognise

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def write_rgb_beton(path: Path, images: list[np.ndarray], names: tuple[str, str] = ("pixels", "class")) -> None:
    """As people have them: FFCV's own writer, other names of fields, raw and compressed images mixed."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    fields = {names[0]: RGBImageField(write_mode="proportion"), names[1]: IntField()}
    writer = DatasetWriter(str(path), fields, page_size=1 << 21)
    writer.num_samples = len(images)
    writer.prepare()
    metadata = np.zeros(len(images), writer.metadata_type)
    allocator = MemoryAllocator(str(path), writer.data_region_start, 1 << 21)
    with allocator:
        for i, image in enumerate(images):
            handle_sample((image, i % 2), i, metadata.dtype.names, metadata, allocator, fields)
    writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
    writer.finalize(allocator.allocations)
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()


@pytest.mark.parametrize("suffix", [".beton", ".ffcv"])
def test_three_files_are_used_in_place(tmp_path: Path, suffix: str) -> None:
    given = tmp_path / "given"
    images = {
        split: write_beton(given / f"my_{word}_8x8{suffix}", cycled(COUNTS[split]), seed=i)
        for i, (split, word) in enumerate({"train": "train", "valid": "val", "test": "test"}.items())
    }
    assert recognise(given) == "beton"
    source = open_source("beton", given)
    dataset = prepare(source, tmp_path / "out", image_size=None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [DATASET_FILE]
    assert dataset.paths == {
        s: given / f"my_{w}_8x8{suffix}" for s, w in zip(SPLITS, ("train", "val", "test"), strict=True)
    }
    assert dataset.counts == COUNTS and dataset.indices == dict.fromkeys(SPLITS) and dataset.note == ""
    assert dataset.image_shape == (5, 7, 3) and dataset.num_classes == 3
    values = images["train"] / 255
    assert dataset.pixel_mean == pytest.approx(values.mean(axis=(0, 1, 2)))
    assert dataset.pixel_std == pytest.approx(values.std(axis=(0, 1, 2)))
    assert prepare(open_source("beton", given), tmp_path / "out") == dataset == load_dataset(tmp_path / "out")
    os.utime(dataset.paths["test"])
    assert load_dataset(tmp_path / "out") == dataset
    write_beton(dataset.paths["test"], cycled(COUNTS["test"]) * 0, seed=2)
    refused(lambda: load_dataset(tmp_path / "out"), str(dataset.paths["test"]), "changed")
    assert prepare(open_source("beton", given), tmp_path / "out") != dataset


def test_one_file_is_split_by_rows(tmp_path: Path) -> None:
    file = tmp_path / "lone.beton"
    images = write_beton(file, cycled(63))
    assert recognise(file) == recognise(tmp_path) == "beton"
    for path in (file, tmp_path):
        dataset = prepare(open_source("beton", path), tmp_path / "out")
        assert dataset.indices == {"train": range(51), "valid": range(51, 57), "test": range(57, 63)}
        assert dataset.counts == {"train": 51, "valid": 6, "test": 6}
        assert set(dataset.paths.values()) == {file}
        assert "last two times 6 rows of lone.beton" in dataset.note
        read, labels = read_back(dataset, "valid")
        assert np.array_equal(read, images[51:57]) and labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert load_dataset(tmp_path / "out") == dataset
    assert dataset.pixel_mean == pytest.approx((images[:51] / 255).mean(axis=(0, 1, 2)))


def test_one_file_sorted_by_class_is_split_class_by_class(tmp_path: Path) -> None:
    """The same rows as of the same images in .npy files."""
    labels = np.sort(cycled(63))
    images = write_beton(tmp_path / "lone.beton", labels)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    arrays = content_of("npy", tmp_path)
    dataset = prepare(open_source("beton", tmp_path / "lone.beton"), tmp_path / "out")
    assert dataset.note == ("test is the last 6 rows of lone.beton and valid the last 3 before them, class by class")
    for split, expected in arrays.splits.items():
        read, found = read_back(dataset, split)
        assert np.array_equal(read, pixels(expected)) and np.array_equal(found, expected.labels)
        assert set(found) == {0, 1, 2}
    assert load_dataset(tmp_path / "out") == dataset
    assert dataset.pixel_mean == pytest.approx((pixels(arrays.splits["train"]) / 255).mean(axis=(0, 1, 2)))


@pytest.mark.parametrize("word", ["val", "test"])
def test_two_files(tmp_path: Path, word: str) -> None:
    write_beton(tmp_path / "train.beton", cycled(43))
    write_beton(tmp_path / f"{word}.beton", cycled(9), seed=1)
    dataset = prepare(open_source("beton", tmp_path), tmp_path / "out")
    assert dataset.indices == {"train": range(39), "valid": range(39, 43), "test": None}
    assert dataset.paths["test"] == tmp_path / f"{word}.beton" and dataset.counts["test"] == 9
    assert f"test is {word}.beton" in dataset.note
    write_beton(tmp_path / f"{word}.beton", cycled(1), seed=1)
    write_beton(tmp_path / "train.beton", np.sort(cycled(43)))
    sets_apart = content_of("beton", tmp_path)
    assert np.bincount(sets_apart.splits["valid"].labels).tolist() == [1, 1, 1]
    assert f"valid is the last 3 rows of train.beton, class by class, test is {word}.beton" in sets_apart.note
    write_beton(tmp_path / f"{word}.beton", cycled(9), seed=1)
    write_beton(tmp_path / "train.beton", np.sort(cycled(43)))  # by class: the last tenth is one class
    dataset = prepare(open_source("beton", tmp_path), tmp_path / "out")
    assert dataset.indices == {"train": None, "valid": range(0, 9, 2), "test": range(1, 9, 2)}
    assert dataset.counts == {"train": 43, "valid": 5, "test": 4}
    assert "even and the odd rows" in dataset.note
    assert read_back(dataset, "test")[1].tolist() == [1, 0, 2, 1]
    assert load_dataset(tmp_path / "out") == dataset


def test_rgb_files_of_ffcvs_own_writer(tmp_path: Path) -> None:
    small = [np.asarray(picture(12, 12, i)) for i in range(40)]
    write_rgb_beton(tmp_path / "small.beton", small)
    index = read_index(tmp_path / "small.beton")
    assert 0 < index.is_jpeg_N.sum() < 40
    dataset = prepare(open_source("beton", tmp_path / "small.beton"), tmp_path / "a")
    assert dataset.image_shape == (12, 12, 3)
    assert (dataset.image_field, dataset.label_field) == ("pixels", "class")
    assert dataset.pixel_mean == pytest.approx(np.mean(small[:32], axis=(0, 1, 2)) / 255, abs=0.005)
    assert prepare(open_source("beton", tmp_path / "small.beton"), tmp_path / "b", image_size=8).image_shape is None
    write_rgb_beton(tmp_path / "large.beton", [np.asarray(picture(100, 97 + i % 3, i)) for i in range(40)])
    assert prepare(open_source("beton", tmp_path / "large.beton"), tmp_path / "c").image_shape is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_jpegs_in_a_file_are_named_before_any_training(tmp_path: Path, split: str) -> None:
    """Images that are not among those whose mean is measured too."""
    (tmp_path / "in").mkdir()
    whole = image_files.encode_jpeg(picture(12, 12, 0))
    for name in ("train", "test"):
        jpegs = [whole] * 20
        if name == split:
            jpegs[13] = whole._replace(data=whole.data[:-20])
        beton_file.write_images(tmp_path / "in" / f"{name}.beton", jpegs, cycled(20, 2), lambda: None)
    broken = tmp_path / "in" / f"{split}.beton"
    refused(
        lambda: prepare(open_source("beton", tmp_path / "in"), tmp_path / "out"), f"{broken}: image 13 is a damaged"
    )


def test_beton_mistakes(tmp_path: Path) -> None:
    refused(lambda: open_source("beton"), "no file was given", "train.beton", "--data")
    refused(lambda: open_source("beton", tmp_path), "no .beton file of training images", "train.beton")
    given, out = tmp_path / "given", tmp_path / "out"
    train, test = given / "train.beton", given / "test.beton"

    def broken(*parts: str, image_size: int | None = None) -> None:
        refused(lambda: prepare(open_source("beton", given), out, image_size=image_size), *parts)

    write_beton(train, cycled(63) + 1)
    broken(str(train), "labels reach 3 but no training image has label 0")
    write_beton(train, cycled(63) - 1)
    broken(str(train), "label -1 is negative")
    write_beton(train, cycled(6))
    broken(str(train), "too few images to split some off", "at least 3 a class")
    write_beton(train, cycled(63))
    broken("5x7 pixels, image size 5 was asked for", image_size=5)
    write_beton(test, cycled(9), shape=(5, 6, 3))
    broken("(5, 7, 3)", "the same in every file")
    write_beton(test, cycled(9), shape=(5, 7, 1))
    broken(str(test), "1-channel images in 'image' (an array)", "expected 3-channel", "train.beton")
    write_beton(test, cycled(9))
    whole = test.read_bytes()
    for damaged in (whole[:-11], whole[:3000], whole[:10], b"", bytes(5000)):
        test.write_bytes(damaged)
        broken(str(test))
    write_beton(test, cycled(9) - 1)
    broken(str(test), "label -1 of test image 0 is out of range")
    write_beton(given / "my_test.beton", cycled(9))
    refused(lambda: open_source("beton", given), "both my_test.beton and test.beton are test", "expected one")


def test_files_with_other_channels_are_refused(tmp_path: Path) -> None:
    write_beton(tmp_path / "a.beton", cycled(63), shape=(3, 5, 7))
    refused(lambda: prepare(open_source("beton", tmp_path / "a.beton"), tmp_path / "out"), "(3, 5, 7)", "C 1 or 3")


def test_files_of_other_names(tmp_path: Path) -> None:
    for name in ("Training", "validation", "testset"):
        write_beton(tmp_path / f"{name}.beton", cycled(9))
    paths = {split: images.images.path.stem for split, images in content_of("beton", tmp_path).splits.items()}  # type: ignore[union-attr]
    assert paths == {"train": "Training", "valid": "validation", "test": "testset"}
    write_beton(tmp_path / "other.beton", cycled(9))
    refused(lambda: open_source("beton", tmp_path), "other.beton is neither train, valid nor test by its name")

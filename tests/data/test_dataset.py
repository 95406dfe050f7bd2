"""A prepared folder can be moved, is refused where it was damaged, and gives subsets of every class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_sets import array_source, cycled, refused, write_beton, write_images
from msgspec.structs import replace

from ensdistill.data.beton_file import read_index
from ensdistill.data.dataset import DATASET_FILE, DataSet, StoredSplit, load_dataset, training_rows
from ensdistill.data.feed import Feed
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.base import stratified_rows
from ensdistill.data.sources.registry import open_source

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_a_prepared_folder_can_be_moved(tmp_path: Path) -> None:
    dataset = prepare(array_source(), tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = load_dataset(tmp_path / "after")
    assert moved.paths["test"] == tmp_path / "after" / "test.beton"
    assert replace(moved, splits={}) == replace(dataset, splits={})


def test_dataset_mistakes(tmp_path: Path) -> None:
    refused(lambda: load_dataset(tmp_path), str(tmp_path / DATASET_FILE), "missing", "prepare it first")
    prepare(array_source(), tmp_path)
    file, valid = tmp_path / DATASET_FILE, tmp_path / "valid.beton"
    fields = json.loads(file.read_text())
    for damaged in (
        "",
        "[]",
        "{}",
        '{"format": 1}',
        json.dumps({**fields, "extra": 1}),
        json.dumps({**fields, "splits": {}}),
    ):
        file.write_text(damaged)
        refused(lambda: load_dataset(tmp_path), str(file), "damaged", "prepare the data again")
    del fields["sha256"]  # as somebody leaves it who writes the file by hand
    for wrong in (
        {"pixel_std": [0.0, 1.0, 1.0]},
        {"pixel_mean": [0.5]},
        {"image_shape": [5, 0, 3]},
        {"image_shape": [5, 7, 1]},
        {"class_names": ["a"]},
        {"class_names": ["a", "b", "\ud800"]},
        {"splits": fields["splits"] | {"valid": fields["splits"]["valid"] | {"indices": [0, 10**18, 1]}}},
        {"splits": fields["splits"] | {"valid": fields["splits"]["valid"] | {"num_images": 0}}},
    ):
        file.write_text(json.dumps(fields | wrong))
        refused(lambda: load_dataset(tmp_path), str(file), "damaged", "prepare the data again")
    file.write_text(json.dumps({**fields, "format": 7}))
    refused(lambda: load_dataset(tmp_path), "of format 7; expected 1")
    file.write_text(json.dumps(fields))
    content = bytearray(valid.read_bytes())
    content[-1] ^= 1
    valid.write_bytes(content)
    refused(lambda: load_dataset(tmp_path), str(valid), "changed since it was prepared")
    valid.write_bytes(content[:-1])
    refused(lambda: load_dataset(tmp_path), str(valid), f"{len(content) - 1} bytes; expected {len(content)}")
    valid.unlink()
    refused(lambda: load_dataset(tmp_path), str(valid), "missing")


def labels_of(dataset: DataSet, rows: range | np.ndarray | None) -> np.ndarray:
    labels_N = read_index(dataset.paths["train"]).labels_N
    return labels_N if rows is None else labels_N[np.asarray(rows)]


@pytest.mark.parametrize("kind", ["folder", "npy", "beton"])
def test_a_subset_of_sorted_images_keeps_every_class(tmp_path: Path, kind: str) -> None:
    given = tmp_path / "given"
    given.mkdir()
    counts = [60, 30, 10]
    labels = np.repeat([0, 1, 2], counts)
    if kind == "folder":
        for name, num in zip("abc", counts, strict=True):
            write_images(given / "train" / name, num)
            write_images(given / "test" / name, 2)
            write_images(given / "valid" / name, 2)
    elif kind == "npy":
        for prefix, chosen in (("train_", labels), ("valid_", [0, 1, 2]), ("test_", [0, 1, 2])):
            images = np.random.default_rng(0).integers(0, 256, (len(chosen), 5, 7, 3), dtype=np.uint8)
            np.save(given / f"{prefix}images.npy", images)
            np.save(given / f"{prefix}labels.npy", np.array(chosen))
    else:
        for name, chosen in (("train", labels), ("valid", cycled(3)), ("test", cycled(3))):
            write_beton(given / f"{name}.beton", np.asarray(chosen))
    dataset = prepare(open_source(kind, given), tmp_path / "out")
    assert training_rows(dataset, None) is None
    rows = training_rows(dataset, 50)
    assert isinstance(rows, np.ndarray) and len(set(rows.tolist())) == 50 and (np.diff(rows) > 0).all()
    assert np.bincount(labels_of(dataset, rows)).tolist() == [30, 15, 5]
    assert np.array_equal(rows, training_rows(dataset, 50)) and set(training_rows(dataset, 20)) < set(rows)  # type: ignore[arg-type]
    assert np.bincount(labels_of(dataset, training_rows(dataset, 3))).tolist() == [1, 1, 1]
    assert np.array_equal(training_rows(dataset, 100), np.arange(100))  # type: ignore[arg-type]
    assert rows.tolist() != list(range(30)) + list(range(60, 75)) + list(range(90, 95))
    feed = Feed(dataset.paths["train"], indices=rows, batch_size=50, seed=0, shuffle=True, drop_last=True)
    assert np.bincount(feed.all_images()[1]).tolist() == [30, 15, 5]
    for wrong, message in ((0, "got 0; expected at least 1"), (-5, "got -5"), (101, "there are 100"), (2, "3 classes")):
        refused(lambda wrong=wrong: training_rows(dataset, wrong), "train-images", message)  # type: ignore[misc]


def test_a_subset_of_ordered_data_is_the_first_images(tmp_path: Path) -> None:
    dataset = prepare(array_source(name="cifar10"), tmp_path)
    assert training_rows(dataset, 5) == range(5) and training_rows(dataset, 1) == range(1)
    split = StoredSplit(path=tmp_path, runs=((20, 0, -2),), num_images=10, num_bytes=0, checksum="")
    assert training_rows(replace(dataset, splits={"train": split}), 3) == range(20, 14, -2)
    refused(lambda: training_rows(dataset, -5), "train-images: got -5; expected at least 1")


def test_rows_of_a_subset_keep_the_share_of_each_class() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 1000) ** 2 // 6
    for num in (7, 100, 500, 999, 1000):
        rows = stratified_rows(labels, num)
        assert len(np.unique(rows)) == num
        share = np.bincount(labels[rows], minlength=7) / np.maximum(np.bincount(labels), 1)
        assert (np.abs(share - num / 1000) * np.bincount(labels) <= 8).all()

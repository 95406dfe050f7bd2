"""An image in two splits and a class that a split lacks are said, once, when data are prepared."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_sets import COUNTS, array_source, picture, write_class_folders

from ensdistill.data import split_notes as module
from ensdistill.data.dataset import load_dataset
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.base import Source
from ensdistill.data.sources.registry import open_source

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_an_image_that_is_in_two_splits_is_said(tmp_path: Path) -> None:
    source = array_source()
    train, test = (source.splits[name].images for name in ("train", "test"))
    assert isinstance(train, np.ndarray) and isinstance(test, np.ndarray)
    test[2], test[3] = train[5], train[1]
    found = prepare(source, tmp_path).note
    assert found.endswith(
        f"; 2 of {COUNTS['test']} test images are in train too, byte for byte (test image 2 is train image 5)"
    )
    assert load_dataset(tmp_path).note == found


def test_equal_heads_are_no_equal_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_BYTES", 16)
    source = array_source()
    for split in source.splits.values():
        assert isinstance(split.images, np.ndarray)
        split.images[:, :1] = 0  # 21 bytes
    assert prepare(source, tmp_path).note == "a note"


def test_files_and_a_class_that_a_split_lacks(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_class_folders(data, [(9, 9), (9, 12), (12, 9)], ".jpg")
    shutil.copy(data / "train" / "dog" / "1.jpg", data / "test" / "cat" / "0.jpg")  # another class, even
    shutil.rmtree(data / "valid" / "dog")
    picture(9, 9, 7).save(data / "valid" / "cat" / "3.jpg")
    note = prepare(open_source("folder", data), tmp_path / "out", image_size=8).note
    assert "1 of 6 test images are in train too, byte for byte (test image 0 is train image 4)" in note
    assert "valid has no image of 1 of 2 classes ('dog')" in note and "in valid too" not in note


def test_a_class_that_the_test_split_lacks_is_said(tmp_path: Path) -> None:
    source = array_source()
    source.splits["test"].labels[:] = 0
    assert prepare(source, tmp_path).note == "a note; test has no image of 2 of 3 classes ('b', 'c')"


def test_existing_files_are_compared_as_well(tmp_path: Path) -> None:
    source = array_source()
    twice: Source = array_source()
    twice.splits["test"].images[0] = twice.splits["train"].images[7]  # type: ignore[index]
    written = prepare(twice, tmp_path / "written")
    assert "(test image 0 is train image 7)" in written.note
    adopted = prepare(open_source("beton", tmp_path / "written"), tmp_path / "adopted")
    assert "(test image 0 is train image 7)" in adopted.note
    assert "too" not in prepare(source, tmp_path / "clean").note

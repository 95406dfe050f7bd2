"""Contents are checked once, and images are split off class by class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_sets import (
    refused,
    write_npy,
)

from ensdistill.data.sources import base
from ensdistill.data.sources.base import BetonRows, Content, Source, Split, check_classes_present, hold_out
from ensdistill.data.sources.registry import open_source


def test_contents_are_checked() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 1), dtype=np.uint8)
    good = Split(images=images, labels=np.array([0, 1, 0, 1]), origin="here")

    def source(valid: Split) -> Source:
        content = Content(class_names=("a", "b"), splits={"train": good, "valid": valid, "test": good})
        return Source(name="npy", fingerprint="", read=lambda: content)

    right = source(good)
    assert right.num_classes == 2 and right.class_names == ("a", "b") and right.splits["valid"] is good
    refused(
        lambda: source(replace(good, images=images[:0], labels=good.labels[:0])).splits, "here", "valid split is empty"
    )
    refused(lambda: source(replace(good, labels=good.labels[:3])).splits, "4 images but 3 labels")
    refused(lambda: source(replace(good, labels=good.labels + 1)).splits, "label 2 of valid image 1", "0 to 1")
    refused(lambda: source(replace(good, labels=good.labels - 1)).splits, "label -1 of valid image 0")
    refused(lambda: source(replace(good, images=images.astype(np.int8))).splits, "int8", "uint8")


def test_hold_out_takes_the_end_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 25, 7]))
    rest, held = hold_out(labels, origin="here")
    assert sorted([*rest, *held]) == list(range(72))
    assert np.bincount(labels[held]).tolist() == [4, 2, 1]
    for k in range(3):
        assert max(rest[labels[rest] == k]) < min(held[labels[held] == k])
    monkeypatch.setattr(base, "MAX_HELD_OUT", 4)
    _, held = hold_out(labels, origin="here")
    assert np.bincount(labels[held]).tolist() == [2, 1, 1]


def test_classes_without_an_image_are_named() -> None:
    check_classes_present(np.array([2, 0, 1, 1]), 3, "here")
    refused(lambda: check_classes_present(np.array([0, 1, 1]), 3, "here"), "labels reach 2", "label 2")


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    write_npy(tmp_path, "", 30)
    source = open_source("npy", tmp_path)
    (tmp_path / "images.npy").write_bytes(b"damaged")
    refused(lambda: source.content, "cannot be read")


def test_rows_of_a_file_cannot_be_taken_apart() -> None:
    split = Split(images=BetonRows(path=Path("a.beton"), indices=None), labels=np.array([0]), origin="a.beton")
    with pytest.raises(AssertionError):
        split.take(np.array([0]))

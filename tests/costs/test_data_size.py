"""Sizes of data sets: the published ones against data that are counted, and what a configuration changes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from data_sets import cycled, write_beton, write_class_folders

from ensdistill.config.recipes import RECIPES, find_recipe
from ensdistill.costs.data_size import PUBLISHED, data_size, published_size
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.registry import open_source
from ensdistill.runtime.errors import UserError


def test_the_digits_that_are_there_have_the_published_size():
    notes: list[str] = []
    assert data_size(find_recipe("digits"), notes.append) == PUBLISHED["digits"]
    assert notes == []


def test_every_recipe_has_a_published_size():
    for make in RECIPES.values():
        assert published_size(make().source).num_images > 0
    with pytest.raises(UserError, match=r"^source folder: its shape is not known; expected one of digits, "):
        published_size("folder")


def test_a_configuration_may_use_fewer_images():
    config = replace(find_recipe("digits"), train_images=50)
    size = data_size(config, print)
    assert (size.num_train, size.num_valid, size.image_shape) == (50, 397, (8, 8, 1))
    assert size.num_images == 50 + 397 + 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 6}, "images are 8x8 pixels, image size 6 was asked for; leave it away"),
        ({"train_images": 401}, "train-images: got 401, but there are 400; give fewer"),
        ({"crop": "random-resized"}, "image-size: not given"),
    ],
)
def test_what_a_run_refuses_is_not_planned(changes, message):
    with pytest.raises(UserError, match=message):
        data_size(replace(find_recipe("digits"), **changes), print)


@pytest.mark.parametrize(
    ("sizes", "changes", "shape"),
    [
        ([(20, 30)] * 5, {}, (20, 30, 3)),
        ([(20, 30)] * 5, {"image_size": 16}, (16, 16, 3)),
        ([(20, 20)] * 5, {"image_size": 16, "crop": "random-resized"}, (16, 16, 3)),
        ([(20, 30), (25, 20), (40, 41)], {"image_size": 16}, (16, 16, 3)),
        ([(20, 30), (25, 20), (40, 41)], {}, None),
    ],
)
def test_image_files_have_the_size_that_a_run_gives_them(tmp_path, sizes, changes, shape):
    write_class_folders(tmp_path / "in", sizes, ".png")
    config = replace(find_recipe("digits"), source="folder", data=tmp_path / "in", **changes)
    if shape is None:
        with pytest.raises(UserError, match="image-size: not given, but folder has images of many sizes; give --image"):
            data_size(config, print)
        return
    size = data_size(config, print)
    prepared = prepare(open_source("folder", tmp_path / "in"), tmp_path / "out", image_size=config.image_size)
    assert size.image_shape == shape and prepared.image_shape in (None, shape)
    assert size.num_images == 6 * len(sizes)


def test_arrays_in_a_beton_have_their_own_size(tmp_path):
    write_beton(tmp_path / "train.beton", cycled(40), shape=(9, 7, 1))
    size = data_size(replace(find_recipe("digits"), source="beton", data=tmp_path), print)
    assert size.image_shape == (9, 7, 1) and size.num_classes == 3


def test_data_that_are_not_there_are_as_published_and_it_is_said(tmp_path, monkeypatch):
    def missing(name, path):
        raise UserError("no such file")

    monkeypatch.setattr("ensdistill.costs.data_size.open_source", missing)
    notes: list[str] = []
    assert data_size(find_recipe("cifar100-wrn28x4"), notes.append) == PUBLISHED["cifar100"]
    assert notes == ["cifar100: not at hand, planned with its published size"]
    with pytest.raises(UserError, match="no such file"):
        data_size(replace(find_recipe("cifar100-wrn28x4"), data=tmp_path), notes.append)


def test_arrays_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 5), ("test", 7)):
        np.save(tmp_path / f"{split}_images.npy", rng.integers(0, 256, (count, 9, 9, 3), dtype=np.uint8))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(count) % 4)
    config = replace(find_recipe("digits"), source="npy", data=tmp_path)
    size = data_size(config, lambda text: None)
    assert (size.num_classes, size.image_shape) == (4, (9, 9, 3))
    assert (size.num_train, size.num_valid, size.num_test) == (12, 5, 7)

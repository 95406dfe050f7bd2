"""Sizes of data sets: the published ones against data that are counted, and what a configuration changes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ensdistill.config.recipes import RECIPES, find_recipe
from ensdistill.costs.data_size import PUBLISHED, data_size, published_size
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


def test_a_configuration_may_use_fewer_images_of_another_size():
    config = replace(find_recipe("digits"), train_images=50, image_size=6)
    size = data_size(config, lambda text: None)
    assert (size.num_train, size.num_valid, size.image_shape) == (50, 397, (6, 6, 1))
    assert size.num_images == 50 + 397 + 1000


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

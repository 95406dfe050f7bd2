"""Mean and standard deviation are those of the training pixels, or the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_sets import (
    array_source,
    cycled,
    picture,
    refused,
    write_beton,
    write_class_folders,
)

from ensdistill.data import pixel_stats
from ensdistill.data.pixel_stats import KNOWN_STATS
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.base import BetonRows, Split
from ensdistill.data.sources.registry import open_source

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_pixel_stats_of_arrays_are_exact(tmp_path: Path) -> None:
    source = array_source((5, 7, 3))
    dataset = prepare(source, tmp_path)
    values = np.asarray(source.splits["train"].images, np.float64) / 255
    assert dataset.pixel_mean == pytest.approx(values.mean(axis=(0, 1, 2)), rel=1e-12)
    assert dataset.pixel_std == pytest.approx(values.std(axis=(0, 1, 2)), rel=1e-12)


def test_pixel_stats_of_known_data_are_the_published_ones(tmp_path: Path) -> None:
    dataset = prepare(array_source(name="cifar100"), tmp_path)
    assert dataset.pixel_mean == (0.5072, 0.4866, 0.4410) and dataset.pixel_std == (0.2673, 0.2564, 0.2760)
    assert set(KNOWN_STATS) == {"cifar10", "cifar100", "imagenet", "tiny-imagenet"}


def test_images_of_one_value_are_refused(tmp_path: Path) -> None:
    source = array_source()
    images = source.splits["train"].images
    assert isinstance(images, np.ndarray)
    images[..., 1] = 9
    refused(lambda: prepare(source, tmp_path), "here", "channel 1", "one value everywhere")


def test_pixel_stats_of_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class_folders(tmp_path / "in", [(20, 20)] * 4, ".png")
    source = open_source("folder", tmp_path / "in")
    values = np.stack([np.asarray(picture(20, 20, 10 * i + label), float) / 255 for label in (0, 1) for i in range(4)])
    mean, std = pixel_stats.pixel_stats("folder", source.splits["train"], 2)
    assert mean == pytest.approx(values.mean(axis=(0, 1, 2))) and std == pytest.approx(values.std(axis=(0, 1, 2)))
    monkeypatch.setattr(pixel_stats, "MAX_MEASURED", 3)  # the first, a middle one and the last
    mean, _ = pixel_stats.pixel_stats("folder", source.splits["train"], 2)
    assert mean == pytest.approx(values[[0, 3, 7]].mean(axis=(0, 1, 2)))


def test_pixel_stats_of_rows_of_a_file(tmp_path: Path) -> None:
    images = write_beton(tmp_path / "a.beton", cycled(20))
    rows = BetonRows(path=tmp_path / "a.beton", indices=range(3, 20, 2))
    mean, _ = pixel_stats.pixel_stats("beton", Split(images=rows, labels=cycled(20)[3::2], origin="a"), 1)
    assert mean == pytest.approx(images[3::2].mean(axis=(0, 1, 2)) / 255)

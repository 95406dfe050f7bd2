"""CIFAR-10-C's folders: the images that they hold in order, and every folder that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_sets import refused

from ensdistill.data.corruptions.stored import CIFAR10_CLASSES, COMMON, EXTRA, StoredCorruptions

N, SHAPE = 20, (4, 5, 3)
LABELS = np.arange(N) % 10


def images_of(name: str, severity: int) -> np.ndarray:
    seed = [*name.encode(), severity]
    return np.random.default_rng(seed).integers(0, 256, (N, *SHAPE), dtype=np.uint8)


def write(folder: Path, names: tuple[str, ...] = ("fog", "gaussian_noise")) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        np.save(folder / f"{name}.npy", np.concatenate([images_of(name, severity) for severity in range(1, 6)]))
    np.save(folder / "labels.npy", np.tile(LABELS, 5).astype(np.uint8))
    return folder


def open_it(folder: Path, said: list[str] | None = None, **changes: Any) -> StoredCorruptions:
    said = [] if said is None else said
    values: dict[str, Any] = {"image_shape": SHAPE, "class_names": CIFAR10_CLASSES, "batch_size": 8}
    return StoredCorruptions(folder, **(values | changes), say=said.append, warn=lambda text: said.append(f"! {text}"))


def test_images_of_each_severity_come_in_order_in_any_batches(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for batch_size in (7, N):
        corrupted = open_it(folder, batch_size=batch_size)
        assert corrupted.names == ("gaussian_noise", "fog") and corrupted.num_images == N  # in the published order
        for severity in (1, 5):
            batches = list(corrupted.batches("fog", severity))
            assert torch.equal(
                torch.cat([images for images, _ in batches]), torch.from_numpy(images_of("fog", severity))
            )
            assert torch.cat([labels for _, labels in batches]).tolist() == LABELS.tolist()


def test_the_mean_is_the_published_one_or_it_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    corrupted = open_it(write(tmp_path / "all", (*COMMON, *EXTRA)), said)
    assert corrupted.names == COMMON and corrupted.extra == EXTRA
    assert len(said) == 1 and "left out of the mean" in said[0]
    said.clear()
    corrupted = open_it(write(tmp_path / "some", (*COMMON[:13], "rain")), said)
    assert corrupted.names == (*COMMON[:13], "rain")
    assert "! " in said[0] and "2 of the 15 corruptions" in said[0] and "pixelate, jpeg_compression" in said[0]
    assert "rain: not among those that published means are of" in said[1]
    said.clear()
    assert open_it(write(tmp_path / "own", ("rain",)), said).names == ("rain",) and not said


def test_labels_are_taken_by_name_where_there_are_names(tmp_path: Path) -> None:
    folder, said = write(tmp_path), list[str]()
    turned = CIFAR10_CLASSES[::-1]
    corrupted = open_it(folder, said, class_names=turned)
    (_, labels), *_ = corrupted.batches("fog", 1)
    assert [turned[label] for label in labels] == [CIFAR10_CLASSES[label] for label in LABELS[:8]]
    assert "by their names" in said[-1]
    (_, labels), *_ = open_it(folder, said, class_names=tuple(map(str, range(10)))).batches("fog", 1)
    assert labels.tolist() == LABELS[:8].tolist() and "in the order of the data's classes" in said[-1]


def test_images_are_not_read_before_they_are_shown(tmp_path: Path) -> None:
    corrupted = open_it(write(tmp_path))
    assert isinstance(corrupted._open("fog"), np.memmap)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    refused(lambda: open_it(tmp_path / "nowhere"), "nowhere: no such folder", "CIFAR-10-C")
    (tmp_path / "empty").mkdir()
    refused(lambda: open_it(tmp_path / "empty"), "holds no .npy file", "gaussian_noise.npy")
    folder = write(tmp_path / "a")
    (folder / "labels.npy").unlink()
    refused(lambda: open_it(folder), "labels.npy is missing")


def test_files_of_another_length_type_or_shape_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    whole = np.load(folder / "fog.npy")
    for changed, parts in (
        (whole[: 4 * N], ("80 images; expected 100, five times the 20",)),
        (whole.astype(np.float32), ("images are float32; expected uint8",)),
        (whole[:, :, :4], ("images of 4x4 pixels and 3 channels; expected 4x5 and 3",)),
        (whole[..., 0], ("images of 4x5 pixels and 1 channels; expected 4x5 and 3",)),
        (whole.reshape(5, N, *SHAPE), ("images have shape",)),
    ):
        np.save(folder / "fog.npy", changed)
        refused(lambda: open_it(folder), "fog.npy: ", *parts)
    (folder / "fog.npy").write_bytes((folder / "gaussian_noise.npy").read_bytes()[:-9])
    refused(lambda: open_it(folder), "fog.npy: cannot be read")
    (folder / "fog.npy").write_bytes(b"PK\x03\x04 a picture")
    refused(lambda: open_it(folder), "fog.npy: cannot be read")


def test_labels_of_something_else_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for changed, part in (
        (np.tile(LABELS, 5)[:-1], "99 labels; expected those of N images five times"),
        (np.arange(5 * N) % 7, "its fifths differ"),
        (np.tile(LABELS + 1, 5), "labels 1 to 10; expected 0 to 9"),
        (np.tile(LABELS, 5).astype(float), "float64 of shape (100,); expected integer labels"),
        (np.tile(LABELS % 5, 5), "labels of 5 classes; expected the networks' 10"),
    ):
        np.save(folder / "labels.npy", changed)
        refused(lambda: open_it(folder), "labels.npy: ", part)
    np.save(folder / "labels.npy", np.tile(LABELS, 5))
    refused(lambda: open_it(folder, class_names=tuple(map(str, range(100)))), "labels of 10 classes", "networks' 100")
    said: list[str] = []
    np.save(folder / "labels.npy", np.tile(np.minimum(LABELS, 8), 5))
    open_it(folder, said)
    assert "1 of the networks' 10 classes have no image" in said[1]

"""Digits, Fashion-MNIST's idx files and .npy pairs give their images in the documented splits."""

from __future__ import annotations

import gzip
import importlib.metadata
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import (
    content_of,
    pixels,
    refused,
    write_npy,
)

from ensdistill.data.sources import arrays
from ensdistill.data.sources.registry import open_source, recognise

NUM_TRAIN, NUM_VALID, NUM_TEST = 15, 5, 7  # images of the small Fashion-MNIST; train includes valid


def test_digits_are_scikit_learns_in_file_order() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    content = content_of("digits")
    assert {name: len(split.labels) for name, split in content.splits.items()} == {
        "train": 400,
        "valid": 397,
        "test": 1000,
    }
    images = np.concatenate([pixels(content.splits[name]) for name in ("train", "valid", "test")])
    labels = np.concatenate([content.splits[name].labels for name in ("train", "valid", "test")])
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(np.rint(images[..., 0] * (16 / 255)), digits.images)
    assert images.max() == 255
    assert np.array_equal(labels, digits.target)
    assert content.class_names == tuple("0123456789")


def test_digits_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: open_source("digits", tmp_path), "come with scikit-learn", "leave --data out")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    refused(lambda: open_source("digits"), "scikit-learn is missing", "pip install scikit-learn")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[np.ndarray]]:
    monkeypatch.setattr(arrays, "FASHION_MNIST_TRAIN", NUM_TRAIN - NUM_VALID)
    monkeypatch.setattr(arrays, "FASHION_MNIST_VALID", NUM_VALID)
    monkeypatch.setattr(arrays, "FASHION_MNIST_TEST", NUM_TEST)
    rng = np.random.default_rng(0)
    written = []
    for name, shape in zip(
        arrays.IDX_FILES, [(NUM_TRAIN, 5, 7), (NUM_TRAIN,), (NUM_TEST, 5, 7), (NUM_TEST,)], strict=True
    ):
        written.append(rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8))
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(written[-1])))
    return tmp_path, written


def test_fashion_mnist_reads_idx_files(fashion: tuple[Path, list[np.ndarray]]) -> None:
    folder, (images, labels, test_images, test_labels) = fashion
    plain = folder / arrays.IDX_FILES[3]  # files that were unpacked are read too
    plain.write_bytes(gzip.decompress((folder / f"{plain.name}.gz").read_bytes()))
    (folder / f"{plain.name}.gz").unlink()
    assert recognise(folder) == "fashion-mnist"
    splits = content_of("fashion-mnist", folder).splits
    assert np.array_equal(pixels(splits["train"])[..., 0], images[:-NUM_VALID])
    assert np.array_equal(pixels(splits["valid"])[..., 0], images[-NUM_VALID:])
    assert np.array_equal(pixels(splits["test"])[..., 0], test_images)
    assert np.array_equal(splits["valid"].labels, labels[-NUM_VALID:])
    assert np.array_equal(splits["test"].labels, test_labels)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), ("damaged or truncated", "download it again")),
        (lambda file: file.write_bytes(file.read_bytes()[:7]), ("damaged or truncated",)),
        (lambda file: file.write_bytes(b"not gzip at all"), ("damaged or truncated",)),
        (lambda file: file.write_bytes(gzip.compress(b"\0\0\x0d\x03")), ("not an idx file of bytes",)),
        (lambda file: file.write_bytes(gzip.compress(b"\0")), ("not an idx file of bytes",)),
        (
            lambda file: file.write_bytes(gzip.compress(idx_bytes(np.ones((15, 5, 7), np.uint8))[:-1])),
            ("expected 525",),
        ),
        (lambda file: file.write_bytes(gzip.compress(idx_bytes(np.ones((14, 5, 7), np.uint8)))), ("(14, 5, 7)", "15")),
        (lambda file: file.write_bytes(gzip.compress(idx_bytes(np.ones(15, np.uint8)))), ("(15,)", "3 axes")),
        (lambda file: file.unlink(), ("Fashion-MNIST is missing", "dataset-fashion-mnist", "--data")),
    ],
)
def test_fashion_mnist_mistakes(
    fashion: tuple[Path, list[np.ndarray]], damage: Callable[[Path], object], parts: tuple[str, ...]
) -> None:
    folder, _ = fashion
    damage(folder / f"{arrays.IDX_FILES[0]}.gz")
    refused(lambda: content_of("fashion-mnist", folder), "train-images-idx3-ubyte", *parts)


def test_labels_out_of_range_are_named(fashion: tuple[Path, list[np.ndarray]]) -> None:
    folder, (_, labels, _, _) = fashion
    labels[4] = 10
    (folder / f"{arrays.IDX_FILES[1]}.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    refused(lambda: content_of("fashion-mnist", folder), "label 10 of train image 4 is out of range", "0 to 9")


@pytest.mark.skipif(
    not arrays.FASHION_MNIST_FOLDER.is_dir(),
    reason=f"needs Debian's dataset-fashion-mnist in {arrays.FASHION_MNIST_FOLDER}",
)
def test_fashion_mnist_of_debian() -> None:
    content = content_of("fashion-mnist")
    shapes = {name: pixels(split).shape for name, split in content.splits.items()}
    assert shapes == {"train": (55_000, 28, 28, 1), "valid": (5_000, 28, 28, 1), "test": (10_000, 28, 28, 1)}
    labels = np.concatenate([content.splits[name].labels for name in ("train", "valid")])
    assert (np.bincount(labels) == 6_000).all() and (np.bincount(content.splits["test"].labels) == 1_000).all()
    assert labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert pixels(content.splits["train"]).mean() / 255 == pytest.approx(0.286, abs=1e-3)


def test_npy_pair_is_split_class_by_class(tmp_path: Path) -> None:
    images, labels = write_npy(tmp_path, "", 63)
    for path in (tmp_path, tmp_path / "images.npy"):
        assert recognise(path) == "npy"
    content = content_of("npy", tmp_path)
    assert content.class_names == ("0", "1", "2")
    assert {name: len(split.labels) for name, split in content.splits.items()} == {"train": 54, "valid": 3, "test": 6}
    assert np.array_equal(pixels(content.splits["test"]), images[57:])
    assert np.array_equal(pixels(content.splits["valid"]), images[54:57])
    assert np.array_equal(pixels(content.splits["train"]), images[:54])
    assert np.array_equal(content.splits["test"].labels, labels[57:])
    assert "test split is the last 6" in content.note and "valid split is the last 3" in content.note


def test_npy_with_splits_of_their_own(tmp_path: Path) -> None:
    train, _ = write_npy(tmp_path, "train_", 30)
    valid, _ = write_npy(tmp_path, "val_", 6, seed=1)
    content = content_of("npy", tmp_path)  # what was set apart is the test split
    assert np.array_equal(pixels(content.splits["test"]), valid)
    assert np.array_equal(pixels(content.splits["valid"]), train[27:])
    assert "the valid images are the test split" in content.note
    test, _ = write_npy(tmp_path, "test_", 9, seed=2)
    content = content_of("npy", tmp_path)
    assert np.array_equal(pixels(content.splits["train"]), train)
    assert np.array_equal(pixels(content.splits["valid"]), valid)
    assert np.array_equal(pixels(content.splits["test"]), test)
    assert content.note == ""


def test_npy_of_grey_images(tmp_path: Path) -> None:
    images, _ = write_npy(tmp_path, "", 30)
    np.save(tmp_path / "images.npy", images[..., 0])
    assert pixels(content_of("npy", tmp_path).splits["train"]).shape == (24, 5, 7, 1)


def test_npy_mistakes(tmp_path: Path) -> None:
    refused(lambda: open_source("npy"), "no folder was given", "images.npy and labels.npy")
    refused(lambda: open_source("npy", tmp_path), "no pair of .npy files", "train_images.npy")
    images, labels = write_npy(tmp_path, "", 30)
    images_file, labels_file = tmp_path / "images.npy", tmp_path / "labels.npy"

    def broken(images: np.ndarray, labels: np.ndarray, *parts: str) -> None:
        np.save(images_file, images)
        np.save(labels_file, labels)
        refused(lambda: content_of("npy", tmp_path), *parts)

    broken(images.astype(np.float32), labels, str(images_file), "float32", "uint8")
    broken(images.transpose(0, 3, 1, 2), labels, "(30, 3, 5, 7)", "move the channels to the end")
    broken(images[..., :2], labels, "(30, 5, 7, 2)", "C 1 or 3")
    broken(images[0, 0, 0], labels, "(3,)", "(N, H, W)")
    broken(images, labels[:-1], str(labels_file), "29 labels; expected 30")
    broken(images, labels.astype(np.float64), str(labels_file), "float64", "integer labels")
    broken(images, labels[:, None], str(labels_file), "(30, 1)", "(N,)")
    broken(images, labels + 1, "labels reach 3 but no training image has label 0", "without gaps")
    broken(images, labels * 2, "labels reach 4 but no training image has label 1")
    broken(images, labels * 10**12, "no training image has label 1")
    broken(images, labels - 1, "label -1 is negative")
    broken(images, labels * 0, "all labels are 0", "at least two classes")
    broken(images[:0], labels[:0], "no training image")
    broken(images, np.array([1, *[0] * 29]), "class 1 has too few images", "at least 3")
    np.save(labels_file, np.array([{}, {}], dtype=object), allow_pickle=True)
    refused(lambda: content_of("npy", tmp_path), str(labels_file), "cannot be read", "numpy.save")
    np.save(labels_file, labels)
    whole = images_file.read_bytes()
    np.save(images_file, images)
    for damaged in (images_file.read_bytes()[:-5], whole[:20], b"", b"no numpy", whole.replace(b"}", b" ")):
        images_file.write_bytes(damaged)
        refused(lambda: content_of("npy", tmp_path), str(images_file), "cannot be read")
    for sides in ((1 << 63, 5, 7, 3), (-1, 5, 7, 3), (1 << 40, 5, 7, 3)):
        with images_file.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": sides})
            file.write(bytes(64))
        refused(lambda: content_of("npy", tmp_path), str(images_file), "cannot be read")
    with images_file.open("wb") as file:
        np.savez(file, images, labels)
    refused(lambda: content_of("npy", tmp_path), str(images_file), "holds several arrays")
    labels_file.unlink()
    refused(lambda: open_source("npy", tmp_path), str(images_file), "labels are missing", "labels.npy")


def test_npy_splits_must_agree(tmp_path: Path) -> None:
    write_npy(tmp_path, "train_", 30)
    images, _ = write_npy(tmp_path, "test_", 9)
    np.save(tmp_path / "test_images.npy", images[:, :4])
    refused(lambda: content_of("npy", tmp_path), "test_images.npy", "(4, 7, 3)", "(5, 7, 3)")


def test_npy_splits_of_other_names(tmp_path: Path) -> None:
    train, _ = write_npy(tmp_path, "Training_", 30)
    test, _ = write_npy(tmp_path, "testset_", 9, seed=1)
    content = content_of("npy", tmp_path)
    assert np.array_equal(pixels(content.splits["test"]), test)
    assert np.array_equal(pixels(content.splits["train"]), train[:27])
    write_npy(tmp_path, "more_", 9)
    refused(lambda: open_source("npy", tmp_path), "more_images.npy is neither train, valid nor test", "rename it")
    (tmp_path / "more_images.npy").unlink()
    write_npy(tmp_path, "", 9)
    refused(lambda: open_source("npy", tmp_path), "both Training_images.npy and images.npy are train")


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_an_idx_file_that_unpacks_to_too_much_is_refused(
    fashion: tuple[Path, list[np.ndarray]], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = fashion
    monkeypatch.setattr(arrays, "MAX_IDX_BYTES", 1 << 20)
    file = folder / f"{arrays.IDX_FILES[0]}{suffix}"
    (folder / f"{arrays.IDX_FILES[0]}.gz").unlink()
    data = idx_bytes(np.zeros((60_000, 28, 28), np.uint8))
    file.write_bytes(gzip.compress(data) if suffix else data)
    del data
    tracemalloc.start()
    refused(lambda: content_of("fashion-mnist", folder), f"{file}: more than 1,048,576 bytes", "download it again")
    assert tracemalloc.get_traced_memory()[1] < 6e6
    tracemalloc.stop()

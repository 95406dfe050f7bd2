"""Sources of arrays: scikit-learn's digits, Fashion-MNIST's idx files, pairs of .npy files."""

from __future__ import annotations

import gzip
import importlib.metadata
import math
import zlib
from pathlib import Path

import numpy as np

from ensdistill.data.sources.base import (
    SPLIT_NAMES,
    Content,
    Source,
    Split,
    check_classes_present,
    check_images,
    complete_splits,
    first_line,
)
from ensdistill.data.sources.content_hash import hash_named
from ensdistill.data.sources.split_folders import split_of
from ensdistill.runtime.errors import UserError

# scikit-learn's digits in file order: 1,797 images.
DIGITS_TRAIN, DIGITS_VALID, DIGITS_TEST = 400, 397, 1_000
DIGITS_MAX_VALUE = 16

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_TRAIN, FASHION_MNIST_VALID, FASHION_MNIST_TEST = 55_000, 5_000, 10_000
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MAX_IDX_BYTES = 1 << 28
"""Largest size of an unpacked idx file; Fashion-MNIST's images have 47 million bytes."""
IDX_FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip


def open_digits(path: Path | None) -> Source:
    """scikit-learn's digits: 8×8 grey, 0…16 brought to 0…255; 400 train, 397 valid, 1,000 test, in file order.

    Raises:
        UserError: scikit-learn is not installed, or a path was given.
    """
    if path is not None:
        raise UserError(f"{path}: the digits come with scikit-learn and are read from no file; leave --data out")
    try:
        version = importlib.metadata.version("scikit-learn")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "digits: scikit-learn is missing, and the images come with it; pip install scikit-learn"
        ) from error
    return Source(name="digits", fingerprint=f"scikit-learn {version}", read=_read_digits)


def _read_digits() -> Content:
    from sklearn.datasets import load_digits  # seconds, and only these images need it

    digits = load_digits()
    images = np.rint(digits.images * (255 / DIGITS_MAX_VALUE)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    assert len(labels) == DIGITS_TRAIN + DIGITS_VALID + DIGITS_TEST, "scikit-learn's digits have changed"
    cuts = np.cumsum([DIGITS_TRAIN, DIGITS_VALID])
    parts = zip(SPLIT_NAMES, np.split(images, cuts), np.split(labels, cuts), strict=True)
    splits = {name: Split(images=x_NHWC, labels=y_N, origin="digits") for name, x_NHWC, y_N in parts}
    return Content(class_names=tuple("0123456789"), splits=splits)


def open_fashion_mnist(path: Path | None) -> Source:
    """Fashion-MNIST's four idx files, gzipped or not: 55,000 train, the last 5,000 valid, 10,000 test.

    Raises:
        UserError: a file is missing; when they are read: damaged, truncated, of other counts.
    """
    folder = path if path is not None else FASHION_MNIST_FOLDER
    files = []
    for name in IDX_FILES:
        found = [folder / file for file in (f"{name}.gz", name) if (folder / file).is_file()]
        if not found:
            raise UserError(
                f"Fashion-MNIST is missing: {folder} holds no {name}.gz; install Debian's package "
                "dataset-fashion-mnist, or download the four files from the data set's page (Zalando Research) and "
                "pass their folder with --data"
            )
        files.append(found[0])
    return Source(
        name="fashion-mnist",
        fingerprint=lambda: hash_named(files),
        read=lambda: _read_fashion_mnist(files),
    )


def _read_fashion_mnist(files: list[Path]) -> Content:
    arrays = [read_idx(file) for file in files]
    for start, expected in ((0, FASHION_MNIST_TRAIN + FASHION_MNIST_VALID), (2, FASHION_MNIST_TEST)):
        for array, file, num_axes in zip(arrays[start : start + 2], files[start : start + 2], (3, 1), strict=True):
            if array.ndim != num_axes or len(array) != expected:
                raise UserError(
                    f"{file}: an array of shape {array.shape}; expected {num_axes} axes and {expected} entries: "
                    "download it again"
                )
    images, labels, test_images, test_labels = arrays
    parts = {
        "train": (images[:FASHION_MNIST_TRAIN], labels[:FASHION_MNIST_TRAIN]),
        "valid": (images[FASHION_MNIST_TRAIN:], labels[FASHION_MNIST_TRAIN:]),
        "test": (test_images, test_labels),
    }
    origin = str(files[0].parent)
    splits = {
        name: Split(images=x_NHW[..., None], labels=y_N.astype(np.int64), origin=origin)
        for name, (x_NHW, y_N) in parts.items()
    }
    return Content(class_names=FASHION_MNIST_CLASSES, splits=splits)


def read_idx(path: Path) -> np.ndarray:
    """Read the uint8 array of an idx file (gzipped where its name ends in .gz).

    The format: two zero bytes, a type byte (8: uint8), the number of axes, each length as big-endian int32, the values.

    Raises:
        UserError: damaged, truncated, or not such a file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_IDX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: damaged or truncated ({first_line(error)}); expected a gzipped idx file: download it again"
        ) from error
    if len(data) > MAX_IDX_BYTES:
        raise UserError(
            f"{path}: more than {MAX_IDX_BYTES:,} bytes; expected a file of Fashion-MNIST, which is smaller: download "
            "it again"
        )
    num_axes = data[3] if len(data) > 3 else 0
    if len(data) < 4 + 4 * num_axes or data[:3] != b"\0\0\x08" or num_axes not in (1, 3):
        raise UserError(
            f"{path}: not an idx file of bytes (it starts with {data[:4]!r}); expected images or labels in idx form"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", num_axes, offset=4))
    values = len(data) - 4 - 4 * num_axes
    if values != math.prod(shape):
        raise UserError(
            f"{path}: {values} values; expected {math.prod(shape)} for shape {shape}: the file is truncated"
        )
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def open_npy(path: Path | None) -> Source:
    """A folder with images.npy and labels.npy, or with train_images.npy, train_labels.npy (and valid_…, test_…).

    Images are (N, H, W) or (N, H, W, C) uint8, labels (N,) integers from 0 to K-1. Missing splits are split off
    (`complete_splits`).

    Raises:
        UserError: files are missing; when they are read: damaged, another type or shape, labels with gaps.
    """
    if path is None:
        raise UserError("npy: no folder was given; expected one with images.npy and labels.npy: pass it with --data")
    folder = path.parent if path.is_file() else path
    pairs = find_npy(folder)
    if "train" not in pairs:
        raise UserError(
            f"{folder}: no pair of .npy files; expected images.npy and labels.npy, or train_images.npy and "
            "train_labels.npy (and valid_…, test_…)"
        )
    files = [file for pair in pairs.values() for file in pair]
    return Source(
        name="npy",
        fingerprint=lambda: hash_named(files),
        read=lambda: _read_npy(pairs),
    )


def find_npy(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Find the files (images, labels) of each split that lie in a folder.

    Raises:
        UserError: a file of images without its labels, two for one split, or beside train one of an unknown split.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    unknown = []
    for images in sorted(folder.glob("*images.npy")):
        prefix = images.name.removesuffix("images.npy")
        split = split_of(prefix) if prefix else "train"
        if split is None:
            unknown.append(images.name)
            continue
        labels = folder / f"{prefix}labels.npy"
        if not labels.is_file():
            raise UserError(f"{images}: its labels are missing; expected {labels.name} beside it")
        if split in pairs:
            raise UserError(f"{folder}: both {pairs[split][0].name} and {images.name} are {split}; expected one")
        pairs[split] = (images, labels)
    if "train" in pairs and unknown:
        raise UserError(
            f"{folder}: {unknown[0]} is neither train, valid nor test by its name; expected train_images.npy, "
            "valid_images.npy and test_images.npy: rename it, or move it away"
        )
    return pairs


def _read_npy(pairs: dict[str, tuple[Path, Path]]) -> Content:
    splits = {name: _read_pair(*pair) for name, pair in pairs.items()}
    num_classes = 1 + max(int(split.labels.max(initial=0)) for split in splits.values())
    check_classes_present(splits["train"].labels, num_classes, splits["train"].origin)
    shapes = {name: split.images.shape[1:] for name, split in splits.items() if isinstance(split.images, np.ndarray)}
    for name, shape in shapes.items():
        if shape != shapes["train"]:
            raise UserError(f"{splits[name].origin}: images of shape {shape}; expected {shapes['train']} as in train")
    complete, note = complete_splits(splits)
    return Content(class_names=tuple(map(str, range(num_classes))), splits=complete, note=note)


def _read_pair(images_file: Path, labels_file: Path) -> Split:
    images, labels = load_npy(images_file), load_npy(labels_file)
    if images.ndim == 3:
        images = images[..., None]
    check_images(images, str(images_file))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{labels_file}: {labels.dtype} of shape {labels.shape}; expected integer labels of shape (N,)")
    if len(labels) != len(images):
        raise UserError(
            f"{labels_file}: {len(labels)} labels; expected {len(images)}, one an image of {images_file.name}"
        )
    return Split(images=images, labels=labels.astype(np.int64), origin=str(images_file))


def load_npy(path: Path) -> np.ndarray:
    """Map the array of a .npy file; its values are read when they are looked at.

    Raises:
        UserError: damaged, or not one array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy raise many kinds, its tokeniser's among them
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); expected an array that numpy.save has written"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: holds several arrays; expected one that numpy.save has written")
    return array

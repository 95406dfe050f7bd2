"""Sources: named splits of images and labels, checked once, and the rule that splits images off."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ensdistill.runtime.errors import UserError

SPLIT_NAMES = ("train", "valid", "test")
# A split that is missing takes a tenth of what it is split off from, and never more than ImageNet's own validation set.
HELD_OUT_FRACTION = 0.1
MAX_HELD_OUT = 50_000
SUBSET_KEY = 0
"""Key of the random choice of a subset."""


@dataclass(frozen=True, kw_only=True)
class BetonRows:
    """Images that lie in an existing `.beton` and are used where they are."""

    path: Path
    """The `.beton` that the images lie in."""
    indices: range | np.ndarray | None
    """The rows that belong to the split, a range or int64 (N,); None for all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The images and labels of one split."""

    images: np.ndarray | tuple[Path, ...] | BetonRows
    """Images, uint8 (N, H, W, C), or N image files, or rows of an existing `.beton`."""
    labels: np.ndarray
    """Labels, int64 (N,)."""
    origin: str
    """The file or folder that they were read from, for messages."""

    def take(self, rows: np.ndarray) -> Split:
        """Return the split of the given rows, an index array, in that order."""
        assert not isinstance(self.images, BetonRows)
        images = tuple(self.images[i] for i in rows) if isinstance(self.images, tuple) else self.images[rows]
        return Split(images=images, labels=self.labels[rows], origin=self.origin)


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """Classes and splits of a source that was read."""

    class_names: tuple[str, ...]
    """A name for each label, in order."""
    splits: Mapping[str, Split]
    """The splits train, valid and test, by name."""
    image_shape: tuple[int, int, int] | None = None
    """Shape (H, W, C) that all image files are known to have; None where they must be looked at, and for arrays."""
    note: str = ""
    """Line on how the splits came about, where that is not the data set's own definition."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Images with labels in the form in which people have them. Nothing is read before `content` is asked for."""

    name: str
    """Name of the source in `registry.SOURCES`."""
    fingerprint: str | Callable[[], str]
    """Hash of names, labels and bytes of the data, or the function that finds it."""
    read: Callable[[], Content]
    """Function that reads the data."""

    @cached_property
    def content_key(self) -> str:
        """Hash that changes when the data change; found once."""
        return self.fingerprint if isinstance(self.fingerprint, str) else self.fingerprint()

    @cached_property
    def content(self) -> Content:
        """The data, read at first use and checked.

        Raises:
            UserError: an empty split, a label out of range, an array of another type or shape.
        """
        content = self.read()
        for name in SPLIT_NAMES:
            _check_split(content.splits[name], name, len(content.class_names))
        return content

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each label, in order."""
        return self.content.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.content.class_names)

    @property
    def splits(self) -> Mapping[str, Split]:
        """The splits train, valid and test, by name."""
        return self.content.splits


def _check_split(split: Split, name: str, num_classes: int) -> None:
    labels = split.labels
    if not len(labels):
        raise UserError(f"{split.origin}: the {name} split is empty; expected at least one image")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise UserError(
            f"{split.origin}: label {labels[outside[0]]} of {name} image {outside[0]} is out of range; "
            f"expected 0 to {num_classes - 1}"
        )
    if isinstance(split.images, np.ndarray):
        check_images(split.images, split.origin)
    if not isinstance(split.images, BetonRows) and len(split.images) != len(labels):
        raise UserError(
            f"{split.origin}: {len(split.images)} images but {len(labels)} labels; expected one label an image"
        )


def check_images(images: np.ndarray, origin: str) -> None:
    """Check that an array is (N, H, W, C) uint8 with one or three channels.

    Raises:
        UserError: it is not.
    """
    if images.dtype != np.uint8:
        raise UserError(f"{origin}: images are {images.dtype}; expected uint8 values from 0 to 255")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        hint = "; move the channels to the end" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
        raise UserError(
            f"{origin}: images have shape {images.shape}; expected (N, H, W) or (N, H, W, C) with C 1 or 3{hint}"
        )


def check_classes_present(labels: np.ndarray, num_classes: int, origin: str) -> None:
    """Check that each of 0 … K-1 is there, where K was inferred from the labels.

    Raises:
        UserError: a class has no image, as where labels start at 1, or there is one class only.
    """
    if len(labels) and labels.min() < 0:
        raise UserError(f"{origin}: label {labels.min()} is negative; expected 0 to K-1")
    present = np.unique(labels)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    missing = int(gaps[0]) if len(gaps) else len(present)
    if missing < num_classes:
        raise UserError(
            f"{origin}: labels reach {num_classes - 1} but no training image has label {missing}; "
            "expected each of 0 to K-1: number the classes from 0 without gaps"
        )
    if num_classes < 2:
        raise UserError(f"{origin}: all labels are 0; expected at least two classes")


def hold_out(labels: np.ndarray, *, origin: str) -> tuple[np.ndarray, np.ndarray]:
    """Split rows in two, class by class: (rows that stay, rows that are held out), both in order.

    Held out are the last tenth of each class, at least one image, and fewer where a tenth of all would be more than
    `MAX_HELD_OUT`. No randomness: the same labels always give the same rows.

    Raises:
        UserError: a class has one image only.
    """
    counts = np.bincount(labels)
    if (counts == 1).any():
        raise UserError(
            f"{origin}: class {int(np.argmax(counts == 1))} has too few images to split some off; "
            "expected at least 3 a class, or a split of their own (train, valid, test)"
        )
    fraction = min(HELD_OUT_FRACTION, MAX_HELD_OUT / len(labels))
    num_held = np.maximum(1, (counts * fraction).astype(np.int64))
    order = np.argsort(labels, kind="stable")
    rank_from_end = counts.cumsum()[labels[order]] - 1 - np.arange(len(labels))
    held = np.zeros(len(labels), bool)
    held[order] = rank_from_end < num_held[labels[order]]
    return np.flatnonzero(~held), np.flatnonzero(held)


def stratified_rows(labels: np.ndarray, num_rows: int) -> np.ndarray:
    """Choose rows so that each class keeps its share, and at least one image; returns int64 (num_rows,), in order.

    The choice is random with a key of its own: the same labels always give the same rows, and fewer rows are a subset
    of more. `num_rows` is at least the number of classes.
    """
    order = np.random.default_rng(SUBSET_KEY).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, in random order
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - (counts.cumsum() - counts)[labels[order]]
    place = np.where(rank == 0, 0, (rank + 0.5) / counts[labels[order]])
    return np.sort(order[np.argsort(place, kind="stable")][:num_rows])


def complete_splits(given: Mapping[str, Split]) -> tuple[dict[str, Split], str]:
    """Make train, valid and test from the splits that are there, with a line that says how.

    Data that were set apart are the test split (as for CIFAR, Tiny ImageNet and ImageNet); the validation split is
    then taken off the training split. Of training data alone, first the test and then the validation split is taken.
    """
    splits, notes = dict(given), []
    if "test" not in splits and "valid" in splits:
        splits["test"] = splits.pop("valid")
        notes.append("the valid images are the test split")
    for name in ("test", "valid"):
        if name not in splits:
            train = splits["train"]
            rows, held = hold_out(train.labels, origin=train.origin)
            splits["train"], splits[name] = train.take(rows), train.take(held)
            notes.append(f"the {name} split is the last {len(held)} of train, class by class")
    return splits, "; ".join(notes)


def readable(path: str | Path) -> str:
    """Return a path for a message, whatever bytes are in its name."""
    return os.fsencode(path).decode("utf-8", "replace")


def first_line(error: Exception) -> str:
    """First line of an error's message, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")

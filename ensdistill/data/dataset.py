"""A prepared data set: places and contents of its `.beton` files, as `dataset.json` keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ensdistill.data.sources.base import SPLIT_NAMES, stratified_rows
from ensdistill.data.sources.content_hash import file_hash
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write, read_json, require_digest, with_digest

DATASET_FILE = "dataset.json"
FORMAT = 1
ORDERED = frozenset({"digits", "fashion-mnist", "cifar10", "cifar100"})
"""Sources whose own order is the definition of a subset."""


class StoredSplit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One split in a `.beton`."""

    path: Path
    """The `.beton` that holds the split."""
    runs: tuple[tuple[int, int, int], ...] | None = msgspec.field(name="indices")
    """The rows of the file that are the split: start, stop and step of one range after another; None for all."""
    num_images: int
    """Number of images in the split."""
    num_bytes: int
    """Size of the whole file in bytes."""
    checksum: str
    """Hash of the whole file, `sha256:…`."""

    @property
    def indices(self) -> range | np.ndarray | None:
        """The rows of the file that are the split, a range or int64 (N,); None for all."""
        if self.runs is None:
            return None
        ranges = [range(*run) for run in self.runs]
        return ranges[0] if len(ranges) == 1 else np.concatenate([np.arange(*run) for run in self.runs])


def runs_of(indices: range | np.ndarray | None) -> tuple[tuple[int, int, int], ...] | None:
    """Return the `StoredSplit.runs` of rows in increasing order."""
    if indices is None:
        return None
    if isinstance(indices, range):
        return ((indices.start, indices.stop, indices.step),)
    pieces = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return tuple((int(piece[0]), int(piece[-1]) + 1, 1) for piece in pieces)


class DataSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Images and labels, ready to be fed."""

    name: str
    """Name of the source in `registry.SOURCES`."""
    class_names: tuple[str, ...]
    """A name for each label, in order."""
    splits: Mapping[str, StoredSplit]
    """The splits train, valid and test, by name."""
    image_shape: tuple[int, int, int] | None
    """Shape (H, W, C) of every image; None where sizes vary and a crop decides."""
    pixel_mean: tuple[float, ...]
    """Mean of each channel over the training pixels, of values in [0, 1]."""
    pixel_std: tuple[float, ...]
    """Standard deviation of each channel over the training pixels, of values in [0, 1]."""
    image_field: str
    """The field of images in the files."""
    label_field: str
    """The field of labels in the files."""
    note: str
    """Line on how the splits came about, where that is not the data set's own definition."""
    source_key: str
    """Hash of the source's content and of the settings it was written with."""

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    @property
    def num_channels(self) -> int:
        """Number of channels, C."""
        return len(self.pixel_mean)

    @property
    def paths(self) -> dict[str, Path]:
        """The file of each split."""
        return {name: split.path for name, split in self.splits.items()}

    @property
    def indices(self) -> dict[str, range | np.ndarray | None]:
        """The rows of each split in its file; None for all."""
        return {name: split.indices for name, split in self.splits.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Number of images in each split."""
        return {name: split.num_images for name, split in self.splits.items()}


def training_rows(dataset: DataSet, num_images: int | None) -> range | np.ndarray | None:
    """Choose the rows of the file of training images for `--train-images`; None for all of them.

    Data sets with an order of their own (`ORDERED`) give their first images, as is usual for them; all others the
    same share of each class, since files and arrays are often sorted by class.

    Raises:
        UserError: fewer than one image, more than there are, or fewer than there are classes.
    """
    stored = dataset.splits["train"]
    if num_images is None:
        return stored.indices
    if num_images < 1:
        raise UserError(f"train-images: got {num_images}; expected at least 1")
    if num_images > stored.num_images:
        raise UserError(f"train-images: got {num_images}, but there are {stored.num_images}; give fewer")
    rows = range(stored.num_images) if stored.indices is None else stored.indices
    if dataset.name in ORDERED:
        return rows[:num_images]
    if num_images < dataset.num_classes:
        raise UserError(f"train-images: got {num_images}, but there are {dataset.num_classes} classes; give more")
    from ensdistill.data.beton_file import read_index  # loads numba, which takes a second

    rows_N = np.asarray(rows, np.int64)
    return rows_N[stratified_rows(read_index(stored.path).labels_N[rows_N], num_images)]


def save_dataset(dataset: DataSet, folder: Path) -> None:
    """Write `dataset.json`; files below `folder` by relative path, so that the folder can be moved."""

    def encode(value: Path) -> object:
        return value.name if value.parent == folder else str(value.resolve())

    fields = {"format": FORMAT, **msgspec.to_builtins(dataset, enc_hook=encode)}
    for split in fields["splits"].values():
        if split["indices"] is not None and len(split["indices"]) == 1:
            (split["indices"],) = split["indices"]
    with atomic_write(folder / DATASET_FILE) as temporary:
        temporary.write_text(json.dumps(with_digest(fields), indent=1) + "\n", encoding="utf-8")


def load_dataset(folder: Path) -> DataSet:
    """Read the data set that was prepared in `folder`; its files must be there and hold what they held.

    They are read once for that, and not again before they change (`content_hash`).

    Raises:
        UserError: nothing was prepared there, or it was damaged or changed since.
    """
    file = folder / DATASET_FILE
    if not file.is_file():
        raise UserError(f"{file}: missing; expected the folder of a prepared data set: prepare it first")

    def decode(kind: type, value: Any) -> object:
        return folder / value

    try:
        fields = read_json(file)
        written_as = fields["format"]
        if written_as != FORMAT:
            raise UserError(f"{file}: of format {written_as}; expected {FORMAT}: delete it and prepare the data again")
        values = {name: value for name, value in require_digest(fields).items() if name != "format"}
        for split in values["splits"].values():
            if split["indices"] is not None and not isinstance(split["indices"][0], list):
                split["indices"] = [split["indices"]]
        dataset = msgspec.convert(values, DataSet, dec_hook=decode)
        if set(dataset.splits) != set(SPLIT_NAMES):
            raise ValueError(f"its splits are {', '.join(dataset.splits)}")
        _check_values(dataset)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it and prepare the data again") from error
    for split in dataset.splits.values():
        _check_file(split)
    return dataset


def _check_values(dataset: DataSet) -> None:
    """Raise a ValueError where a number cannot be: what the file says is fed without another look."""
    C = len(dataset.pixel_mean)
    if C not in (1, 3) or len(dataset.pixel_std) != C or dataset.image_shape not in (None, (*_sides(dataset), C)):
        raise ValueError(f"pixel mean and std of {C} and {len(dataset.pixel_std)} channels, {dataset.image_shape}")
    if not all(
        math.isfinite(m) and 0 < s < math.inf for m, s in zip(dataset.pixel_mean, dataset.pixel_std, strict=True)
    ):
        raise ValueError(f"pixel mean {dataset.pixel_mean} and std {dataset.pixel_std}")
    if len(dataset.class_names) < 2:
        raise ValueError(f"class names {dataset.class_names}")
    for name, split in dataset.splits.items():
        if split.num_images < 1 or (split.indices is not None and len(split.indices) != split.num_images):
            raise ValueError(f"{split.num_images} {name} images")


def _sides(dataset: DataSet) -> tuple[int, int]:
    height, width = (dataset.image_shape or (1, 1))[:2]
    if height < 1 or width < 1:
        raise ValueError(f"images of {height}x{width} pixels")
    return height, width


def _check_file(split: StoredSplit) -> None:
    if not split.path.is_file():
        raise UserError(f"{split.path}: missing; it belongs to a prepared data set: prepare the data again")
    num_bytes = split.path.stat().st_size
    if num_bytes != split.num_bytes:
        raise UserError(f"{split.path}: {num_bytes} bytes; expected {split.num_bytes}: prepare the data again")
    if f"sha256:{file_hash(split.path)}" != split.checksum:
        raise UserError(f"{split.path}: its content changed since it was prepared; prepare the data again")

"""Preparing a data set: a source is written once to train.beton, valid.beton and test.beton beside `dataset.json`.

Arrays, and image files that all have one size (of which no other is asked for), are stored as they are and shown whole:
uint8 (H, W, C). Files of many sizes become JPEGs whose shorter side is 256/224 of the training size, or pixels where
a JPEG would not be decoded to what it shows. An existing `.beton` is used where it lies.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ensdistill.data.beton_file import (
    IMAGE_FIELD,
    LABEL_FIELD,
    page_bytes_for,
    predict_bytes,
    require_decodable,
    write_arrays,
    write_images,
    write_pixels,
)
from ensdistill.data.dataset import (
    DATASET_FILE,
    FORMAT,
    DataSet,
    StoredSplit,
    load_dataset,
    runs_of,
    save_dataset,
)
from ensdistill.data.image_files import MAX_JPEG_BYTES, common_size, parallel_map, read_rgb, read_stored
from ensdistill.data.pixel_stats import pixel_stats
from ensdistill.data.sources.base import SPLIT_NAMES, BetonRows, Content, Source, Split
from ensdistill.data.sources.content_hash import file_hash
from ensdistill.data.sources.split_folders import find_splits
from ensdistill.data.split_notes import split_notes
from ensdistill.runtime.environment import usable_cores
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write

if TYPE_CHECKING:  # loads numba, which takes a second
    from ensdistill.data.beton_file import BetonIndex

Shape = tuple[int, int, int]
Progress = Callable[[int, int], None]

DEFAULT_IMAGE_SIZE = 224
STORED_RATIO = 256 / 224  # shorter side of a stored image : side that is trained on
MAX_ARRAY_SIDE = 96  # images of one size are an NDArrayField up to this side; larger ones one that can be cropped
MAX_PIXEL_BYTES = 1 << 35  # of a data set whose images are stored as pixels: a larger one is stored as JPEGs
PROGRESS_EVERY = 256


def folder_for(root: Path, source: Source, size: int | None) -> Path:
    """Return the folder below `root` for this very source, written for images of this side: no two share one."""
    return root / f"{source.name}-{source_key(source, size)[:8]}"


def refuse_within(images: Path | None, source: str, place: Path, option: str) -> None:
    """Refuse to write among class folders, where what is written would become a class.

    Args:
        images: place of the source; None where it brings its own.
        source: its name.
        place: folder that will be written, and `option` what gives it.
    """
    if images is None or source not in ("folder", "imagenet"):
        return
    splits, _ = find_splits(images)
    for folder in splits.values() or [images]:
        if place.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{option}: would write {place} into the folder of the images, {folder}, whose folders are classes; "
                "choose a place outside of it"
            )


def prepare(
    source: Source,
    folder: Path,
    *,
    image_size: int | None = None,
    one_size: bool = False,
    progress: Progress | None = None,
) -> DataSet:
    """Write a source to `folder`, or find it there already written, and return the data set.

    Args:
        source: from `sources.registry.open_source`.
        folder: made if it is not there. Files of another source in it are replaced.
        image_size: side in pixels that will be trained on. Decides how large image files are stored (default 224);
            arrays must have this one.
        one_size: refuse image files of many sizes, before anything is written.
        progress: called with (images done, images in all) now and then, and at the end of the writing.

    Raises:
        UserError: all that can be wrong with a source; images that are not `image_size`; no space; no permission. What
            was in the folder before is then still whole.
    """
    key = source_key(source, image_size)
    written = _load_written(folder, key)
    if written is not None:
        return written
    num_threads = usable_cores()
    content = source.content
    if isinstance(content.splits["train"].images, BetonRows):
        dataset = _adopt(source, content, image_size, key, num_threads, progress)
    else:
        shape, note = shown_shape(source, image_size, one_size=one_size)
        dataset = _write_splits(source, content, folder, shape, image_size, key, num_threads, progress, note)
    note = "; ".join(filter(None, (dataset.note, split_notes(dataset.splits, dataset.class_names))))
    dataset = msgspec.structs.replace(dataset, note=note)
    save_dataset(dataset, folder)
    return dataset


def source_key(source: Source, size: int | None) -> str:
    """Return the `DataSet.source_key` of a source that is written for images of this side."""
    return hashlib.sha256(f"{FORMAT}\0{source.name}\0{source.content_key}\0{size}".encode()).hexdigest()


def _load_written(folder: Path, key: str) -> DataSet | None:
    if not (folder / DATASET_FILE).is_file():
        return None
    try:
        dataset = load_dataset(folder)
    except UserError:
        return None  # damaged or incomplete: it is written again
    return dataset if dataset.source_key == key else None


def stored_short_side(size: int) -> int:
    """Return the most pixels that the shorter side of a stored image has, where `size` is the side trained on."""
    return round(size * STORED_RATIO)


def _write_splits(
    source: Source,
    content: Content,
    folder: Path,
    shape: Shape | None,
    size: int | None,
    key: str,
    num_threads: int,
    progress: Progress | None,
    note: str,
) -> DataSet:
    splits = {name: content.splits[name] for name in SPLIT_NAMES}
    is_pixels = shape is not None and _is_stored_as_pixels(splits, shape)
    _check_space(folder, splits, shape if is_pixels else None)
    mean, std = pixel_stats(source.name, splits["train"], num_threads)
    count = _Count(sum(len(split.labels) for split in splits.values()), progress)
    stored = {
        name: _write_split(split, folder / f"{name}.beton", shape if is_pixels else None, size, num_threads, count)
        for name, split in splits.items()
    }
    return DataSet(
        name=source.name,
        class_names=content.class_names,
        splits=stored,
        image_shape=shape,
        pixel_mean=mean,
        pixel_std=std,
        image_field=IMAGE_FIELD,
        label_field=LABEL_FIELD,
        note="; ".join(filter(None, (content.note, note))),
        source_key=key,
    )


def _is_stored_as_pixels(splits: dict[str, Split], shape: Shape) -> bool:
    num_bytes = sum(len(split.labels) for split in splits.values()) * int(np.prod(shape))
    return isinstance(splits["train"].images, np.ndarray) or num_bytes <= MAX_PIXEL_BYTES


def _write_split(
    split: Split, path: Path, shape: Shape | None, size: int | None, num_threads: int, count: _Count
) -> StoredSplit:
    with atomic_write(path) as temporary:
        if isinstance(split.images, np.ndarray):
            assert shape is not None
            write_arrays(temporary, split.images, split.labels, shape, count.add_one)
        else:
            files = _files(split)
            if shape is not None:
                images = parallel_map(partial(_read_shaped, shape=shape), files, num_threads)
                write = write_arrays if max(shape[:2]) <= MAX_ARRAY_SIDE else write_pixels
                write(temporary, images, split.labels, shape, count.add_one)
            else:
                read = partial(read_stored, max_short_side=stored_short_side(size or DEFAULT_IMAGE_SIZE))
                stored = parallel_map(read, files, num_threads)
                write_images(temporary, stored, split.labels, count.add_one)
    return _stored(path, None, len(split.labels))


def _read_shaped(path: Path, *, shape: Shape) -> np.ndarray:
    image = read_rgb(path)
    if image.shape != shape:
        raise UserError(
            f"{path}: {image.shape[0]}x{image.shape[1]} pixels; expected {shape[0]}x{shape[1]} like the others"
        )
    return image


def _stored(path: Path, indices: range | np.ndarray | None, num_images: int) -> StoredSplit:
    return StoredSplit(
        path=path,
        runs=runs_of(indices),
        num_images=num_images,
        num_bytes=path.stat().st_size,
        checksum=f"sha256:{file_hash(path)}",
    )


def shown_shape(source: Source, size: int | None, *, one_size: bool = False) -> tuple[Shape | None, str]:
    """Return the shape (H, W, C) of images that are shown whole, None for others, and a line on images to mend.

    Nothing is written. `one_size`: as for `prepare`.

    Raises:
        UserError: images that are not `size` and cannot be cut to it; many sizes, where one is asked for.
    """
    content = source.content
    if isinstance(content.splits["train"].images, BetonRows):
        shape, note = _adopted_shape(list(_read_indexes(content).values()), size), ""
    else:
        shape, note = _fixed_shape(content, size, usable_cores())
    if shape is None and one_size:
        raise many_sizes(source.name, note)
    return shape, note


def many_sizes(name: str, note: str = "") -> UserError:
    """Make the error of data whose images need a size to be cut to, which was not given."""
    more = f" ({note})" if note else ""
    return UserError(f"image-size: not given, but {name} has images of many sizes; give --image-size 224{more}")


def _fixed_shape(content: Content, size: int | None, num_threads: int) -> tuple[Shape | None, str]:
    """Return the shape (H, W, C) of images that are shown whole, None for others, and a line on images to mend."""
    shapes = {
        name: split.images.shape[1:] for name, split in content.splits.items() if isinstance(split.images, np.ndarray)
    }
    shape = shapes.get("train") or content.image_shape
    if shape is not None:
        if size is not None and (shape[0], shape[1]) != (size, size):
            raise UserError(
                f"{content.splits['train'].origin}: images are {shape[0]}x{shape[1]} pixels, image size "
                f"{size} was asked for; leave it away"
            )
        return (int(shape[0]), int(shape[1]), int(shape[2])), ""
    found, odd = _file_size(content, num_threads)
    if found is not None:
        return ((*found, 3), "") if size is None or found == (size, size) else (None, "")
    if odd and f"are not {size}x{size}:" in odd:
        odd += f"; so all are stored as JPEGs, and their centres are enlarged to {size}x{size}"
    return None, odd if size is None or "JPEG" in odd else ""


def _file_size(content: Content, num_threads: int) -> tuple[tuple[int, int] | None, str]:
    files = tuple(chain.from_iterable(_files(content.splits[name]) for name in SPLIT_NAMES))
    return common_size(files, num_threads)


def image_size_for(source: Source, shown: tuple[int, int]) -> int | None:
    """Return the `image_size` with which a source was prepared for a network that sees images of `shown` (H, W).

    None where all images have that size, and for arrays, which are shown as they are.
    """
    if source.name not in ("folder", "imagenet", "beton"):
        return None
    content = source.content
    if isinstance(content.splits["train"].images, BetonRows):
        indexes = list(_read_indexes(content).values())
        sizes = {size for index in indexes for size in zip(index.heights_N, index.widths_N, strict=True)}
        return None if indexes[0].is_array or sizes == {shown} else shown[0]
    found, _ = _file_size(content, usable_cores())
    return None if found == shown else shown[0]


def _files(split: Split) -> tuple[Path, ...]:
    assert isinstance(split.images, tuple)
    return split.images


def _check_space(folder: Path, splits: dict[str, Split], shape: Shape | None) -> None:
    needed = 0
    for split in splits.values():
        num_images = len(split.labels)
        if shape is not None:
            sample_bytes = int(np.prod(shape))
            needed += predict_bytes(num_images, num_images * sample_bytes, page_bytes=page_bytes_for(sample_bytes))
        else:
            files_bytes = sum(path.stat().st_size for path in _files(split))
            needed += predict_bytes(num_images, files_bytes, page_bytes=MAX_JPEG_BYTES)
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{folder}: {free / 1e6:.0f} MB are free; expected {needed / 1e6:.0f} MB for the data set: free some, "
            "or choose another folder"
        )


class _Count:
    """Counts images over all splits and tells `progress` now and then."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add_one(self) -> None:
        self.done += 1
        if self.progress is not None and (self.done % PROGRESS_EVERY == 0 or self.done == self.total):
            self.progress(self.done, self.total)


def _adopt(
    source: Source, content: Content, size: int | None, key: str, num_threads: int, progress: Progress | None
) -> DataSet:
    """Describe the data set of existing files, of which every image can be decoded."""
    rows = {name: split.images for name, split in content.splits.items() if isinstance(split.images, BetonRows)}
    indexes = _read_indexes(content)
    first = indexes[rows["train"].path]
    for index in indexes.values():
        found, expected = _fields(index), _fields(first)
        if found != expected:
            raise UserError(
                f"{index.path}: holds {found}; expected {expected} as in {first.path.name}: write the files alike"
            )
    shape = _adopted_shape(list(indexes.values()), size)
    count = _Count(sum(int(index.is_jpeg_N.sum()) for index in indexes.values()), progress)
    for index in indexes.values():
        require_decodable(index, num_threads, count.add_one)
    mean, std = pixel_stats(source.name, content.splits["train"], num_threads)
    return DataSet(
        name=source.name,
        class_names=content.class_names,
        splits={
            name: _stored(rows[name].path, rows[name].indices, len(content.splits[name].labels)) for name in SPLIT_NAMES
        },
        image_shape=shape,
        pixel_mean=mean,
        pixel_std=std,
        image_field=first.image_field,
        label_field=first.label_field,
        note=content.note,
        source_key=key,
    )


def _read_indexes(content: Content) -> dict[Path, BetonIndex]:
    from ensdistill.data.beton_file import read_index  # loads numba, which takes a second

    paths = (split.images.path for split in content.splits.values() if isinstance(split.images, BetonRows))
    return {path: read_index(path) for path in dict.fromkeys(paths)}


def _fields(index: BetonIndex) -> str:
    kind = "an array" if index.is_array else "RGB"
    return f"{index.num_channels}-channel images in '{index.image_field}' ({kind}) and labels in '{index.label_field}'"


def _adopted_shape(indexes: list[BetonIndex], size: int | None) -> Shape | None:
    """Return the shape (H, W, C) of images that are fed whole, None where they are cropped."""
    first = indexes[0]
    shape = int(first.heights_N[0]), int(first.widths_N[0]), first.num_channels
    is_same = all((i.heights_N == shape[0]).all() and (i.widths_N == shape[1]).all() for i in indexes)
    if first.is_array:
        if not is_same or shape[2] not in (1, 3):
            raise UserError(
                f"{first.path}: images of shape {shape}; expected (H, W, C) with C 1 or 3, the same in every file"
            )
        if size is not None and shape[:2] != (size, size):
            raise UserError(
                f"{first.path}: images are {shape[0]}x{shape[1]} pixels, image size {size} was asked for; leave it away"
            )
        return shape
    return shape if is_same and (size is None or shape[:2] == (size, size)) else None

"""Data that networks are measured on, opened by name or place; images of other data, brought to what networks take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

from ensdistill.data.dataset import DATASET_FILE, DataSet, load_dataset
from ensdistill.data.feed import Batch, Feed
from ensdistill.data.prepare import folder_for, image_size_for, prepare, refuse_within
from ensdistill.data.sources.registry import SOURCES, open_source, recognise
from ensdistill.formats.class_order import are_numbers
from ensdistill.run.display import Screen
from ensdistill.runtime.errors import first_names

Shape = tuple[int, int, int]


def open_data(given: str, source: str | None, folder: Path, image_shape: Shape, screen: Screen) -> DataSet:
    """Prepare the data called `given`, or find them prepared, for networks of images of `image_shape` (H, W, C).

    Args:
        given: a path, or the name of a source that needs none.
        source: kind of the data; recognised where None.
        folder: where each source's `.beton` files have a folder.

    Raises:
        UserError: nothing there, nothing that is known, or all that can be wrong with a source.
    """
    path = Path(given)
    if (path / DATASET_FILE).is_file():
        return load_dataset(path)
    # A source's name stands for the source, unless data of that name lie here: in runs/ it is a run's folder.
    is_name = given in SOURCES and (not path.exists() or (path / "config.json").is_file())
    name = source or (given if is_name else recognise(path))
    refuse_within(None if is_name else path, name, folder, f"--folder {folder}")
    opened = open_source(name, None if is_name else path)
    size = image_size_for(opened, image_shape[:2])
    with screen.counting(f"{name}: writing .beton") as counter:
        return prepare(opened, folder_for(folder, opened, size), image_size=size, progress=counter)


def feed_of(data: DataSet, split: str, image_size: int, batch_size: int) -> Feed:
    """The images of a split in order; where their sizes vary the central square of each, `image_size` pixels a side."""
    stored = data.splits[split]
    varies = data.image_shape is None
    return Feed(
        stored.path,
        indices=stored.indices,
        batch_size=batch_size,
        seed=0,
        shuffle=False,
        drop_last=False,
        image_size=image_size if varies else None,
        crop="center" if varies else "none",
    )


def fit(image_HWC: np.ndarray, shape: Shape) -> np.ndarray:
    """Bring an image, uint8 (H, W, C), to another shape: the central part of its proportions, resized, in its colours.

    Shrunk by area, enlarged linearly; grey is repeated, colours become grey by ITU-R BT.601.
    """
    height, width, channels = image_HWC.shape
    if (height, width) != shape[:2]:
        scale = min(height / shape[0], width / shape[1])
        rows, columns = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
        top, left = (height - rows) // 2, (width - columns) // 2
        part_HWC = image_HWC[top : top + rows, left : left + columns]
        how = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
        image_HWC = cv2.resize(part_HWC, shape[1::-1], interpolation=how).reshape(*shape[:2], channels)
    if channels != shape[2]:
        image_HWC = (
            cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)[..., None] if channels == 3 else image_HWC.repeat(3, axis=2)
        )
    return image_HWC


def fitted_batches(feed: Feed, shape: Shape) -> Iterator[Batch]:
    """Batches of a feed whose images are brought to `shape` where they have another."""
    with feed.epoch(0) as batches:
        for images_BHWC, labels_B in batches:
            if feed.image_shape != shape:
                images_BHWC = torch.from_numpy(np.stack([fit(image_HWC, shape) for image_HWC in images_BHWC.numpy()]))
            yield images_BHWC, labels_B


def watched(batches: Iterable[Batch], seen: set[bytes], counted: Callable[[int], None]) -> Iterator[Batch]:
    """Batches as they come; digests of their images are added to `seen`, and `counted` is told how many are done."""
    for images_BHWC, labels_B in batches:
        seen.update(hashlib.blake2b(image_HWC.tobytes(), digest_size=16).digest() for image_HWC in images_BHWC.numpy())
        yield images_BHWC, labels_B
        counted(len(labels_B))


def shared_classes(inside: DataSet, outside: DataSet, given: str, screen: Screen) -> list[str]:
    """Warn where data that should be of other classes have some by the same name, and return those names.

    Numbers are no names: of data that have no others nothing is known, which is said.
    """
    if nameless := [data.name for data in (inside, outside) if are_numbers(data.class_names)]:
        screen.say(f"--ood {given}: classes of {nameless[0]} have numbers for names; whether any are shared is unknown")
        return []
    ours = {name.casefold() for name in inside.class_names}
    shared = [name for name in outside.class_names if name.casefold() in ours]
    if shared:
        screen.warn(
            f"--ood {given}: {len(shared)} of its {len(outside.class_names)} classes have names of the training data's "
            f"({first_names(shared)}): their images count as out-of-distribution here; leave them out"
        )
    return shared


def in_words(shape: Shape) -> str:
    """Size and channels of images, as a message says them."""
    H, W, C = shape
    return f"{H}x{W} pixels, {C} channel{'s' if C > 1 else ''}"

"""Sources of image files: class folders, ImageNet, Tiny ImageNet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ensdistill.data.sources.base import Content, Source, Split, complete_splits
from ensdistill.data.sources.content_hash import content_hash
from ensdistill.data.sources.split_folders import find_splits
from ensdistill.data.sources.walk import Walk, class_folders, list_folder
from ensdistill.runtime.errors import UserError, nearest

IMAGENET_CLASSES = 1_000

TINY_IMAGENET_FOLDER = "tiny-imagenet-200"
TINY_IMAGENET_CLASSES, TINY_IMAGENET_TRAIN_PER_CLASS, TINY_IMAGENET_TEST = 200, 500, 10_000
TINY_IMAGENET_VALID_PER_CLASS = 50
TINY_IMAGENET_SHAPE = (64, 64, 3)


def open_folder(path: Path | None, *, name: str = "folder") -> Source:
    """Open class folders: train/CLASS/… (and valid/, test/), or CLASS/… alone.

    Split folders may have other usual names (`split_folders`). Classes are the sorted folder names. Images may lie
    deeper in their class folder. Missing splits are split off by sorted file name (`complete_splits`).

    Raises:
        UserError: no such folder, fewer than two classes, an empty class, a class that train does not have, folders
            that can be splits or classes, an image that would be listed twice or cannot be read.
    """
    if path is None:
        expected = "ImageNet's folder with train/ and val/" if name == "imagenet" else "a folder of class folders"
        raise UserError(f"{name}: no folder was given; expected {expected}: pass it with --data")
    listed, said = _list_splits(path)
    class_names = listed["train"][1]
    if name == "imagenet" and len(class_names) != IMAGENET_CLASSES:
        raise UserError(
            f"{path}: {len(class_names)} class folders; expected ImageNet's {IMAGENET_CLASSES}: extract all of its "
            "archives, each class's images into a folder of its own"
        )
    given = {split: listed_split for split, (listed_split, _) in listed.items()}

    def read() -> Content:
        splits, note = complete_splits(given)
        return Content(class_names=class_names, splits=splits, note="; ".join(filter(None, (*said, note))))

    return Source(name=name, fingerprint=lambda: _content_hash(path, given), read=read)


def _content_hash(path: Path, given: Mapping[str, Split], others: Sequence[Path] = ()) -> str:
    """Hash the files of splits with their labels and their places below `path`, where classes have their names."""
    prefix = f"{path}{os.sep}"
    named = [(str(file).removeprefix(prefix), file) for file in others]
    for name, split in given.items():
        assert isinstance(split.images, tuple)
        named += [
            (f"{name} {label} {str(file).removeprefix(prefix)}", file)
            for file, label in zip(split.images, split.labels.tolist(), strict=True)
        ]
    return content_hash(named)


def _list_splits(path: Path) -> tuple[dict[str, tuple[Split, tuple[str, ...]]], list[str]]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a folder of class folders")
    walk = Walk()
    found, said = find_splits(path)
    train, names = list_classes(found.get("train", path), None, walk)
    others = {split: list_classes(folder, names, walk) for split, folder in found.items() if split != "train"}
    walk.refuse_links_within()
    for folder in found.values() or [path]:
        if stray := list_folder(folder).images:
            said.append(f"{len(stray):,} images that lie beside the class folders of {folder} are left out")
    said += walk.left_out()
    numbers = [name for name in names if name.isdecimal()]
    if len(numbers) == len(names) and sorted(numbers, key=int) != numbers:
        said.append(
            f"classes are sorted as text, not as numbers: {', '.join(names[:4])}, …; class_names in dataset.json "
            "gives the name of each label"
        )
    return {"train": (train, names), **others}, said


def list_classes(path: Path, class_names: Sequence[str] | None, walk: Walk) -> tuple[Split, tuple[str, ...]]:
    """List the image files of class folders, by class and sorted path, and the class names.

    Raises:
        UserError: fewer than two classes, an empty class folder, or one that is not in `class_names`.
    """
    names = class_folders(path)
    if class_names is None and len(names) < 2:
        raise UserError(f"{path}: {len(names)} class folders; expected at least two, each with the images of a class")
    known = tuple(class_names if class_names is not None else names)
    files: list[Path] = []
    labels: list[int] = []
    label_of = {name: label for label, name in enumerate(known)}
    for name in names:
        if name not in label_of:
            raise UserError(
                f"{path / name}: no class of the training images{nearest(name, known)}; expected the same classes"
            )
        images = walk.images(path / name)
        files += images
        labels += [label_of[name]] * len(images)
    return Split(images=tuple(files), labels=np.array(labels, np.int64), origin=str(path)), known


def find_tiny_imagenet(path: Path) -> Path | None:
    """Find Tiny ImageNet's folder, which is `path` or lies in it; None where it is neither."""
    for folder in (path, path / TINY_IMAGENET_FOLDER):
        if (folder / "train").is_dir() and (folder / "val" / "val_annotations.txt").is_file():
            return folder
    return None


def open_tiny_imagenet(path: Path | None) -> Source:
    """Tiny ImageNet's official folder. Classes are the sorted WordNet ids.

    Test is the official validation set (the official test set has no labels); valid the last 50 images of each class
    of train, by sorted file name; train the other 450 a class.

    Raises:
        UserError: the folder is missing or not complete.
    """
    folder = find_tiny_imagenet(path) if path is not None else None
    if folder is None:
        where = f"{path} holds no train/ and val/val_annotations.txt" if path else "no folder was given"
        raise UserError(
            f"Tiny ImageNet is missing: {where}; download tiny-imagenet-200.zip from the page of Stanford's course "
            "CS231n, extract it, and pass the folder tiny-imagenet-200 with --data"
        )
    train, wnids = list_classes(folder / "train", None, Walk())
    test = _tiny_imagenet_val(folder / "val", wnids)
    expected = TINY_IMAGENET_CLASSES * TINY_IMAGENET_TRAIN_PER_CLASS
    if len(wnids) != TINY_IMAGENET_CLASSES or (np.bincount(train.labels) != TINY_IMAGENET_TRAIN_PER_CLASS).any():
        raise UserError(
            f"{folder / 'train'}: {len(train.labels)} images of {len(wnids)} classes; expected {expected} of "
            f"{TINY_IMAGENET_CLASSES}, {TINY_IMAGENET_TRAIN_PER_CLASS} a class: extract tiny-imagenet-200.zip again"
        )
    if len(test.labels) != TINY_IMAGENET_TEST:
        raise UserError(
            f"{folder / 'val'}: {len(test.labels)} images; expected {TINY_IMAGENET_TEST}: extract "
            "tiny-imagenet-200.zip again"
        )
    assert isinstance(train.images, tuple) and isinstance(test.images, tuple)
    is_valid = np.arange(len(train.labels)) % TINY_IMAGENET_TRAIN_PER_CLASS >= (
        TINY_IMAGENET_TRAIN_PER_CLASS - TINY_IMAGENET_VALID_PER_CLASS
    )
    splits = {
        "train": train.take(np.flatnonzero(~is_valid)),
        "valid": train.take(np.flatnonzero(is_valid)),
        "test": test,
    }

    others = [file for file in (folder / "val" / "val_annotations.txt", folder / "words.txt") if file.is_file()]

    def read() -> Content:
        names = _tiny_imagenet_names(folder, wnids)
        return Content(class_names=names, splits=splits, image_shape=TINY_IMAGENET_SHAPE)

    return Source(
        name="tiny-imagenet",
        fingerprint=lambda: _content_hash(folder, {"train": train, "test": test}, others),
        read=read,
    )


def _tiny_imagenet_val(folder: Path, wnids: Sequence[str]) -> Split:
    annotations = folder / "val_annotations.txt"
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    images, labels = [], []
    for number, line in enumerate(_lines(annotations), 1):
        columns = line.split("\t")
        if len(columns) < 2 or columns[1] not in label_of:
            raise UserError(
                f"{annotations}: line {number} is {line[:80]!r}; expected a file name, a tab and a class of train/"
            )
        image = folder / "images" / columns[0]
        if not image.is_file():
            raise UserError(f"{image}: missing, but val_annotations.txt names it; extract tiny-imagenet-200.zip again")
        images.append(image)
        labels.append(label_of[columns[1]])
    return Split(images=tuple(images), labels=np.array(labels, np.int64), origin=str(folder))


def _tiny_imagenet_names(folder: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    words = folder / "words.txt"
    lines = _lines(words) if words.is_file() else []
    name_of = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(name_of.get(wnid, wnid) for wnid in wnids)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected text in UTF-8: extract tiny-imagenet-200.zip again"
        ) from error

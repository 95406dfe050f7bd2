"""The table of sources by name, and recognition of the one that lies at a path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ensdistill.data.sources.arrays import IDX_FILES, find_npy, open_digits, open_fashion_mnist, open_npy
from ensdistill.data.sources.base import Source
from ensdistill.data.sources.beton import BETON_SUFFIXES, find_betons, open_beton
from ensdistill.data.sources.cifar import LAYOUTS, find_cifar, open_cifar, tarfile_name
from ensdistill.data.sources.folders import find_tiny_imagenet, open_folder, open_tiny_imagenet
from ensdistill.data.sources.split_folders import split_of
from ensdistill.data.sources.walk import class_folders
from ensdistill.runtime.errors import UserError, nearest

SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": open_digits,
    "fashion-mnist": open_fashion_mnist,
    "cifar10": partial(open_cifar, "cifar10"),
    "cifar100": partial(open_cifar, "cifar100"),
    "tiny-imagenet": open_tiny_imagenet,
    "imagenet": partial(open_folder, name="imagenet"),
    "folder": open_folder,
    "npy": open_npy,
    "beton": open_beton,
}
EXPECTED = (
    "expected a .beton file, a pair of .npy files, CIFAR's archive or folder, Fashion-MNIST's idx files, Tiny "
    "ImageNet's folder or a folder of class folders"
)


def open_source(name: str, path: Path | None = None) -> Source:
    """Open the source `name`, one of `SOURCES`, at `path` (digits, and Fashion-MNIST where Debian put it, need none).

    Raises:
        UserError: an unknown name, or nothing of that kind at `path`.
    """
    if name not in SOURCES:
        raise UserError(f"data: no source '{name}'{nearest(name, SOURCES)}; expected one of {', '.join(SOURCES)}")
    if path is not None and name != "digits" and not path.exists():
        raise UserError(f"{path}: no such file or folder; {EXPECTED}")
    return SOURCES[name](path)


def recognise(path: Path) -> str:
    """Recognise the source that lies at `path`, and return its name.

    Raises:
        UserError: nothing there, or nothing that is known.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {EXPECTED}")
    if path.is_file():
        return _recognise_file(path)
    for name, is_there in (
        ("beton", lambda: bool(find_betons(path))),
        ("npy", lambda: bool(find_npy(path))),
        ("cifar10", lambda: find_cifar(LAYOUTS["cifar10"], path)),
        ("cifar100", lambda: find_cifar(LAYOUTS["cifar100"], path)),
        ("fashion-mnist", lambda: any((path / (IDX_FILES[0] + suffix)).is_file() for suffix in ("", ".gz"))),
        ("tiny-imagenet", lambda: find_tiny_imagenet(path)),
        ("folder", lambda: len(class_folders(path)) > 1 or any(map(split_of, class_folders(path)))),
    ):
        if is_there():
            return name
    if len(folders := class_folders(path)) == 1:
        raise UserError(
            f"{path}: holds one folder, {folders[0]}; {EXPECTED}, of at least two classes: give the folder in it where "
            "the data lie deeper"
        )
    raise UserError(f"{path}: no images that can be read; {EXPECTED}")


def _recognise_file(path: Path) -> str:
    if path.suffix in BETON_SUFFIXES:
        return "beton"
    if path.suffix == ".npy":
        return "npy"
    if path.suffix == ".zip":
        raise UserError(f"{path}: a packed archive; extract it and pass the folder")
    if tarfile_name(path):
        for name, layout in LAYOUTS.items():
            if find_cifar(layout, path) is not None:
                return name
        raise UserError(f"{path}: not one of CIFAR's archives; extract it and pass the folder")
    raise UserError(f"{path}: a file of no known kind; {EXPECTED}")

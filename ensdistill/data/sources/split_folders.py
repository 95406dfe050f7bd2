"""Recognition of split folders: train/, Test/, seg_train/, val2017/ … are splits where they hold folders of classes.

A class may be called train or test: it holds images, as the classes beside it do. What can be both is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ensdistill.data.sources.walk import class_folders, holds_images, list_folder
from ensdistill.runtime.errors import UserError

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "validate", "dev", "devel", "eval", "evaluation"), "valid"),
    **dict.fromkeys(("test", "testing", "tst", "holdout"), "test"),
}
"""Words in the names of folders, in lower case, and the split that each stands for."""
ENDINGS = ("", "sets", "set", "data", "images", "imgs", "split")
"""Endings that a split's word may have: trainset, testdata."""
USUAL_NAMES = {"train", "valid", "val", "test"}
EXPECTED = "expected the folders train, valid and test with a folder for each class in them, or class folders alone"


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder beside others, and what lies in it."""

    path: Path
    """Place of what lies in it: deeper where it holds nothing but a folder for the same split."""
    name: str
    """Name of the folder itself."""
    split: str | None
    """Split that the name stands for."""
    folders: list[str]
    """Names of the folders in it."""
    has_images: bool
    """True where images lie in it directly."""

    @property
    def holds_classes(self) -> bool:
        """True where it can be a split: it holds folders and no images."""
        return bool(self.folders) and not self.has_images


def split_of(name: str) -> str | None:
    """Tell the split (train, valid, test) that a folder's name stands for; None for all other names."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    stems = (word.removesuffix(ending) for word in words for ending in ENDINGS)
    splits = {SPLIT_WORDS[stem] for stem in stems if stem in SPLIT_WORDS}
    if splits == {"train", "valid"}:
        return "train"  # train_val: both together
    return splits.pop() if len(splits) == 1 else None


def find_splits(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Find the split folders in `path`, and lines for the user on what was taken for what.

    No split folder: `path` holds the classes themselves.

    Raises:
        UserError: two folders for one split, splits without train, folders that can be splits or classes.
    """
    listed = [_look(path, name) for name in class_folders(path)]
    named = [folder for folder in listed if folder.split is not None and holds_images(folder.path)]
    others = [folder for folder in listed if folder not in named]
    if not named:
        _refuse_unknown_splits(path, others)
        return {}, []
    names = " and ".join(f"{folder.name}/" for folder in named)
    if _are_classes(named, others):
        return {}, [f"{names} {'is a class, not a split' if len(named) == 1 else 'are classes, not splits'}"]
    if any(folder.split == "train" and len(folder.folders) >= 2 for folder in named):
        return _take_splits(path, named, others)
    if all(folder.split != "train" for folder in named):
        found = ", ".join(sorted({str(folder.split) for folder in named}))
        raise UserError(f"{path}: {found} but no train/; expected train/ beside it")
    raise UserError(f"{path}: splits by name ({names}), but train has fewer than two class folders; {EXPECTED}")


def _look(parent: Path, name: str) -> _Folder:
    path, split = parent / name, split_of(name)
    entries = list_folder(path)
    while split and not entries.images and len(entries.folders) == 1 and split_of(entries.folders[0]) == split:
        inner = list_folder(path / entries.folders[0])
        if inner.images or not inner.folders:
            break
        path, entries = path / entries.folders[0], inner
    return _Folder(path=path, name=name, split=split, folders=entries.folders, has_images=bool(entries.images))


def _are_classes(named: list[_Folder], others: list[_Folder]) -> bool:
    """Tell whether folders with the names of splits are classes: of one split's name, and like the folders beside them.

    A class has its images in it, or in a single folder in it, where a split has a folder for each of its classes.
    """
    if len({folder.split for folder in named}) > 1 or any(len(f.folders) >= 2 and f.holds_classes for f in named):
        return False
    return len(named) > 1 or any(holds_images(folder.path) for folder in others)


def _take_splits(path: Path, named: list[_Folder], others: list[_Folder]) -> tuple[dict[str, Path], list[str]]:
    found: dict[str, _Folder] = {}
    for folder in named:
        split = str(folder.split)
        if split == "valid" and split in found and "test" not in {each.split for each in named}:
            split = "test" if re.search("eval", folder.name, re.IGNORECASE) else split
        if split in found:
            raise UserError(
                f"{path}: both {found[split].name}/ and {folder.name}/ can be the {split} split; expected one: rename "
                "one of them, or move it away"
            )
        found[split] = folder
    for split, folder in found.items():
        if not folder.folders:
            raise UserError(
                f"{folder.path}: the {split} split holds images, but no class folders; expected a folder for each "
                "class in it: move it away where its classes are not known"
            )
    classes = set(found["train"].folders)
    beside = [folder for folder in others if holds_images(folder.path)]
    for folder in beside:
        if len(found) == 1 or classes.intersection(folder.folders):
            taken = ", ".join(f"{each.name}/ is the {split} split" for split, each in found.items())
            raise UserError(
                f"{path}: {taken}, but {folder.name}/ holds images too, and is no split by its name; {EXPECTED}: "
                "rename it, or move it away"
            )
    said = []
    if any(folder.name not in USUAL_NAMES for folder in found.values()):
        said.append("; ".join(f"{folder.name}/ is the {split} split" for split, folder in found.items()))
    said += [f"{folder.name}/ is left out: it holds none of the classes" for folder in beside]
    empty = [folder for folder in others if folder.split is not None and folder not in beside]
    said += [f"{folder.name}/ is left out: it holds no images" for folder in empty]
    return {split: folder.path for split, folder in found.items()}, said


def _refuse_unknown_splits(path: Path, folders: list[_Folder]) -> None:
    """Refuse folders that all hold the same folders: they are splits or domains rather than classes."""
    if len(folders) < 2 or any(folder.has_images for folder in folders):
        return
    shared = sorted(set.intersection(*(set(folder.folders) for folder in folders)))
    are_splits = len({split_of(name) for name in shared} - {None}) >= 2
    if len(shared) >= 2 and (are_splits or len(folders) <= 4 or len(shared) >= len(folders)):
        outer, inner = (", ".join(names[:3]) for names in ([folder.name for folder in folders], shared))
        raise UserError(
            f"{path}: each of its folders ({outer}) holds the folders {inner}, so that they can be classes or "
            f"splits; {EXPECTED}: rename the splits, or put the images of each class into one folder"
        )

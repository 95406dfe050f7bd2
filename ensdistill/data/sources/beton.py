"""Existing `.beton` files as a source: used where they are, never copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ensdistill.data.sources.base import (
    HELD_OUT_FRACTION,
    MAX_HELD_OUT,
    BetonRows,
    Content,
    Source,
    Split,
    check_classes_present,
    hold_out,
)
from ensdistill.data.sources.content_hash import content_hash
from ensdistill.data.sources.split_folders import split_of
from ensdistill.runtime.errors import UserError

BETON_SUFFIXES = (".beton", ".ffcv")


def open_beton(path: Path | None) -> Source:
    """One `.beton`, or a folder of them whose names say train, valid (or val) and test.

    A split without a file of its own is a range of rows: the last tenth of train (`hold_out`'s share). Where that would
    miss a class because the rows are sorted by class, valid and test are the even and the odd rows of the file that was
    set apart; of a single file they are the last tenth of each class, as for folders and arrays.

    Raises:
        UserError: no such file, two files for one split; when it is read: damaged, labels with gaps, too few images.
    """
    if path is None:
        raise UserError(
            "beton: no file was given; expected a .beton file or a folder with train.beton: pass it with --data"
        )
    files = {"train": path} if path.is_file() else find_betons(path)
    if "train" not in files:
        raise UserError(
            f"{path}: no .beton file of training images; expected train.beton (and valid.beton, test.beton)"
        )
    return Source(
        name="beton",
        fingerprint=lambda: content_hash(list(files.items())),
        read=lambda: _read(files),
    )


def find_betons(folder: Path) -> dict[str, Path]:
    """Find the `.beton` file of each split in a folder; a lone file is train whatever its name.

    Raises:
        UserError: two files for one split, or beside train one whose name says no split.
    """
    if not folder.is_dir():
        return {}
    files = sorted(file for file in folder.iterdir() if file.suffix in BETON_SUFFIXES and not file.name.startswith("."))
    if len(files) == 1:
        return {"train": files[0]}
    found: dict[str, Path] = {}
    for file in files:
        split = split_of(file.stem)
        if split in found:
            raise UserError(
                f"{folder}: both {found[split].name} and {file.name} are {split}; expected one: "
                "give a folder of its own"
            )
        if split is not None:
            found[split] = file
    unknown = [file.name for file in files if file not in found.values()]
    if "train" in found and unknown:
        raise UserError(
            f"{folder}: {unknown[0]} is neither train, valid nor test by its name; expected files of these names: "
            "rename it, or give a folder of its own"
        )
    return found


def _read(files: dict[str, Path]) -> Content:
    from ensdistill.data.beton_file import read_index  # FFCV takes seconds to import

    indexes = {split: read_index(file) for split, file in files.items()}
    labels = {split: index.labels_N for split, index in indexes.items()}
    num_classes = 1 + max(int(labels_N.max()) for labels_N in labels.values())
    check_classes_present(labels["train"], num_classes, str(files["train"]))
    rows, note = _split_rows(files, labels, num_classes)
    splits = {}
    for split, (owner, indices) in rows.items():
        splits[split] = Split(
            images=BetonRows(path=files[owner], indices=indices),
            labels=labels[owner] if indices is None else labels[owner][indices],
            origin=str(files[owner]),
        )
    return Content(class_names=tuple(map(str, range(num_classes))), splits=splits, note=note)


Rows = dict[str, tuple[str, range | np.ndarray | None]]  # split → (split whose file it lies in, rows)


def _split_rows(files: dict[str, Path], labels: dict[str, np.ndarray], num_classes: int) -> tuple[Rows, str]:
    rows: Rows = {split: (split, None) for split in files}
    missing = [split for split in ("valid", "test") if split not in files]
    if not missing:
        return rows, ""
    apart = next((split for split in ("test", "valid") if split in files), None)
    num_train = len(labels["train"])
    share = int(num_train * min(HELD_OUT_FRACTION, MAX_HELD_OUT / num_train))
    cut = num_train - share * (1 if apart else 2)
    pieces = [range(0, cut), *(range(start, start + share) for start in range(cut, num_train, share or 1))]
    if share and all(len(np.unique(labels["train"][piece.start : piece.stop])) == num_classes for piece in pieces):
        if apart:
            return (
                {"train": ("train", pieces[0]), "valid": ("train", pieces[1]), "test": (apart, None)},
                f"valid is the last {share} rows of {files['train'].name}, test is {files[apart].name}",
            )
        return (
            {"train": ("train", pieces[0]), "valid": ("train", pieces[1]), "test": ("train", pieces[2])},
            f"valid and test are the last two times {share} rows of {files['train'].name}",
        )
    if apart and len(labels[apart]) >= 2:
        num_apart = len(labels[apart])
        return (
            {
                "train": ("train", None),
                "valid": (apart, range(0, num_apart, 2)),
                "test": (apart, range(1, num_apart, 2)),
            },
            f"valid and test are the even and the odd rows of {files[apart].name}",
        )
    origin = str(files["train"])
    kept_N, held_N = hold_out(labels["train"], origin=origin)
    if apart:
        return (
            {"train": ("train", kept_N), "valid": ("train", held_N), "test": (apart, None)},
            f"valid is the last {len(held_N)} rows of {files['train'].name}, class by class, test is "
            f"{files[apart].name}",
        )
    still_N, valid_N = hold_out(labels["train"][kept_N], origin=origin)
    return (
        {"train": ("train", kept_N[still_N]), "valid": ("train", kept_N[valid_N]), "test": ("train", held_N)},
        f"test is the last {len(held_N)} rows of {files['train'].name} and valid the last {len(valid_N)} before them, "
        "class by class",
    )

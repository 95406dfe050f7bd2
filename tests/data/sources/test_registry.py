"""Sources are found by name and by what lies at a path."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data_sets import (
    refused,
)

from ensdistill.data.sources.registry import SOURCES, open_source, recognise


def test_unknown_names_and_places(tmp_path: Path) -> None:
    refused(lambda: open_source("cifar-10"), "no source 'cifar-10' (did you mean 'cifar10'?)", ", ".join(SOURCES))
    for act in (lambda: recognise(tmp_path / "no"), lambda: open_source("npy", tmp_path / "no")):
        refused(act, str(tmp_path / "no"), "no such file or folder", "expected a .beton file")
    refused(lambda: recognise(tmp_path), "no images that can be read", "class folders")
    (tmp_path / "deeper").mkdir()
    refused(lambda: recognise(tmp_path), "holds one folder, deeper; expected", "at least two classes: give the folder")
    for name, part in (("a.zip", "extract it"), ("a.tar.gz", "not one of CIFAR's"), ("a.txt", "no known kind")):
        (tmp_path / name).write_bytes(b"something")
        refused(partial(recognise, tmp_path / name), name, part)

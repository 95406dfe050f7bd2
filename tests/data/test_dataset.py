"""A prepared folder can be moved, and is refused where it was damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_sets import (
    array_source,
    refused,
)
from msgspec.structs import replace

from ensdistill.data.dataset import DATASET_FILE, load_dataset
from ensdistill.data.prepare import prepare

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_a_prepared_folder_can_be_moved(tmp_path: Path) -> None:
    dataset = prepare(array_source(), tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    moved = load_dataset(tmp_path / "after", verify=True)
    assert moved.paths["test"] == tmp_path / "after" / "test.beton"
    assert replace(moved, splits={}) == replace(dataset, splits={})


def test_dataset_mistakes(tmp_path: Path) -> None:
    refused(lambda: load_dataset(tmp_path), str(tmp_path / DATASET_FILE), "missing", "prepare it first")
    prepare(array_source(), tmp_path)
    file, valid = tmp_path / DATASET_FILE, tmp_path / "valid.beton"
    fields = json.loads(file.read_text())
    for damaged in (
        "",
        "[]",
        "{}",
        '{"format": 1}',
        json.dumps({**fields, "extra": 1}),
        json.dumps({**fields, "splits": {}}),
    ):
        file.write_text(damaged)
        refused(lambda: load_dataset(tmp_path), str(file), "damaged", "prepare the data again")
    file.write_text(json.dumps({**fields, "format": 7}))
    refused(lambda: load_dataset(tmp_path), "of format 7; expected 1")
    file.write_text(json.dumps(fields))
    content = bytearray(valid.read_bytes())
    content[-1] ^= 1
    valid.write_bytes(content)
    load_dataset(tmp_path)
    refused(lambda: load_dataset(tmp_path, verify=True), str(valid), "changed since it was prepared")
    valid.write_bytes(content[:-1])
    refused(lambda: load_dataset(tmp_path), str(valid), f"{len(content) - 1} bytes; expected {len(content)}")
    valid.unlink()
    refused(lambda: load_dataset(tmp_path), str(valid), "missing")

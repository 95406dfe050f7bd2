"""Other bytes, labels or names give another key whatever the stamps; equal data give the same key wherever they lie."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import refused, write_beton, write_images, write_npy
from PIL import Image

from ensdistill.data.beton_file import read_index
from ensdistill.data.prepare import folder_for, prepare
from ensdistill.data.sources import content_hash, folders
from ensdistill.data.sources.content_hash import file_hash
from ensdistill.data.sources.registry import open_source, recognise


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are kept."""
    monkeypatch.setenv("ENSDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "contents"


def pass_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make files look old enough for their hashes to be kept."""
    now = time.time_ns
    monkeypatch.setattr(content_hash, "now", lambda: now() + 2 * content_hash.MIN_AGE_NS)


@pytest.fixture(params=["at once", "later"])
def when(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When a change is made: before hashes are kept, or after."""
    if request.param == "later":
        pass_time(monkeypatch)
    return request.param


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes of ten images, all of one size in pixels and bytes."""
    for k, name in enumerate("abc"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10 * k, 10 * k + 10):
            pixels = np.random.default_rng(i).integers(0, 256, (6, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i:03d}.bmp")
    return tmp_path / "data"


def key(path: Path) -> str:
    return open_source(recognise(path), path).content_key


def stamps(path: Path) -> tuple[int, int]:
    return path.stat().st_atime_ns, path.stat().st_mtime_ns


def flip_a_bit(file: Path, place: int) -> None:
    """Change a byte and put the time of modification back."""
    before, content = stamps(file), bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=before)


def another_file_of_the_name(data: Path) -> None:
    file, new = data / "a" / "003.bmp", data / "new"
    shutil.copyfile(data / "a" / "004.bmp", new)
    os.utime(new, ns=stamps(file))
    new.replace(file)


CHANGES: list[Callable[[Path], object]] = [
    lambda data: flip_a_bit(data / "a" / "003.bmp", -1),
    another_file_of_the_name,
    lambda data: (data / "b" / "013.bmp").rename(data / "a" / "013.bmp"),
    lambda data: (data / "c").rename(data / "renamed"),
    lambda data: (data / "a").rename(data / "x") and (data / "b").rename(data / "a"),
    lambda data: (data / "a" / "003.bmp").unlink(),
    lambda data: (data / "a" / "003.bmp").rename(data / "a" / "999.bmp"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_folders_is_noticed(data: Path, when: str, change: Callable[[Path], object]) -> None:
    before = key(data)
    assert key(data) == before
    change(data)
    assert key(data) != before


def test_the_same_data_elsewhere_have_the_same_key(data: Path, when: str, tmp_path: Path) -> None:
    before = key(data)
    for file in data.rglob("*.bmp"):
        os.utime(file)
    assert key(data) == before
    shutil.copytree(data, tmp_path / "copy")
    data.rename(tmp_path / "moved")
    assert key(tmp_path / "moved") == key(tmp_path / "copy") == before


def test_the_folder_that_one_is_in(data: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(data)
    monkeypatch.chdir(data)
    assert key(Path()) == before
    (data / "a").rename(data / "A")
    assert key(Path()) != before


def test_labels_of_other_files_with_the_same_stamps(tmp_path: Path, when: str) -> None:
    """Two label sets of one data set, as an archive with whole seconds unpacks them."""
    labels = []
    for name in ("clean", "shuffled"):
        (tmp_path / name).mkdir()
        write_npy(tmp_path / name, "", 60)
        if name == "shuffled":
            np.save(tmp_path / name / "labels.npy", np.roll(np.load(tmp_path / name / "labels.npy"), 1))
        for file in (tmp_path / name).iterdir():
            os.utime(file, ns=(10**18, 10**18))
        source = open_source("npy", tmp_path / name)
        dataset = prepare(source, folder_for(tmp_path / "out", source, None))
        labels.append(read_index(dataset.paths["train"]).labels_N)
        assert np.array_equal(labels[-1], source.splits["train"].labels)
    assert not np.array_equal(*labels)


def test_a_written_file_that_changed_is_written_again(data: Path, when: str, tmp_path: Path) -> None:
    first = prepare(open_source("folder", data), tmp_path / "out")
    assert prepare(open_source("folder", data), tmp_path / "out") == first
    file = first.paths["train"]
    flip_a_bit(file, file.stat().st_size // 2)
    assert prepare(open_source("folder", data), tmp_path / "out") == first
    assert file_hash(file) == first.splits["train"].checksum.removeprefix("sha256:")


def test_a_beton_that_changed_is_read_anew(tmp_path: Path, when: str) -> None:
    file = tmp_path / "lone.beton"
    write_beton(file, np.arange(60) % 3)
    first = prepare(open_source("beton", file), tmp_path / "out")
    before = stamps(file)
    write_beton(file, np.arange(60) % 2)
    os.utime(file, ns=before)
    assert prepare(open_source("beton", file), tmp_path / "out").num_classes == 2 < first.num_classes


def test_hashes_are_kept_of_files_that_are_old(data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(data)
    assert not cache.exists()
    pass_time(monkeypatch)
    assert key(data) == before
    (kept,) = cache.iterdir()
    for damaged in ("", "no hash", "00"):
        kept.write_text(damaged)
        assert key(data) == before
    read: list[Path] = []
    sha256 = content_hash._sha256
    monkeypatch.setattr(content_hash, "_sha256", lambda path: read.append(path) or sha256(path))
    assert key(data) == before and not read
    monkeypatch.setattr(content_hash, "KEEP_CTIME", frozenset())  # as on a file system without such times
    assert key(data) == before and len(read) == 30


def test_a_cache_that_cannot_be_written_is_done_without(
    data: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENSDISTILL_CACHE", str(tmp_path / "file"))
    assert key(data) == key(data)


def test_a_file_that_is_gone_is_named(data: Path) -> None:
    source = open_source("folder", data)
    (data / "a" / "003.bmp").unlink()
    refused(lambda: source.content_key, "003.bmp: cannot be read")


def test_annotations_of_tiny_imagenet_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CLASSES", 2), ("TRAIN_PER_CLASS", 3), ("VALID_PER_CLASS", 1), ("TEST", 1)):
        monkeypatch.setattr(folders, f"TINY_IMAGENET_{name}", value)
    for wnid in ("n1", "n2"):
        write_images(tmp_path / "train" / wnid / "images", 3)
    write_images(tmp_path / "val" / "images", 1)
    keys = set()
    for line in ("000.png\tn1\n", "000.png\tn2\n"):
        (tmp_path / "val" / "val_annotations.txt").write_text(line)
        keys.add(open_source("tiny-imagenet", tmp_path).content_key)
    (tmp_path / "words.txt").write_text("n1\tgoldfish\n")
    keys.add(open_source("tiny-imagenet", tmp_path).content_key)
    assert len(keys) == 3

"""Class folders and Tiny ImageNet give their files in the documented splits."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_sets import (
    content_of,
    files,
    refused,
    write_images,
)

from ensdistill.data.sources import folders
from ensdistill.data.sources.registry import open_source, recognise


def test_class_folders_alone_are_split(tmp_path: Path) -> None:
    for name, num in (("zebra", 21), ("ant", 5), ("mole", 3)):
        write_images(tmp_path / name, num)
    write_images(tmp_path / "ant" / "deeper", 1, suffix=".JPG")
    write_images(tmp_path / ".hidden", 1)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    assert recognise(tmp_path) == "folder"
    content = content_of("folder", tmp_path)
    assert content.class_names == ("ant", "mole", "zebra")
    relative = {name: [str(f.relative_to(tmp_path)) for f in files(split)] for name, split in content.splits.items()}
    assert relative["test"] == ["ant/deeper/000.JPG", "mole/002.png", "zebra/019.png", "zebra/020.png"]
    assert relative["valid"] == ["ant/004.png", "mole/001.png", "zebra/018.png"]
    assert relative["train"] == [
        *(f"ant/{i:03d}.png" for i in range(4)), "mole/000.png", *(f"zebra/{i:03d}.png" for i in range(18)),
    ]  # fmt: skip
    assert content.splits["test"].labels.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("valid", ["val", "valid"])
def test_folders_of_splits(tmp_path: Path, valid: str) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 4)
        write_images(tmp_path / valid / name, 2)
    assert recognise(tmp_path) == "folder"
    content = content_of("folder", tmp_path)  # without a test folder, what was set apart is the test split
    assert next(f.parts[-3:] for f in files(content.splits["test"])) == (valid, "a", "000.png")
    assert [f.parts[-3:] for f in files(content.splits["valid"])] == [
        ("train", "a", "003.png"),
        ("train", "b", "003.png"),
    ]
    assert len(files(content.splits["train"])) == 6
    write_images(tmp_path / "test" / "b", 3)  # a class that test lacks is no mistake
    content = content_of("folder", tmp_path)
    assert {name: len(split.labels) for name, split in content.splits.items()} == {"train": 8, "valid": 4, "test": 3}
    assert content.splits["test"].labels.tolist() == [1, 1, 1]


def test_folder_mistakes(tmp_path: Path) -> None:
    refused(lambda: open_source("folder"), "no folder was given", "--data")
    refused(lambda: open_source("imagenet"), "ImageNet's folder with train/ and val/")
    refused(lambda: open_source("folder", tmp_path), str(tmp_path), "0 class folders; expected at least two")
    file = tmp_path / "file.txt"
    file.write_text("text")
    refused(lambda: open_source("folder", file), "no such folder")
    write_images(tmp_path / "val" / "cat", 3)
    refused(lambda: open_source("folder", tmp_path), "valid but no train/")
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, 3)
    write_images(tmp_path / "val" / "dogs", 3)
    refused(lambda: open_source("folder", tmp_path), str(tmp_path / "val" / "dogs"), "did you mean 'dog'?")
    (tmp_path / "val" / "dogs").rename(tmp_path / "val" / "dog")
    open_source("folder", tmp_path)
    refused(lambda: open_source("imagenet", tmp_path), "2 class folders; expected ImageNet's 1000")
    (tmp_path / "train" / "empty").mkdir()
    refused(lambda: open_source("folder", tmp_path), str(tmp_path / "train" / "empty"), "no image", ".png")
    (tmp_path / "train" / "empty").rmdir()
    write_images(tmp_path / "train" / "rare", 1)
    refused(lambda: content_of("folder", tmp_path), "class 2 has too few images")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folders, "TINY_IMAGENET_CLASSES", 3)
    monkeypatch.setattr(folders, "TINY_IMAGENET_TRAIN_PER_CLASS", 5)
    monkeypatch.setattr(folders, "TINY_IMAGENET_VALID_PER_CLASS", 2)
    monkeypatch.setattr(folders, "TINY_IMAGENET_TEST", 4)
    folder = tmp_path / "tiny-imagenet-200"
    for wnid in ("n03", "n01", "n02"):
        write_images(folder / "train" / wnid / "images", 5, suffix=".JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    write_images(folder / "val" / "images", 4, suffix=".JPEG")
    lines = [f"{i:03d}.JPEG\t{wnid}\t0\t1\t2\t3\n" for i, wnid in enumerate(["n02", "n01", "n03", "n02"])]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "words.txt").write_text("n01\tgoldfish\nn02\tnewt, eft\nn09\tother\n")
    return folder


def test_tiny_imagenet(tiny: Path) -> None:
    for path in (tiny, tiny.parent):
        assert recognise(path) == "tiny-imagenet"
        content = content_of("tiny-imagenet", path)
        assert content.class_names == ("goldfish", "newt, eft", "n03")
        assert content.image_shape == (64, 64, 3)
        assert [f.name for f in files(content.splits["train"])] == ["000.JPEG", "001.JPEG", "002.JPEG"] * 3
        assert [f.name for f in files(content.splits["valid"])] == ["003.JPEG", "004.JPEG"] * 3
        assert content.splits["valid"].labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert [f.name for f in files(content.splits["test"])] == [f"{i:03d}.JPEG" for i in range(4)]
        assert content.splits["test"].labels.tolist() == [1, 0, 2, 1]


def test_tiny_imagenet_mistakes(tiny: Path) -> None:
    refused(lambda: open_source("tiny-imagenet"), "Tiny ImageNet is missing", "tiny-imagenet-200.zip", "--data")
    refused(lambda: open_source("tiny-imagenet", tiny / "train"), str(tiny / "train"), "val/val_annotations.txt")
    annotations = tiny / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    for file in (annotations, tiny / "words.txt"):
        whole = file.read_bytes()
        file.write_bytes(whole + b"\xff\t\xff\n")
        refused(lambda: open_source("tiny-imagenet", tiny).content, str(file), "cannot be read", "UTF-8")
        file.write_bytes(whole)
    annotations.write_text(lines + "9.JPEG\tn77\n")
    refused(lambda: open_source("tiny-imagenet", tiny), str(annotations), "line 5", "a class of train/")
    annotations.write_text(lines + "9.JPEG\tn01\n")
    refused(lambda: open_source("tiny-imagenet", tiny), "9.JPEG", "missing")
    annotations.write_text(lines + "000.JPEG\tn01\n")
    refused(lambda: open_source("tiny-imagenet", tiny), "5 images; expected 4")
    annotations.write_text(lines)
    (tiny / "train" / "n03" / "images" / "001.JPEG").unlink()
    refused(lambda: open_source("tiny-imagenet", tiny), "14 images of 3 classes; expected 15", "5 a class")

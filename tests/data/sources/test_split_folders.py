"""Split folders are recognised by name and structure; what can be a class or a split is refused or said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_sets import content_of, files, refused, write_images

from ensdistill.data.sources.registry import recognise
from ensdistill.data.sources.split_folders import split_of


def write_classes(folder: Path, num: int, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for name in classes:
        write_images(folder / name, num)


@pytest.mark.parametrize(
    ("train", "apart"),
    [
        ("Train", "Test"), ("Training", "Testing"), ("training", "validation"), ("seg_train", "seg_test"),
        ("TRAIN", "VALID"), ("training_set", "test_set"), ("trainset", "testset"), ("train2017", "val2017"),
        ("imagesTrain", "imagesVal"), ("trn", "tst"), ("my-train-data", "my-dev-data"), ("trainval", "test"),
    ],
)  # fmt: skip
def test_split_folders_of_other_names(tmp_path: Path, train: str, apart: str) -> None:
    write_classes(tmp_path / train, 5)
    write_classes(tmp_path / apart, 2)
    assert recognise(tmp_path) == "folder"
    content = content_of("folder", tmp_path)
    assert content.class_names == ("cat", "dog")
    assert {name: len(split.labels) for name, split in content.splits.items()} == {"train": 8, "valid": 2, "test": 4}
    assert {file.relative_to(tmp_path).parts[0] for file in files(content.splits["test"])} == {apart}
    assert f"{train}/ is the train split" in content.note and f"{apart}/ is the" in content.note


def test_a_split_folder_in_a_folder_of_its_name(tmp_path: Path) -> None:
    write_classes(tmp_path / "seg_train" / "seg_train", 5)
    write_classes(tmp_path / "seg_test" / "seg_test", 2)
    write_images(tmp_path / "seg_pred", 3)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    content = content_of("folder", tmp_path)
    assert content.class_names == ("cat", "dog") and len(content.splits["test"].labels) == 4
    assert "val/ is left out: it holds no images" in content.note
    assert "seg_pred/ is left out" in content.note


@pytest.mark.parametrize("split", ["train", "Test", "val"])
@pytest.mark.parametrize("inner", ["", "deeper"])
def test_a_class_with_the_name_of_a_split(tmp_path: Path, split: str, inner: str) -> None:
    for name in ("bus", "car"):
        write_images(tmp_path / name, 4)
    write_images(tmp_path / split / inner, 4)
    content = content_of("folder", tmp_path)
    assert content.class_names == tuple(sorted(("bus", "car", split)))
    assert np.bincount(content.splits["train"].labels).tolist() == [2, 2, 2]
    assert f"{split}/ is a class, not a split" in content.note
    write_classes(tmp_path / "all" / "train", 4, ("bus", "car", split))
    assert split in content_of("folder", tmp_path / "all").class_names


def test_what_can_be_a_class_or_a_split_is_refused(tmp_path: Path) -> None:
    def broken(*parts: str, **folders: tuple[str, ...]) -> None:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        for folder, classes in folders.items():
            write_classes(place / folder, 3, classes)
        refused(lambda: content_of("folder", place), str(place), *parts)

    broken("both train/ and training/ can be the train split", train=("a", "b"), training=("a", "b"))
    broken("both val/ and valid/", train=("a", "b"), val=("a",), valid=("b",))
    broken("second/ holds images too", "is no split by its name", train=("a", "b"), second=("a", "b"), test=("a",))
    broken("car/ holds images too", train=("steam", "electric"), car=("",))
    broken("the test split holds images, but no class folders", train=("a", "b"), test=("",))
    broken("splits by name (test/ and train/)", "fewer than two class folders", train=("",), test=("",))
    broken("splits by name (Train/)", "fewer than two class folders", Train=("a",))
    broken("splits by name (test/ and train/)", train=("",), test=("",), other=("",))
    broken("(first, second) holds the folders a, b", "classes or splits", first=("a", "b"), second=("a", "b"))
    broken("holds the folders test, train", cat=("train", "test"), dog=("train", "test"))
    broken("test, valid but no train/", test=("a", "b"), val=("a", "b"))


def test_deeper_folders_of_classes_are_no_splits(tmp_path: Path) -> None:
    for name in "abcdef":
        write_classes(tmp_path / name, 2, ("left", "right"))
    assert content_of("folder", tmp_path).class_names == tuple("abcdef")


def test_a_prepared_data_set_is_no_class(tmp_path: Path) -> None:
    write_classes(tmp_path, 4)
    (tmp_path / "folder-1234").mkdir()
    (tmp_path / "folder-1234" / "dataset.json").write_text("{}")
    assert content_of("folder", tmp_path).class_names == ("cat", "dog")


def test_names_of_splits() -> None:
    for name in ("Train", "TRAIN", "train_2", "x-train", "TrainSet", "train_val"):
        assert split_of(name) == "train", name
    for name in ("constraint", "restrain", "latest", "contest", "value", "rival", "train_test", "device", "2017"):
        assert split_of(name) is None, name


def test_classes_that_are_numbers_are_sorted_as_text_and_said_to_be(tmp_path: Path) -> None:
    write_classes(tmp_path / "a", 3, tuple(map(str, range(11))))
    content = content_of("folder", tmp_path / "a")
    assert content.class_names == ("0", "1", "10", *"23456789")
    assert "classes are sorted as text, not as numbers: 0, 1, 10, 2, …" in content.note
    write_classes(tmp_path / "b", 3, tuple(map(str, range(10))))
    assert "sorted as text" not in content_of("folder", tmp_path / "b").note

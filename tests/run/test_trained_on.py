"""What a run folder was trained on: kept beside its configuration, and compared before anything goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import array_source

from ensdistill.data.prepare import prepare
from ensdistill.data.sources.base import Content, Source
from ensdistill.formats.ours import NetworkInfo, save_network
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.run.trained_on import RECORD_FILE, require_same_data, require_same_teachers, write_record
from ensdistill.runtime.errors import UserError


def teachers_of(seed: int) -> Teachers:
    classifiers = [Classifier(build("wrn10x1", num_classes=3, seed=seed + t), [0.5] * 3, [0.2] * 3) for t in range(2)]
    return Teachers(classifiers, 3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run folder with a training on `array_source()`, taught by `teachers_of(0)`."""
    write_record(tmp_path / "run", prepare(array_source(), tmp_path / "data"), teachers_of(0))
    return begun(tmp_path / "run")


def begun(out: Path) -> Path:
    (out / "teachers/0").mkdir(parents=True)
    (out / "teachers/0/checkpoint.pt").touch()
    return out


def changed(**changes: object) -> Source:
    """The data of another fingerprint, with some of its content replaced."""
    content = array_source().content
    return replace(array_source(fingerprint="2"), read=lambda: replace(content, **changes))


def test_the_same_data_and_teachers_go_on(out: Path) -> None:
    said: list[str] = []
    require_same_data(out, array_source(), None, said.append)
    require_same_teachers(out, teachers_of(0))
    assert not said


def fewer() -> Content:
    content = array_source().content
    return replace(content, splits={**content.splits, "valid": content.splits["valid"].take(np.arange(3))})


@pytest.mark.parametrize(
    ("source", "difference"),
    [
        (changed(), "as many images of the same classes, but images, labels, names or their order are others"),
        (changed(class_names=("a", "c", "b")), "class 1 is called 'b' there, 'c' here"),
        (changed(class_names=("a", "b", "c", "d")), "3 classes there, 4 here"),
        (changed(splits=fewer().splits), "4 valid images there, 3 here"),
    ],
)
def test_other_data_are_refused_with_what_changed(out: Path, source: Source, difference: str) -> None:
    with pytest.raises(UserError) as caught:
        require_same_data(out, source, None, print)
    assert str(caught.value) == (
        f"{out}: holds a run on other data ({difference}); choose another --out, or give the data of before"
    )


def test_other_teachers_are_refused(out: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds a run on other teachers .*; choose another --out, or give the teachers"
    ):
        require_same_teachers(out, teachers_of(1))
    moved = teachers_of(0)
    moved.classifiers[1].pixel_std += 0.1
    with pytest.raises(UserError, match="other teachers"):
        require_same_teachers(out, moved)


def test_where_nothing_was_trained_nothing_is_compared(out: Path, tmp_path: Path) -> None:
    (out / "teachers/0/checkpoint.pt").unlink()
    require_same_data(out, changed(), None, print)
    other = prepare(array_source(fingerprint="2"), tmp_path / "other")
    write_record(out, other, None)
    assert other.source_key in (out / RECORD_FILE).read_text()


def test_a_run_without_a_record_goes_on_and_says_so(tmp_path: Path) -> None:
    out, said = begun(tmp_path / "run"), []
    info = NetworkInfo(
        architecture="wrn10x1", class_names=("a", "b", "c"), image_shape=(5, 7, 3), pixel_mean=(0.5,) * 3,
        pixel_std=(0.2,) * 3, method="ce",
    )  # fmt: skip
    save_network(out / "teachers/0/best.safetensors", build("wrn10x1", num_classes=3), info)
    require_same_data(out, array_source(), None, said.append)
    require_same_teachers(out, teachers_of(0))
    (line,) = said
    assert line.startswith(f"{out}: keeps no key of the data ") and "cannot be checked" in line
    write_record(out, prepare(array_source(), tmp_path / "data"), None)
    assert not (out / RECORD_FILE).exists()  # it would say of the training what nobody knows
    with pytest.raises(UserError, match=r"other data \(class 1 is called 'b' there, 'x' here\)"):  # its files do say
        require_same_data(out, changed(class_names=("a", "x", "c")), None, said.append)


def test_a_damaged_record_is_named(out: Path) -> None:
    (out / RECORD_FILE).write_text("{")
    with pytest.raises(UserError, match=r"data\.json: not readable .*; expected what a run wrote of its data: choose"):
        require_same_data(out, array_source(), None, print)


def test_the_hash_is_of_values_whatever_their_layout(out: Path) -> None:
    require_same_teachers(out, teachers_of(0).to(memory_format=torch.contiguous_format))

"""`evaluate` away from the training data: corrupted images, other data, a run folder and what it stands for, JSON."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import refused, write_npy
from rich.console import Console
from torch import Tensor, nn

from ensdistill import evaluate
from ensdistill.config.methods import Method
from ensdistill.data.corruptions.made import CORRUPTIONS, corrupt
from ensdistill.evaluate import EvaluateCommand, Evaluated, evaluate_all, keep, main
from ensdistill.formats.ours import NetworkInfo, load_network, load_student, save_network, ship, student_path
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.models.students import build_student
from ensdistill.run.away.tables import in_a_sentence
from ensdistill.run.display import Screen
from ensdistill.run.metrics import fit_temperature, measures_at
from ensdistill.runtime.errors import UserError, run_main

K, SHAPE = 3, (5, 7, 3)
LABELS = np.arange(60) % 3
MEAN, STD = (0.5,) * 3, (0.2,) * 3
STUDENT = Method.parse("latentbe+tdiv-sdiv")


def info_of(**changes: Any) -> NetworkInfo:
    values: dict[str, Any] = {
        "architecture": "wrn10x1",
        "class_names": tuple("012"),
        "image_shape": SHAPE,
        "pixel_mean": MEAN,
        "pixel_std": STD,
        "method": "ce",
        "temperature": 1.5,
    }
    return NetworkInfo(**(values | changes))


def network(seed: int) -> nn.Module:
    return build("wrn10x1", num_classes=K, in_channels=3, image_size=SHAPE[0], seed=seed)


def save(path: Path, *seeds: int, **changes: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "outcome.json").write_text("{}")
    members = [network(seed) for seed in seeds]
    save_network(
        path, members[0] if len(seeds) == 1 else MemberNetworks(members), info_of(members=len(seeds), **changes)
    )


def make_run(out: Path) -> Path:
    """The folder of a run of two teachers and four students, of networks that were never trained."""
    for teacher in range(2):
        save(out / "teachers" / str(teacher) / "best.safetensors", teacher)
    for seed in range(2):
        save(out / "students" / f"kd-seed{seed}" / "best.safetensors", 10 + seed, method="kd")
    save(out / "students" / "be-seed0" / "best.safetensors", 20, 21, method="be")
    student = build_student(STUDENT, lambda seed: Classifier(network(seed), MEAN, STD), E=2, seed=30)
    with torch.no_grad():
        for factor in student.factors():
            factor += 0.2 * torch.randn_like(factor)
    folder = out / "students" / f"{STUDENT}-seed0"
    folder.mkdir(parents=True)
    (folder / "outcome.json").write_text("{}")
    ship(student, folder / "best.safetensors", info_of(method=str(STUDENT)))
    (out / "config.json").write_text(json.dumps({"members": 2}))
    return out


KEYS = [
    *("teacher ensemble", "single teacher 1", "single teacher 2", "be", "kd seed0", "kd seed1"),
    *("latentbe+tdiv-sdiv", "latentbe+tdiv-sdiv, members"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("away")
    for split, num in (("train_", 6), ("valid_", 12), ("test_", 9)):
        (folder / "images").mkdir(exist_ok=True)
        write_npy(folder / "images", split, num, seed=num)
    (folder / "grey").mkdir()
    for name, values in (
        ("images", np.random.default_rng(5).integers(0, 256, (60, 8, 8), np.uint8)),
        ("labels", LABELS),
    ):
        np.save(folder / "grey" / f"{name}.npy", values)
    make_run(folder / "run")
    return folder


def images(place: Path, split: str) -> tuple[np.ndarray, Tensor]:
    folder = place / "images"
    return np.load(folder / f"{split}_images.npy"), torch.from_numpy(np.load(folder / f"{split}_labels.npy")).long()


def run(place: Path, *files: Path, printed: io.StringIO | None = None, **options: Any) -> Evaluated:
    values: dict[str, Any] = {"data": str(place / "images"), "folder": place / "data", "precision": "fp32"} | options
    screen = Screen(Console(file=printed or io.StringIO(), width=300))
    command = EvaluateCommand(files=files or (place / "run",), **({"batch_size": 16} | values))
    evaluated = evaluate_all(command, screen)
    keep(command, evaluated, screen)
    return evaluated


@pytest.fixture(scope="module", autouse=True)
def _no_stop_watch() -> Iterator[None]:
    """Speeds are measured for half a second each, and tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "images_per_second", lambda *arguments, **options: 1.0)
        yield


@pytest.fixture(scope="module")
def corrupted(place: Path) -> Evaluated:
    return run(place, corruptions=(), seed=3)


def logits_of(place: Path, key: str, images_NHWC: np.ndarray) -> Tensor:
    """Logits (N, M, K) of one of `KEYS`, from its files, without `evaluate`."""
    out, x_BCHW = place / "run", torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 255
    single = {"single teacher 1": "teachers/0", "single teacher 2": "teachers/1"}
    with torch.inference_mode():
        if key == "teacher ensemble":
            return torch.cat([logits_of(place, teacher, images_NHWC) for teacher in single], dim=1)
        folder = out / single.get(key, "students/" + (key.replace(" ", "-") if "kd" in key else f"{key}-seed0"))
        if key.endswith("members"):
            path = out / "students" / f"{STUDENT}-seed0" / "best.safetensors"
            blank = build_student(STUDENT, lambda seed: Classifier(network(seed), MEAN, STD), E=2, seed=0)
            return load_student(blank, path).eval()(x_BCHW).transpose(0, 1)
        return load_network(folder / "best.safetensors")[0](x_BCHW)[:, None]


def test_a_run_s_folder_stands_for_teachers_students_and_members(place: Path, corrupted: Evaluated) -> None:
    assert list(corrupted.names) == KEYS
    assert [row.members for row in corrupted.rows] == [2, 1, 1, 2, 1, 1, 1, 2]
    x, labels = images(place, "test")
    x_valid, labels_valid = images(place, "valid")
    for key, row in zip(KEYS, corrupted.rows, strict=True):
        temperature = fit_temperature(logits_of(place, key, x_valid), labels_valid)
        expected = measures_at(logits_of(place, key, x), labels, temperature)
        for name in ("acc", "nll", "ece", "cnll", "cece", "brier", "aece"):
            assert getattr(row.measures, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=2e-5), (
                key,
                name,
            )


def test_corrupted_images_are_measured_as_the_definition_has_it(place: Path, corrupted: Evaluated) -> None:
    section = corrupted.away["corruptions"]
    assert section["names"] == list(CORRUPTIONS) and section["severities"] == [1, 2, 3, 4, 5]
    x, labels = images(place, "test")
    for kind, severity, key in (
        ("fog", 2, "teacher ensemble"),
        ("pixelate", 5, KEYS[-1]),
        ("shot_noise", 1, "kd seed1"),
    ):
        changed = np.stack([corrupt(image, kind, severity, index=i, seed=3) for i, image in enumerate(x)])
        found = section["each"][key]
        expected = measures_at(logits_of(place, key, changed), labels, found["temperature"])
        row = section["names"].index(kind)
        for name in ("nll", "ece", "cnll", "cece", "brier", "aece"):
            assert found[name][row][severity - 1] == pytest.approx(getattr(expected, name), rel=1e-3, abs=2e-5), name
        assert found["accuracy"][row][severity - 1] == pytest.approx(expected.acc)
        assert found["mean"]["nll"] == pytest.approx(np.mean(found["nll"]))
    kd = [section["each"][f"kd seed{seed}"] for seed in range(2)]
    assert np.allclose(section["networks"]["kd"]["nll"], np.mean([one["nll"] for one in kd], axis=0))
    assert section["networks"]["kd"]["n"] == 2 and list(section["networks"]) == list(
        dict.fromkeys(corrupted.names.values())
    )
    clean = {key: row.measures for key, row in zip(KEYS, corrupted.rows, strict=True)}
    assert section["each"]["be"]["clean"]["accuracy"] == clean["be"].acc
    assert section["each"]["be"]["temperature"] == clean["be"].temperature  # of clean validation images
    assert "single teacher" in in_a_sentence(section) and "12 kinds at 5 severities" in in_a_sentence(section)


def test_results_are_kept_and_those_of_other_networks_dropped(
    place: Path, corrupted: Evaluated, tmp_path: Path
) -> None:
    file = place / "run" / "away.json"
    assert json.loads(file.read_text())["corruptions"] == json.loads(json.dumps(corrupted.away["corruptions"]))
    run(place, ood=(str(place / "images"),))
    both = json.loads(file.read_text())
    assert list(both) == ["format", "corruptions", "corruptions_of", "ood", "ood_of"] and both["format"] == 1
    assert both["corruptions"] == json.loads(json.dumps(corrupted.away["corruptions"]))
    save(place / "run" / "students" / "kd-seed1" / "best.safetensors", 99, method="kd")
    printed = io.StringIO()
    grey = str(place / "grey")
    run(place, ood=(grey,), printed=printed)
    assert "what it had of corruptions" in printed.getvalue() and "what it had of --ood" in printed.getvalue()
    left = json.loads(file.read_text())
    assert "corruptions" not in left and "corruptions_of" not in left and list(left["ood"]) == [grey]
    save(place / "run" / "students" / "kd-seed1" / "best.safetensors", 11, method="kd")
    own = tmp_path / "mine.json"
    own.write_text('{"format": 7}')
    refused(lambda: run(place, ood=(str(place / "images"),), save=own), "mine.json: is something else", "move it away")
    assert own.read_text() == '{"format": 7}'
    refused(lambda: run(place, ood=(grey,), save=own / "a.json"), "mine.json is no folder that you may write to")


def test_the_report_of_the_run_is_drawn_again(
    place: Path, corrupted: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(evaluate, "draw", lambda out, screen: drawn.append(out))
    screen = Screen(Console(file=io.StringIO()))
    asked = EvaluateCommand(files=(tmp_path,), data=str(place / "images"))
    keep(asked, corrupted, screen)
    assert (tmp_path / "away.json").is_file() and drawn == []  # there is none
    (tmp_path / "report.html").touch()
    keep(replace(asked, save=tmp_path / "elsewhere.json"), corrupted, screen)
    assert drawn == []
    keep(asked, corrupted, screen)
    assert drawn == [tmp_path]


def write_folders(folder: Path, names: tuple[str, ...], side: int, seed: int) -> Path:
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


def test_other_data_are_told_apart_with_members_where_there_are(place: Path, tmp_path: Path) -> None:
    noise, printed = write_folders(tmp_path / "noise", ("a", "b"), 11, seed=1), io.StringIO()
    own, grey = str(place / "images"), str(place / "grey")
    file = tmp_path / "away.json"
    found = run(place, ood=(own, grey, str(noise)), save=file, printed=printed)
    ood, of = found.away["ood"], found.away["ood_of"]
    assert list(ood) == [own, grey, str(noise)]
    kd = [of[grey]["each"][f"kd seed{seed}"]["entropy"]["auroc"] for seed in range(2)]
    assert ood[grey]["kd"]["entropy"]["auroc"] == pytest.approx(np.mean(kd)) and "n" not in ood[grey]["kd"]
    for key in KEYS:
        scores = {"max_probability", "entropy"}
        scores |= {"mutual_information"} if key in ("teacher ensemble", "be", KEYS[-1]) else set()
        assert of[grey]["each"][key].keys() == scores
        assert all(value["auroc"] == pytest.approx(0.5) for value in of[own]["each"][key].values())
    said = printed.getvalue()
    assert "is --data itself" in said and of[own]["known_images"] == 9
    assert f"--ood {grey}: images of 8x8 pixels, 1 channel, brought to 5x7 pixels, 3 channels" in said
    assert f"--ood {noise}: of each image the central square, brought to 5x5 pixels, 3 channels" in said
    assert of[grey]["num_outside"] == 6 and of[str(noise)]["num_outside"] == 2
    assert json.loads(file.read_text())["ood"] == json.loads(json.dumps(ood))


def test_classes_by_the_same_name_and_known_images_are_warned_of(tmp_path: Path) -> None:
    data = write_folders(tmp_path / "pictures", ("Cat", "dog", "ship"), 8, seed=1)
    other = write_folders(tmp_path / "other", ("cat", "lorry"), 8, seed=1)  # the first class' images, pixel by pixel
    file = tmp_path / "a.safetensors"
    save(file, 0, class_names=("Cat", "dog", "ship"), image_shape=(8, 8, 3))
    printed = io.StringIO()
    found = run(tmp_path, file, data=str(data), ood=(str(other),), printed=printed)
    assert "1 of its 2 classes have names of the training data's (cat)" in printed.getvalue()
    assert "2 of its images are among those that are measured as --data" in printed.getvalue()
    of = found.away["ood_of"][str(other)]
    assert (of["shared_classes"], of["known_images"]) == (["cat"], 2)
    assert "results:" not in printed.getvalue()  # of a file alone nothing is kept


def write_stored(folder: Path, x: np.ndarray, labels: Tensor) -> Path:
    folder.mkdir()
    np.save(folder / "fog.npy", np.concatenate([np.clip(x.astype(int) + s, 0, 255) for s in range(5)]).astype(np.uint8))
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5))
    return folder


def test_a_folder_of_corrupted_images_is_measured(place: Path, tmp_path: Path) -> None:
    x, labels = images(place, "test")
    folder = write_stored(tmp_path / "c", x, labels)
    file = place / "run" / "teachers" / "1" / "best.safetensors"
    found = run(place, file, corruptions=(folder,))
    section = found.away["corruptions"]
    values = section["each"][str(file)]
    assert section["names"] == ["fog"] and len(values["accuracy"]) == 1
    # severity 1 are the images themselves here: their measures
    for name in ("accuracy", "nll", "cnll", "brier", "aece"):
        assert values[name][0][0] == pytest.approx(values["clean"][name], rel=1e-5)
    refused(lambda: run(place, file, corruptions=(folder,), split="valid"), "of the test split, --split is valid")
    np.save(folder / "fog.npy", np.load(folder / "fog.npy")[:30])
    refused(lambda: run(place, file, corruptions=(folder,)), "fog.npy: 30 images; expected 45")


def test_the_command_prints_tables_and_a_sentence(place: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    x, labels = images(place, "test")
    folder = write_stored(tmp_path / "c", x, labels)
    own = ["--data", str(place / "images"), "--folder", str(place / "data"), "--precision", "fp32"]
    words = ["evaluate", str(place / "run"), *own, "--save", str(tmp_path / "a.json"), "--ood", str(place / "images")]
    monkeypatch.setattr(sys, "argv", [*words, "--corruptions", str(folder), "--per-corruption"])
    assert run_main(main) == 0
    printed = capsys.readouterr().out
    for word in ("Brier", "aECE", "clean", "mean", "kd (n = 2)", "±", "fog", "AUROC", "FPR95", "mutual information"):
        assert word in printed, word
    assert "mean corruption accuracy in per cent, over 1 kinds at 5 severities: teacher ensemble" in printed
    assert list(json.loads((tmp_path / "a.json").read_text())["corruptions"]["networks"]["kd"]["accuracy"][0])
    (tmp_path / "a.json").unlink()
    monkeypatch.setattr(sys, "argv", [*words, "--json"])
    assert run_main(main) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["networks", "ood", "ood_of"] and len(found["networks"]) == len(KEYS)
    assert json.loads((tmp_path / "a.json").read_text())["ood"] == found["ood"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--corruptions", str(folder), str(place / "run"), *own])
    assert run_main(main) == 2
    assert "give networks before options" in capsys.readouterr().err


def test_a_folder_that_is_no_run_or_has_nothing_trained_is_refused(place: Path, tmp_path: Path) -> None:
    refused(lambda: run(place, place / "images"), "images: no run's folder (it has no config.json)")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "teachers" / "0").mkdir(parents=True)
    refused(lambda: run(place, tmp_path), "no network is trained to the end", "--resume")
    out = make_run(tmp_path / "run")
    student_path(out / "students" / f"{STUDENT}-seed0" / "best.safetensors").unlink()
    refused(lambda: run(place, out), "not the student of this run")
    (out / "students" / f"{STUDENT}-seed0" / "outcome.json").unlink()
    printed = io.StringIO()
    assert list(run(place, out, printed=printed).names) == KEYS[:-2]
    assert "not trained to the end, and left out: latentbe+tdiv-sdiv-seed0" in printed.getvalue()


def test_contradictions_are_refused(place: Path) -> None:
    refused(lambda: run(place, save=Path("a.json")), "--save: nothing to save; give --corruptions")
    refused(lambda: run(place, per_corruption=True), "--per-corruption: nothing to")
    refused(lambda: run(place, ood=("digits", "digits")), "--ood: got digits twice")
    refused(lambda: run(place, corruptions=(), seed=-1), "--seed: got -1")
    file = place / "run" / "teachers" / "0" / "best.safetensors"
    refused(lambda: run(place, file, file), "given twice")
    with pytest.raises(UserError, match="nowhere: no such file"):
        run(place, ood=("nowhere",))


def test_labels_of_another_order_are_suspected(place: Path) -> None:
    """A network that knows its images, and is at chance on what corrupted them least."""
    from ensdistill.run.away.corruptions import _warn_of_other_labels
    from ensdistill.run.away.networks import Found, Loaded

    found = Found(key="a", name="a", file=Path("a"), info=info_of(class_names=tuple("0123456789")))
    loaded = {"a": Loaded(found=found, network=nn.Identity(), members=None)}
    clean = {"a": measures_at(20.0 * torch.eye(10)[:, None], torch.arange(10), math.nan)}
    for first, expected in ((0.11, 1), (0.6, 0)):
        said: list[str] = []
        _warn_of_other_labels({"a": {"accuracy": [[first, 0.1], [0.1, 0.1]]}}, clean, loaded, said.append)
        assert len(said) == expected

"""Predictions: the very probabilities of an evaluation, and what happens to pictures that are none."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from saved_networks import BUILDER, CLASSES, save_tiny, tiny

from ensdistill.formats.ours import load_network
from ensdistill.predict import PredictCommand, main, predict
from ensdistill.run.away.data import feed_of, open_data
from ensdistill.run.display import Screen
from ensdistill.run.metrics import probabilities
from ensdistill.run.predict import predict as logits_of
from ensdistill.runtime.cli import plain_console
from ensdistill.runtime.errors import UserError, run_main

CPU = torch.device("cpu")


def picture(path: Path, height: int, width: int, seed: int, **options: Any) -> Path:
    """Write a picture of coarse random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).save(path, **options)
    return path


def run(*images: Path, file: Path, capsys: Any, **options: Any) -> tuple[int, list[dict[str, Any]], str]:
    """Predict as JSON: number of unreadable pictures, the lines, what was said."""
    command = PredictCommand(file=file, images=images, json=True, builder=BUILDER, precision="fp32", **options)
    said = io.StringIO()
    unreadable = predict(command, Screen(plain_console(file=said)))
    return unreadable, [json.loads(line) for line in capsys.readouterr().out.splitlines()], said.getvalue()


def by_class(line: dict[str, Any]) -> list[float]:
    """Probabilities of a line in the order of the classes."""
    return [entry["probability"] for entry in sorted(line["classes"], key=lambda entry: entry["index"])]


@pytest.mark.parametrize("one_size", [False, True])
def test_the_probabilities_are_those_of_an_evaluation(tmp_path: Path, capsys, one_size: bool) -> None:
    file = save_tiny(tmp_path / "a.safetensors", channels=3, size=24)
    data = tmp_path / "data"
    random = np.random.default_rng(1)
    for split, counts in (("train", 3), ("valid", 2), ("test", 4)):
        for seed, name in enumerate(CLASSES):
            for i in range(counts):
                size = (24, 24) if one_size else random.integers(20, 60, 2).tolist()
                ending = "png" if one_size or i % 2 else "jpg"
                picture(data / split / name / f"{i}.{ending}", *size, seed=10 * seed + i)
    classifier, info = load_network(file, builder=BUILDER)
    classifier = classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    prepared = open_data(str(data), None, tmp_path / "beton", info.image_shape, Screen(Console(quiet=True)))
    with feed_of(prepared, "test", info.image_shape[0], 5) as feed:
        logits_NMK, _ = logits_of(classifier, feed, device=CPU, precision="fp32")
    expected = probabilities(logits_NMK, info.temperature)
    assert expected.std(dim=0).min() > 0.01  # pictures differ

    unreadable, lines, said = run(data / "test", file=file, capsys=capsys, batch_size=5)
    assert (unreadable, said) == (0, "")
    assert [line["image"] for line in lines] == sorted(str(path) for path in (data / "test").rglob("*.*"))
    assert torch.equal(torch.tensor([by_class(line) for line in lines], dtype=torch.float64), expected)
    assert all(line["temperature"] == 1.37 for line in lines)
    first = lines[0]["classes"]
    assert first[0]["probability"] >= first[1]["probability"] >= first[2]["probability"]
    assert first[0]["class"] == CLASSES[first[0]["index"]]


def test_arrays_go_in_as_they_are(tmp_path: Path, capsys) -> None:
    file = save_tiny(tmp_path / "a.safetensors", temperature=None)
    images_NHW = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images_NHW)
    unreadable, lines, said = run(tmp_path / "x.npy", file=file, capsys=capsys, batch_size=2, top=9)
    assert unreadable == 0 and "has no fitted temperature: probabilities are the network's own, not" in said
    assert [line["image"] for line in lines] == [f"{tmp_path / 'x.npy'}[{i}]" for i in range(5)]
    with torch.inference_mode():
        expected = tiny().eval()((torch.from_numpy(images_NHW)[:, None].float() / 255 - 0.3) / 0.2).softmax(-1)
    found = torch.tensor([by_class(line) for line in lines])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert lines[0]["temperature"] is None


def test_colours_become_grey_for_a_network_of_one_channel(tmp_path: Path, capsys) -> None:
    file = save_tiny(tmp_path / "a.safetensors")
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.save(tmp_path / "grey.npy", grey[None])
    _, lines, said = run(tmp_path / "grey.png", tmp_path / "grey.npy", file=file, capsys=capsys, batch_size=1)
    assert by_class(lines[0]) == by_class(lines[1]) and "colours are turned into grey" in said


def test_what_cannot_be_read_is_named_and_the_others_are_done(tmp_path: Path, monkeypatch, capsys) -> None:
    file = save_tiny(tmp_path / "a.safetensors", channels=3)
    good = [picture(tmp_path / f"in/{name}.png", 8, 8, seed=i) for i, name in enumerate("ad")]
    (tmp_path / "in/b.jpg").write_bytes(b"no picture")
    (tmp_path / "in/c.png").write_bytes(good[0].read_bytes()[:60])
    arguments = ["predict", str(file), str(tmp_path / "in"), "--builder", BUILDER, "--top", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    assert run_main(main) == 3
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.jpg", "c.png", "d.png"]
    assert ["error" in line for line in lines] == [False, True, True, False]
    assert captured.err.count("error: ") == 2 and "b.jpg: cannot be read (no image)" in captured.err
    assert "2 of the pictures could not be read" in captured.err

    monkeypatch.setattr(sys, "argv", arguments)
    assert run_main(main) == 3
    captured = capsys.readouterr()
    title, *rest = [line for line in captured.out.splitlines() if line.strip()]
    assert title.strip() == "probabilities, calibrated at temperature 1.370"
    assert rest[0].split() == ["image", "class", "p", "then"] and len(rest) == 4  # head, line, two pictures
    classes = lines[0]["classes"]
    then = [word for entry in classes for word in (entry["class"], f"{entry['probability']:.4f}")]
    assert rest[2].split() == [str(good[0]), *then]


def test_rows_of_later_batches_stand_under_the_first_ones(tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "a.safetensors")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8))
    printed = io.StringIO()
    command = PredictCommand(file=file, images=(tmp_path / "x.npy",), batch_size=5, builder=BUILDER, precision="fp32")
    assert predict(command, Screen(Console(quiet=True)), plain_console(file=printed)) == 0
    rows = [line for line in printed.getvalue().splitlines() if "x.npy[" in line]
    assert len(rows) == 12 and len({re.search(r"[01]\.\d{4}", row).start() for row in rows}) == 1


def test_mistakes_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = save_tiny(tmp_path / "a.safetensors", image_shape=(8, 12, 1))
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "floats.npy", np.zeros((2, 8, 12)))
    np.save(tmp_path / "small.npy", np.zeros((2, 8, 8), np.uint8))
    one = picture(tmp_path / "one.png", 8, 12, seed=0)
    for message, images, options in (
        ("no picture given", (), {}),
        ("--top: got 0, expected at least 1", (one,), {"top": 0}),
        ("--batch-size: got 0", (one,), {"batch_size": 0}),
        ("nowhere.png: no such file or folder", (one, tmp_path / "nowhere.png"), {}),
        ("empty: no image; expected files that end in", (tmp_path / "empty",), {}),
        ("floats.npy: images are float64; expected uint8", (tmp_path / "floats.npy",), {}),
        (r"small.npy: images of shape \(8, 8, 1\); expected \(8, 12, 1\), \(H, W, C\)", (tmp_path / "small.npy",), {}),
        ("one.png: not a safetensors file", (one,), {"file": one}),
    ):
        command = PredictCommand(**({"file": file, "images": images, "builder": BUILDER} | options))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            predict(command, Screen(Console(quiet=True)))


def test_pictures_of_another_size_are_not_squeezed_into_what_is_no_square(tmp_path: Path, capsys) -> None:
    file = save_tiny(tmp_path / "a.safetensors", image_shape=(8, 12, 1))
    fits, other = (picture(tmp_path / f"{size}.png", size, 12, seed=0) for size in (8, 9))
    unreadable, lines, said = run(fits, other, file=file, capsys=capsys)
    assert unreadable == 1 and "classes" in lines[0]
    assert lines[1]["error"] == f"{other}: 9x12 pixels; expected 8x12, which the network takes: only squares are cut to"
    assert lines[1]["error"] in said


def test_a_network_that_diverged_is_named(tmp_path: Path, capsys) -> None:
    from ensdistill.formats.ours import read_info, save_network

    file = save_tiny(tmp_path / "a.safetensors")
    network = tiny()
    with torch.no_grad():
        network[-1].bias.fill_(float("nan"))
    save_network(file, network, read_info(file))
    with pytest.raises(UserError, match=r"a.safetensors: gives values that are not finite for .*one.png"):
        run(picture(tmp_path / "one.png", 8, 8, seed=0), file=file, capsys=capsys)


def test_help_names_every_option(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["predict", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--top", "--json", "--batch-size", "--precision", "--device", "--builder"):
        assert option in printed

"""Evaluation: the loop over a feed, the command on scikit-learn's digits, and every error message."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ensdistill.data.feed import Feed
from ensdistill.data.sources.registry import open_source
from ensdistill.evaluate import EvaluateCommand, FileRow, _below, evaluate, main
from ensdistill.formats.class_order import in_order
from ensdistill.formats.ours import NetworkInfo, save_network
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import MemberNetworks
from ensdistill.run.display import Screen
from ensdistill.run.metrics import ensemble_log_probs, fit_temperature, measures, measures_at
from ensdistill.run.predict import images_per_second, predict
from ensdistill.runtime.errors import UserError, run_main

CPU = torch.device("cpu")
DIGITS = tuple("0123456789")


class ListFeed:
    """Batches from a list, for what asks a feed for nothing else."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.is_open = False

    @contextmanager
    def epoch(self, epoch: int) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        assert epoch == 0
        self.is_open = True
        yield iter(self.batches)
        self.is_open = False


def uint8_images(B: int, seed: int) -> Tensor:
    return torch.randint(256, (B, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def feed() -> Feed:
    batches = [(uint8_images(B, seed=B), torch.arange(B) + 10 * B) for B in (4, 4, 3)]
    return cast(Feed, ListFeed(batches))


def pixel_network(seen: list[Tensor] | None = None) -> nn.Module:
    """Logits that are three fixed pixels, whatever the batch they come in."""

    class Pixels(nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            if seen is not None:
                seen.append(x_BCHW)
            return torch.stack([x_BCHW[:, 0, 1, 2], x_BCHW[:, 1, 4, 6], x_BCHW[:, 2, 0, 3]], dim=1)

    return Pixels()


def test_predict_gives_every_image_in_order(feed: Feed) -> None:
    seen: list[Tensor] = []
    logits_NMK, labels_N = predict(pixel_network(seen), feed, device=CPU, precision="fp32")
    images = torch.cat([images for images, _ in cast(ListFeed, feed).batches]).float() / 255
    expected = torch.stack([images[:, 1, 2, 0], images[:, 4, 6, 1], images[:, 0, 3, 2]], dim=1)
    assert torch.equal(logits_NMK, expected[:, None])
    assert labels_N.tolist() == [*range(40, 44), *range(40, 44), *range(30, 33)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32 for x in seen)
    assert not cast(ListFeed, feed).is_open
    assert not logits_NMK.is_inference()


def test_predict_takes_members_first_and_gives_images_first(feed: Feed) -> None:
    network = pixel_network()
    logits_NMK, _ = predict(lambda x: torch.stack([network(x), 2 * network(x) + 1]), feed, device=CPU, precision="fp32")
    assert logits_NMK.shape == (11, 2, 3)
    assert torch.equal(logits_NMK[:, 1], 2 * logits_NMK[:, 0] + 1)


def test_predict_leaves_no_graph_and_one_batch_is_enough() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(105, 4))
    one = cast(Feed, ListFeed([(uint8_images(1, seed=0), torch.tensor([2]))]))
    logits_NMK, labels_N = predict(network, one, device=CPU, precision="fp32")
    assert logits_NMK.shape == (1, 1, 4) and labels_N.shape == (1,)
    assert not logits_NMK.requires_grad and not logits_NMK.is_inference()


def test_predict_in_bf16_computes_in_bf16_and_answers_in_fp32(feed: Feed) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 15, 4))
    types: list[torch.dtype] = []
    network[0].register_forward_hook(lambda module, x, y: types.append(y.dtype))
    exact, _ = predict(network, feed, device=CPU, precision="fp32")
    rough, _ = predict(network, feed, device=CPU, precision="bf16")
    assert types == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.05


def test_speed_counts_images_a_second() -> None:
    import time

    calls = []

    def slow(x_BCHW: Tensor) -> Tensor:
        calls.append(len(x_BCHW))
        time.sleep(0.5 if len(calls) == 1 else 0.05)  # the first run warms up and does not count
        return x_BCHW.flatten(1)

    rate = images_per_second(slow, uint8_images(6, seed=0), device=CPU, precision="fp32")
    assert 0.3 * 6 / 0.05 < rate <= 6 / 0.05
    assert len(calls) >= 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


def info_of(**changes: Any) -> NetworkInfo:
    values: dict[str, Any] = {
        "architecture": "wrn10x1",
        "class_names": DIGITS,
        "image_shape": (8, 8, 1),
        "pixel_mean": (0.3,),
        "pixel_std": (0.4,),
        "method": "kd",
        "temperature": 1.5,
    }
    return NetworkInfo(**(values | changes))


def save(path: Path, *, seeds: tuple[int, ...] = (0,), **changes: Any) -> Path:
    info = info_of(members=len(seeds), **changes)
    members = [build(info.architecture, **info.build_arguments, seed=seed) for seed in seeds]
    save_network(path, members[0] if len(seeds) == 1 else MemberNetworks(members), info)
    return path


def run(folder: Path, *files: Path, screen: Screen | None = None, **options: Any) -> list[FileRow]:
    command = EvaluateCommand(
        files=files, **({"data": "digits", "folder": folder / "data", "precision": "fp32"} | options)
    )
    return evaluate(command, screen or Screen(Console(quiet=True)))


def digits_logits(seeds: tuple[int, ...], split: str) -> tuple[Tensor, Tensor]:
    """Logits (N, M, K) of freshly drawn networks and labels, without a feed and without a file."""
    data = open_source("digits").splits[split]
    x_BCHW = torch.from_numpy(np.asarray(data.images)).permute(0, 3, 1, 2).float() / 255
    networks = [build("wrn10x1", num_classes=10, in_channels=1, image_size=8, seed=seed) for seed in seeds]
    with torch.inference_mode():
        logits = torch.stack([Classifier(network, (0.3,), (0.4,)).eval()(x_BCHW) for network in networks], dim=1)
    return logits, torch.from_numpy(data.labels)


def values(measured: Any) -> list[float]:
    return [measured.acc, measured.nll, measured.ece, measured.cnll, measured.cece, measured.temperature]


def test_files_are_measured_as_the_definition_has_it(folder: Path, tmp_path: Path) -> None:
    single = save(tmp_path / "single.safetensors", seeds=(3,))
    ensemble = save(tmp_path / "be.safetensors", seeds=(3, 4), method="be")
    rows = run(folder, single, ensemble, batch_size=128)
    for row, seeds in zip(rows, [(3,), (3, 4)], strict=True):
        expected = measures(*digits_logits(seeds, "test"), *digits_logits(seeds, "valid"))
        assert values(row.measures) == pytest.approx(values(expected), rel=1e-4, abs=2e-6)
        assert (row.num_images, row.temperature_from, row.members) == (1000, "valid", len(seeds))
        assert row.images_per_s > 0
    assert [row.file for row in rows] == [str(single), str(ensemble)]


def test_image_files_of_many_sizes_are_cropped_to_the_network_s_size(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    greys: dict[str, list[int]] = {}
    for split, class_name, count in [(s, c, n) for s, n in (("train", 3), ("valid", 4), ("test", 5)) for c in "ab"]:
        (tmp_path / split / class_name).mkdir(parents=True)
        for i in range(count):  # one grey all over: whatever the crop, it is known what the network sees
            grey, (height, width) = int(random.integers(20, 236)), random.integers(30, 50, 2)
            greys.setdefault(split, []).append(grey)
            Image.new("RGB", (int(width), int(height)), (grey,) * 3).save(tmp_path / split / class_name / f"{i}.png")
    changes: dict[str, Any] = {
        "class_names": ("a", "b"),
        "image_shape": (24, 24, 3),
        "pixel_mean": (0.5,) * 3,
        "pixel_std": (0.1,) * 3,
    }
    file = save(tmp_path / "a.safetensors", **changes)
    (row,) = run(tmp_path, file, data=str(tmp_path), batch_size=4)

    network = build("wrn10x1", num_classes=2, in_channels=3, image_size=24, seed=0)
    classifier = Classifier(network, (0.5,) * 3, (0.1,) * 3).eval()
    with torch.inference_mode():
        x_BCHW = (torch.tensor(greys["test"]) / 255).view(-1, 1, 1, 1).expand(-1, 3, 24, 24)
        expected = measures_at(classifier(x_BCHW).unsqueeze(1), torch.tensor([0] * 5 + [1] * 5), 1.0)
    assert row.num_images == 10
    assert row.measures.nll == pytest.approx(expected.nll, rel=0.02)  # JPEG may move a grey by one


def test_image_files_that_are_not_square_are_shown_whole_and_the_split_is_said(tmp_path: Path) -> None:
    for k, name in enumerate("ab"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels_HWC = np.random.default_rng(100 * k + i).integers(0, 256, (8, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels_HWC).save(tmp_path / "data" / name / f"{i:02d}.png")
    changes: dict[str, Any] = {"pixel_mean": (0.5,) * 3, "pixel_std": (0.1,) * 3}
    file = save(tmp_path / "a.safetensors", class_names=("a", "b"), image_shape=(8, 12, 3), **changes)
    printed = io.StringIO()
    screen = Screen(Console(file=printed, width=200))
    (row,) = run(tmp_path / "out", file, data=str(tmp_path / "data"), batch_size=4, screen=screen)
    assert row.num_images == 2 and "folder: the test split is the last 2 of train" in printed.getvalue()
    data = open_source("folder", tmp_path / "data").splits["test"]
    x_BCHW = torch.from_numpy(np.stack([np.asarray(Image.open(str(path))) for path in data.images]))
    network = build("wrn10x1", num_classes=2, in_channels=3, image_size=8, seed=0)
    with torch.inference_mode():
        logits = Classifier(network, (0.5,) * 3, (0.1,) * 3).eval()(x_BCHW.permute(0, 3, 1, 2).float() / 255)
    expected = measures_at(logits.unsqueeze(1), torch.from_numpy(data.labels), 1.0)
    assert row.measures.nll == pytest.approx(expected.nll, rel=1e-4)


def test_on_validation_images_the_temperature_is_the_file_s(folder: Path, tmp_path: Path) -> None:
    known, unknown = save(tmp_path / "a.safetensors"), save(tmp_path / "b.safetensors", temperature=None)
    with_it, without = run(folder, known, unknown, split="valid")
    logits, labels = digits_logits((0,), "valid")
    assert values(with_it.measures) == pytest.approx(values(measures_at(logits, labels, 1.5)), rel=1e-4)
    assert (with_it.temperature_from, without.temperature_from) == ("file", "none")
    assert math.isnan(without.measures.cnll) and without.to_json()["cnll"] is None
    assert without.measures.nll == with_it.measures.nll
    assert fit_temperature(logits, labels) != pytest.approx(1.5, rel=0.1)


def test_the_command_prints_one_table(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    files = [str(save(tmp_path / f"{name}.safetensors", seeds=(seed,))) for seed, name in enumerate(("one", "two"))]
    monkeypatch.setattr(
        sys, "argv", ["evaluate", *files, "--data", "digits", "--folder", str(folder / "data"), "--precision", "fp32"]
    )
    assert run_main(main) == 0
    printed = capsys.readouterr().out
    for word in ("ACC", "NLL", "ECE", "cNLL", "cECE", "T", "images/s", "1,000 test images", "one.safetensors", "kd"):
        assert word in printed
    assert printed.count("1,000 test images") == 1
    logits, labels = digits_logits((1,), "test")
    assert f"{(ensemble_log_probs(logits).argmax(1) == labels).double().mean() * 100:.2f}" in printed


def test_the_command_prints_json_alone(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    file = save(tmp_path / "a.safetensors", class_names=tuple("abcdefghij"))
    run(folder, file)
    (data,) = (folder / "data").glob("digits-*")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(file), "--data", str(data), "--json"])
    assert run_main(main) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)
    assert row["file"] == str(file) and row["num_images"] == 1000
    assert {"acc", "nll", "ece", "cnll", "cece", "temperature", "images_per_s", "precision"} <= row.keys()
    assert "class 0 is called 'a', in the data '0'" in captured.err


def test_a_user_s_mistake_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "none.safetensors"), "--data", "digits"])
    assert run_main(main) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {tmp_path / 'none.safetensors'}: cannot be read") and not captured.out
    assert captured.err.count("\n") == 1


def test_help_names_every_option(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--data", "--source", "--folder", "--split", "--batch-size", "--precision", "--builder", "--json"):
        assert option in printed


def test_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", class_names=("a", "b", "c"))
    with pytest.raises(UserError, match=r"a.safetensors: knows 3 classes, the data 'digits' have 10; give the data"):
        run(folder, file)


def test_the_same_classes_in_another_order_are_taken_by_name(folder: Path, tmp_path: Path) -> None:
    straight, moved = save(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    order = [3, 1, 9, 0, 2, 8, 7, 5, 6, 4]
    info = info_of(class_names=tuple(DIGITS[k] for k in order))
    save_network(moved, in_order(build("wrn10x1", **info.build_arguments, seed=0), order), info)
    printed = io.StringIO()
    one, other = run(folder, straight, moved, screen=Screen(Console(file=printed)))
    assert values(other.measures) == pytest.approx(values(one.measures), rel=1e-5)
    assert "b.safetensors: class 0 is called '3', in the data '0': the same classes in" in printed.getvalue()
    other_names = save(tmp_path / "c.safetensors", class_names=(*DIGITS[1:], "ten"))
    with pytest.raises(UserError, match=r"c.safetensors: class 9 is called 'ten', which the data do not have"):
        run(folder, other_names)


def test_other_images_are_refused(folder: Path, tmp_path: Path) -> None:
    small = save(tmp_path / "small.safetensors")
    wide = save(tmp_path / "wide.safetensors", image_shape=(8, 12, 1))
    with pytest.raises(
        UserError, match=r"images are 8x8 pixels, 1 channel, .*wide.safetensors takes 8x12 pixels, 1 channel;"
    ):
        run(folder, wide)
    with pytest.raises(UserError, match=r"wide.safetensors: takes images of 8x12 .*, .*small.safetensors of 8x8"):
        run(folder, small, wide)


def test_a_network_that_diverged_is_named(folder: Path, tmp_path: Path) -> None:
    info = info_of()
    network = build("wrn10x1", **info.build_arguments)
    with torch.no_grad():
        next(iter(network.parameters())).fill_(math.nan)
    save_network(tmp_path / "bad.safetensors", network, info)
    with pytest.raises(UserError, match=r"bad.safetensors: .*not finite"):
        run(folder, tmp_path / "bad.safetensors")


def test_bad_options_are_refused(folder: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no file given; expected one or more"):
        run(folder)
    with pytest.raises(UserError, match="--batch-size: got 0, expected at least 1"):
        run(folder, file, batch_size=0)
    with pytest.raises(UserError, match=r"no source 'digit'.*did you mean 'digits'"):
        run(folder, file, source="digit")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        run(folder, file, data=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("files", "folder", "names"),
    [
        (["run/kd/best.safetensors"], "", ["run/kd/best.safetensors"]),
        (["run/kd/best.safetensors", "run/be/best.safetensors"], "run", ["kd", "be"]),
        (["run/kd/best.safetensors", "run/kd/last.safetensors"], "run", ["kd", "kd/last.safetensors"]),
        (["run/teachers", "run/teachers/0/best.safetensors"], "run", ["teachers", "teachers/0"]),
        (["a.safetensors", "b.safetensors"], ".", ["a.safetensors", "b.safetensors"]),
        (["/one/a.safetensors", "/two/b.safetensors"], "/", ["one/a.safetensors", "two/b.safetensors"]),
        (["run/kd/best.safetensors", "run/kd"], "", ["run/kd/best.safetensors", "run/kd"]),
    ],
)
def test_names_of_files_are_short_where_they_lie_together(files: list[str], folder: str, names: list[str]) -> None:
    assert _below(files) == (folder, names)

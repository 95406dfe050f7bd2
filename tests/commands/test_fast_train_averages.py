"""AdamW and averages over time in the whole command: rows, files, what other commands make of them."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys

import pytest
import safetensors.torch
import torch

from ensdistill import evaluate, fast_train
from ensdistill.formats.ours import load_network, read_info
from ensdistill.models import build
from ensdistill.runtime.errors import run_main

SMALL = (
    "--members 2 --train-images 64 --teacher.epochs 3 --teacher.warmup-epochs 1 --student.epochs 3 "
    "--student.warmup-epochs 1 --teacher.batch-size 16 --student.batch-size 16 --precision fp32 --threads 1 "
    "--methods kd latentbe be"
)
AVERAGES = {"best-ema": "EMA 0.9", "swa": "SWA 2"}


def run(*arguments: object) -> tuple[int, str]:
    """The command in this process: its exit code, and what it printed."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["fast_train", *SMALL.split(), *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return run_main(fast_train.main), printed.getvalue()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("averages") / "digits"
    code, printed = run("--out", out, "--optimizer", "adamw", "--ema", "0.9", "--swa", "2")
    assert code == 0, printed
    return out, printed


def test_the_table_has_a_row_of_each_average(finished):
    out, printed = finished
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    for name in ("single teacher", "kd", "latentbe", "be"):
        for label in AVERAGES.values():
            count = r" \(n = 2\)" if name == "single teacher" else ""
            assert re.search(rf"^ +{name}, {re.escape(label)}{count} +\d+\.\d\d ", printed, re.M), (name, label)
            row = rows[f"{name}, {label}"]
            assert 0 < row["measures"]["acc"] <= 1 and row["seconds"] is None and rows[name]["seconds"] > 0
            assert (row["last_acc"] is None) == label.startswith("SWA")
            assert bool(row["averaging"]) == (name in ("latentbe", "be"))
    learning = "learning rate 0.001, weight decay 0.01"
    assert f"adamw: {learning} (teachers); {learning} (students)" in printed
    assert re.search(r"kd: best val acc 0\.\d+ after epoch \d/3 \(EMA 0\.\d+ after \d\)", printed)


def test_the_files_are_plain_networks_that_say_what_they_are(finished):
    out, _ = finished
    weights = []
    for stem in ("best", "last-ema", *AVERAGES):
        for folder in (out / "teachers" / "0", out / "students" / "latentbe-seed0"):
            info = read_info(folder / f"{stem}.safetensors")
            assert info.averaged == {**AVERAGES, "last-ema": "EMA 0.9"}.get(stem, "")
        assert info.measures["test_acc"] > 0
        network = build("wrn10x1", num_classes=10, in_channels=1, image_size=8)
        network.load_state_dict(safetensors.torch.load_file(folder / f"{stem}.safetensors"))
        weights.append(network.state_dict()["stem.weight"])
        assert (folder / f"{stem}-student.safetensors").exists()
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert read_info(out / "students" / "be-seed0" / "swa.safetensors").members == 2


def test_evaluate_measures_and_names_them(finished):
    out, _ = finished
    rows = {row["name"]: row["measures"] for row in json.loads((out / "results.json").read_text())["rows"]}
    folders = [out / "students" / f"{method}-seed0" for method in ("kd", "be")]
    files = tuple(folder / f"{stem}.safetensors" for folder in folders for stem in AVERAGES)
    command = evaluate.EvaluateCommand(files=files, data="digits", folder=out.parent / "data", precision="fp32")
    with contextlib.redirect_stderr(io.StringIO()):
        measured = evaluate.evaluate(command, evaluate.Screen())
    assert [row.method for row in measured] == [f"{m}, {label}" for m in ("kd", "be") for label in AVERAGES.values()]
    for row in measured:
        assert row.measures.acc == pytest.approx(rows[row.method]["acc"], abs=1e-6)
        assert row.measures.nll == pytest.approx(rows[row.method]["nll"], rel=1e-4)


def test_they_serve_as_teachers_where_they_are_named(finished, tmp_path):
    out, _ = finished
    averaged = [out / "teachers" / str(t) / "best-ema.safetensors" for t in range(2)]
    code, printed = run("--out", tmp_path / "x", "--teachers", *averaged, "--methods", "kd", "--student.epochs", "2")
    assert code == 0, printed
    assert re.search(r"^ +kd +\d", printed, re.M) and "single teacher" in printed and "EMA" not in printed


def test_other_updates_in_one_folder_are_refused(finished):
    out, _ = finished
    for options, found in (([], "optimizer is adamw there, sgd here"), (["--optimizer", "adamw"], "ema is 0.9 there")):
        code, printed = run(
            "--out",
            out,
            "--teacher.lr",
            "0.001",
            "--student.lr",
            "0.001",
            "--teacher.weight-decay",
            "0.01",
            "--student.weight-decay",
            "0.01",
            *options,
        )
        assert code == 2 and found in " ".join(printed.split()), printed


def test_swa_is_the_mean_with_statistics_of_its_own(finished):
    """The classifier's weight of the last epoch is in it by half; no running mean is the last epoch's."""
    out, _ = finished
    swa, _ = load_network(out / "students" / "kd-seed0" / "swa.safetensors")
    last, _ = load_network(out / "students" / "kd-seed0" / "last.safetensors")
    for (name, mine), theirs in zip(swa.named_buffers(), last.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            assert not torch.equal(mine, theirs), name
        if name.endswith("num_batches_tracked"):
            assert mine.item() == 4  # one pass over 64 images

"""What the end of a run keeps for its report, and that a report which cannot be drawn costs one line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ensdistill import fast_train
from ensdistill.formats.ours import load_network
from ensdistill.report import page
from ensdistill.report.records import read_predictions, read_shown
from ensdistill.run import kept
from ensdistill.runtime.errors import UserError, run_main

SMALL = (
    "--members 2 --train-images 64 --teacher.epochs 2 --teacher.warmup-epochs 1 --student.epochs 2 "
    "--student.warmup-epochs 1 --teacher.batch-size 16 --student.batch-size 16 --precision fp32 --threads 1 "
    "--methods kd+gaussian latentbe+tdiv-sdiv hydra+confods"
)


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
    out = tmp_path_factory.mktemp("report") / "digits"
    code, printed = run("--out", out)
    assert code == 0, printed
    return out, printed


def test_predictions_are_those_of_the_shipped_files(finished):
    out, _ = finished
    kept, rows = read_predictions(out / "predictions.npz"), json.loads((out / "results.json").read_text())["rows"]
    images, labels = load_digits(return_X_y=True)
    test = torch.tensor(images[-1000:]).float().reshape(-1, 1, 8, 8)
    assert kept.names == tuple(row["name"] for row in rows) and np.array_equal(kept.labels_N, labels[-1000:])
    for row, one in zip(rows, kept.rows, strict=True):
        assert (one.predicted_N == kept.labels_N).mean() == pytest.approx(row["measures"]["acc"])
        assert one.nll_N.mean(dtype=float) == pytest.approx(row["measures"]["nll"], rel=1e-5)
        assert one.scaled_nll_N.mean(dtype=float) == pytest.approx(row["measures"]["cnll"], rel=1e-5)
        if row["name"] == "latentbe+tdiv-sdiv":
            network, _ = load_network(out / row["folder"] / "best.safetensors")
            with torch.no_grad():
                logits = network.eval()((test * 255 / 16).round() / 255)
            assert (logits.argmax(-1).numpy() == one.predicted_N).mean() > 0.995
            assert row["diversity"]["kld"] >= 0


def test_images_are_shown_as_in_a_step(finished):
    out, _ = finished
    shown = read_shown(out / "shown.npz")
    images, labels = load_digits(return_X_y=True)
    first = [1797 - 1000 + int(np.argmax(labels[-1000:] == k)) for k in shown.labels_n]
    assert len(shown.labels_n) == 8 and len(set(shown.labels_n.tolist())) == 8
    assert np.array_equal(shown.images_nHWC[..., 0], np.rint(images[first].reshape(-1, 8, 8) * 255 / 16))
    assert list(shown.methods) == ["kd+gaussian", "latentbe+tdiv-sdiv", "hydra+confods"]
    for name, one in shown.methods.items():
        # inside [0, 1], nothing is clipped: a normal number of 1/255, or a step of √D / 255 (its share, by confidence)
        steps = one.steps_nHWC.astype(np.float64)[..., 0]
        x = shown.images_nHWC[..., 0] / 255
        assert ((x + steps > -1e-3) & (x + steps < 1 + 1e-3)).all() and (np.abs(steps).max(axis=(1, 2)) > 0).all()
        norms = np.sqrt(np.square(steps).sum(axis=(1, 2)))
        least, most = {"kd+gaussian": (0.4, 1.6), "latentbe+tdiv-sdiv": (0.2, 1.01), "hydra+confods": (0.02, 0.6)}[name]
        assert (norms > least * 8 / 255).all() and (norms < most * 8 / 255).all()
        assert one.classes_nE.shape == (8, 2) and (one.kl_n >= 0).all() and math.isfinite(one.kl_n.sum())
    assert not np.array_equal(shown.methods["latentbe+tdiv-sdiv"].kl_n, shown.kl_n)


def test_the_page_is_there_and_the_same_again(finished, capsys):
    out, printed = finished
    text = (out / "report.html").read_text()
    assert f"the report is {out / 'report.html'}" in printed and "Not on this page" not in text
    assert page.make_page([out], out / "report.html")[0] == text


def test_a_report_that_cannot_be_drawn_is_one_line(finished, monkeypatch):
    out, _ = finished

    def fail(*_):
        raise RuntimeError("a library\nfails")

    monkeypatch.setattr(page, "write_report", fail)
    before = {name: (out / name).read_bytes() for name in ("predictions.npz", "shown.npz")}
    code, printed = run("--out", out, "--stage", "evaluate")
    lines = [line for line in printed.splitlines() if "report.html" in line]
    assert code == 0 and len(lines) == 1 and lines[0].startswith("WARNING: ")
    assert "not drawn" in lines[0] and f"python -m ensdistill.report {out}" in lines[0]
    assert all((out / name).read_bytes() == content for name, content in before.items())  # the same draws again


@pytest.mark.parametrize("error", [UserError("disk: full"), ImportError("matplotlib"), MemoryError()])
def test_whatever_goes_wrong_is_one_line(tmp_path, error):
    said, warned = [], []
    screen = SimpleNamespace(say=said.append, warn=warned.append)

    def keep():
        raise error

    kept.draw(tmp_path, screen, keep)
    assert said == [] and len(warned) == 1 and (str(error) or "MemoryError") in warned[0]


def test_only_what_is_in_the_table_is_kept(finished):
    out, _ = finished
    code, _ = run("--out", out, "--stage", "evaluate", "--methods", "kd")
    assert code == 0 and not (out / "shown.npz").exists()
    assert "Not on this page" not in (out / "report.html").read_text()

"""The golden numbers of the official implementation, and files that are not of the form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_golden import write_small_golden

from ensdistill import verify
from ensdistill.kernels import launch
from ensdistill.runtime.errors import run_main

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden" / "official_wrn10x1_m4.npz"


def run(monkeypatch, path) -> int:
    monkeypatch.setattr(sys, "argv", ["verify", str(path)])
    return run_main(verify.main)


def run_command(path: Path, backend: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which may start itself again in Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ensdistill.verify", str(path), "--backend", backend]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def changed(tmp_path, change) -> Path:
    arrays = dict(np.load(GOLDEN, allow_pickle=False))
    change(arrays)
    np.savez(tmp_path / "changed.npz", **arrays)
    return tmp_path / "changed.npz"


def test_every_quantity_of_the_official_code_agrees(monkeypatch, capsys):
    assert run(monkeypatch, GOLDEN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("61 of 61 quantities agree")
    assert all(line.startswith("ok") for line in lines[:-1])
    for quantity in (
        "teacher_log_confidences_clean",
        "perturbed_images",
        "loss_kd",
        "after/params",
        "after/batch_stats",
        "merged",
        "lr_schedule",
        "cece15",
    ):
        assert any(quantity in line for line in lines), quantity


def test_the_library_agrees_with_the_official_code():
    assert all(check.ok for check in verify.verify(verify.Golden(GOLDEN), "library"))


def test_kernels_agree_with_a_small_file(tmp_path, monkeypatch):
    """The whole file (`verify GOLDEN --backend triton`) takes some minutes in the interpreter, this one 40 s."""
    path = tmp_path / "small.npz"
    write_small_golden(GOLDEN, path, monkeypatch)
    ended = run_command(path, "triton")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("61 of 61 quantities agree")
    assert "backend triton" in ended.stdout


@pytest.mark.skipif(not launch.INTERPRETED, reason="in this process kernels are compiled")
def test_kernels_fail_on_a_changed_number(tmp_path):
    name = "teacher_log_confidences_clean"
    path = changed(tmp_path, lambda arrays: arrays.update({name: arrays[name] * np.float32(1.001)}))
    first = next(verify.verify(verify.Golden(path), "triton"))
    assert first.name == name and not first.ok


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("latentbe_tdiv_sdiv/step1/perturbed_images", 1.01),
        ("kd/step0/loss_kd", 1.0001),
        ("sgd/after/params/classifier/Linear_0/w", 1.01),
        ("latentbe/after/batch_stats/backbone/LastBlock_0/BatchNorm2d_0/v", 1.01),
        ("merged/log_confidences", 1.001),
        ("metrics/cnll", 1.001),
        ("lr_schedule(warmup 2, cosine 4, peak 0.1)", 1.001),
    ],
)
def test_a_changed_number_fails_by_name(monkeypatch, capsys, tmp_path, name, factor):
    path = changed(tmp_path, lambda arrays: arrays.update({name: arrays[name] * factor}))
    assert run(monkeypatch, path) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed and all(name.split("/params")[0].split("/batch_stats")[0] in line for line in failed)


@pytest.mark.parametrize(
    "name", ["images", "kd/step1/loss", "teacher0/params/classifier/Linear_0/b", "metrics/acc", "pixel_mean"]
)
def test_a_missing_array_is_exit_2_and_named(monkeypatch, capsys, tmp_path, name):
    assert run(monkeypatch, changed(tmp_path, lambda arrays: arrays.pop(name))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name.split("params/")[-1].split("/")[-1] in error


def test_files_of_another_form_are_exit_2(monkeypatch, capsys, tmp_path):
    truncated, text, single = tmp_path / "truncated.npz", tmp_path / "text.npz", tmp_path / "one.npy"
    truncated.write_bytes(GOLDEN.read_bytes()[:100_000])
    text.write_text("no numbers here")
    np.save(single, np.arange(3))
    for path in (truncated, text, single, tmp_path / "absent.npz"):
        assert run(monkeypatch, path) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(path) in error and error.count("\n") == 1


def test_a_file_that_unpacks_to_too_much_is_exit_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(verify, "_MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "large.npz", zeros=np.zeros(10_000))
    assert run(monkeypatch, tmp_path / "large.npz") == 2
    assert "large.npz: unpacks to 80,128 bytes; expected a golden file of at most 1,000" in capsys.readouterr().err

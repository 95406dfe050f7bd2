"""The golden numbers of the official implementation, and files that are not of the form."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_golden import computed, small_golden

from ensdistill import verify
from ensdistill.engine.cpu.crew import Crew
from ensdistill.engine.cpu.side_by_side import SideBySideNetworks
from ensdistill.formats import golden
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


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("small") / "small.npz"
    return path, small_golden(GOLDEN, path)


def written(tmp_path: Path, arrays: dict[str, np.ndarray], **changes: np.ndarray) -> Path:
    np.savez(tmp_path / "changed.npz", **{**arrays, **changes})
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


@pytest.mark.parametrize("threads", [1, 2])
def test_networks_side_by_side_agree_with_a_small_file(monkeypatch, capsys, small, threads):
    """What a run on a CPU does by default."""

    def side_by_side(backend, teachers, student, precision, device):
        images = torch.rand(4, 3, 8, 8, dtype=next(student.parameters()).dtype)
        made = SideBySideNetworks(teachers, student, precision, Crew(threads), images)
        assert made.notes == []
        return made

    monkeypatch.setattr(verify, "make_networks", side_by_side)
    assert run(monkeypatch, small[0]) == 0, capsys.readouterr().out


def test_kernels_agree_with_a_small_file(tmp_path):
    """The whole file (`verify GOLDEN --backend triton`) takes some minutes in the interpreter, this one 40 s."""
    path = tmp_path / "small.npz"
    small_golden(GOLDEN, path)
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
        ("latentbe_tdiv_sdiv/step1/loss_kd", 1.0001),
        ("sgd/after/params/classifier/Linear_0/w", 1.01),
        ("latentbe/after/batch_stats/backbone/LastBlock_0/BatchNorm2d_0/v", 1.01),
        ("merged/log_confidences", 1.001),
        ("metrics/cnll", 1.001),
        ("lr_schedule(warmup 2, cosine 4, peak 0.1)", 1.001),
    ],
)
def test_a_changed_number_fails_by_name(monkeypatch, capsys, tmp_path, small, name, factor):
    assert run(monkeypatch, written(tmp_path, small[1], **{name: small[1][name] * factor})) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed and all(name.split("/params")[0].split("/batch_stats")[0] in line for line in failed)


@pytest.mark.parametrize(
    "name", ["images", "kd/step1/loss", "teacher0/params/classifier/Linear_0/b", "metrics/acc", "pixel_mean"]
)
def test_a_missing_array_is_exit_2_and_named(monkeypatch, capsys, tmp_path, small, name):
    arrays = {other: array for other, array in small[1].items() if other != name}
    assert run(monkeypatch, written(tmp_path, arrays)) == 2
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
    monkeypatch.setattr(golden, "_MAX_BYTES", 1000)
    np.savez_compressed(tmp_path / "large.npz", zeros=np.zeros(10_000))
    assert run(monkeypatch, tmp_path / "large.npz") == 2
    assert "large.npz: unpacks to 80,128 bytes; expected a golden file of at most 1,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("merged/images", lambda x: x[:-1], "expected (4, any, any, 3): one image a label of labels"),
        ("merged/images", lambda x: np.concatenate([x, x]), "has shape (8, 8, 8, 3)"),
        ("labels", lambda x: x[:, :-1], "one an image of images"),
        ("labels", lambda x: x + 5, "expected whole numbers from 0 to 9"),
        ("labels", lambda x: x.astype(np.float32), "expected whole numbers from 0 to 9"),
        ("images", lambda x: x[..., :2], "(steps, B, H, W, C)"),
        ("images", lambda x: x.astype(str), "expected numbers"),
        ("pixel_mean", lambda x: x[:1], "one a channel"),
        ("kd/step1/lr", lambda x: np.array([0.1, 0.1]), "one number"),
        ("latentbe_tdiv_sdiv/step0/pair", lambda x: x + 1, "expected whole numbers from 0 to 1"),
        ("latentbe_tdiv_sdiv/step0/perturbed_images", lambda x: x[:1], "expected (2, 8, 8, 3)"),
        ("teacher_log_confidences_clean", lambda x: x[:1], "expected (2, 2, 2, 10)"),
        ("metrics/val_labels", lambda x: x[:-1], "one an image of val_logits"),
        ("metrics/test_logits", lambda x: x[:, 0], "(N, E, K)"),
    ],
)
def test_arrays_that_do_not_fit_are_exit_2(monkeypatch, capsys, tmp_path, small, name, change, expected):
    assert run(monkeypatch, written(tmp_path, small[1], **{name: change(small[1][name])})) == 2
    error = capsys.readouterr().err
    assert f"changed.npz: {name} " in error and expected in error and error.count("\n") == 1


def test_a_student_of_other_members_is_exit_2(monkeypatch, capsys, tmp_path, small):
    one = {k: x[:1] for k, x in small[1].items() if k.startswith("latentbe/before") and k.endswith(("/r", "/s"))}
    assert run(monkeypatch, written(tmp_path, small[1], **one)) == 2
    assert "latentbe/before has 1 members; expected 2, one a teacher" in capsys.readouterr().err


def next_to_zero(path: Path, channel: int) -> tuple[str, np.ndarray]:
    """The name of the last norm's bias in the run kd, and one with which a ReLU of the first step is at 0."""
    replay = verify.Replay(golden.Golden(path), dtype=torch.float64)
    student, seen = replay._student("kd", verify.RUNS["kd"][0]), []
    student.classifier.network.norm.register_forward_hook(lambda norm, x, y: seen.append(y[0, channel].flatten()))
    student.train()(replay.x_SBCHW[0])
    name = "kd/before/params/backbone/LastBlock_0/BatchNorm2d_0/b"
    bias = replay.golden[name].copy()
    bias[channel] -= seen[0][seen[0].abs().argmin()].item()
    return name, bias


@pytest.mark.parametrize("channel", [0, 1])  # of which ours gives one as float64 does
def test_a_relu_next_to_zero_may_fall_on_either_side(monkeypatch, tmp_path, small, channel):
    monkeypatch.setattr(verify, "SECTIONS", [partial(verify.Replay.run, run="kd")])
    name, bias = next_to_zero(small[0], channel)
    past = []
    for side in (1, -1):
        moved = bias.copy()
        moved[channel] += side * 2e-7
        official = computed(written(tmp_path, small[1], **{name: moved}), dtype=torch.float64)
        arrays = {**small[1], **official, name: bias}
        checks = list(verify.verify(golden.Golden(written(tmp_path, arrays))))
        assert all(check.ok for check in checks), "\n".join(map(str, checks))
        past += [check for check in checks if check.official > check.tolerance]
        for changed, factor in (("kd/step0/loss_kd", 1.0001), ("kd/step1/loss", 1.001)):
            path = written(tmp_path, arrays, **{changed: arrays[changed] * factor})
            assert [c.name for c in verify.verify(golden.Golden(path)) if not c.ok] == [changed]
    assert past


@pytest.mark.parametrize("target", ["TAU", "WEIGHT_DECAY", "perturb", "Schedule"])
def test_a_bug_of_ours_fails_though_float64_has_it_too(monkeypatch, small, target):
    right = getattr(verify, target)
    wrong = {
        "TAU": 4.001,
        "WEIGHT_DECAY": 5.01e-4,
        "perturb": lambda x, g, **how: right(x, -g, **how),
        "Schedule": lambda peak, **how: right(peak=peak * 1.001, **how),
    }
    monkeypatch.setattr(verify, target, wrong[target])
    failed = [check for check in verify.verify(golden.Golden(small[0])) if not check.ok]
    assert failed and all("is not what float64 gives" in str(check) for check in failed)


def test_a_bug_of_one_backend_fails(monkeypatch, small):
    right = verify.update

    def wrong(state, config, x_BCHW, labels_B, lr):
        return right(state, config, x_BCHW, labels_B, lr * (1 if x_BCHW.dtype is torch.float64 else 1.01))

    monkeypatch.setattr(verify, "update", wrong)
    failed = [check for check in verify.verify(golden.Golden(small[0])) if not check.ok]
    assert failed and all(check.is_plausible for check in failed)


@pytest.mark.parametrize(
    ("official", "exact", "official_exact", "explained", "ok"),
    [
        (0.9, 3.0, 3.0, 0.0, True),  # ours is the official number
        (1.1, 0.3, 0.9, 0.0, True),  # ours is the exact number, and so is the official one
        (3.0, 0.1, 3.0, 4.0, True),  # the official one lies as far as float32 can
        (3.0, 2.0, 3.0, 4.0, True),  # so do both, and ours is nearer
        (3.0, 3.1, 3.0, 4.0, False),
        (3.0, 0.0, 3.0, 2.0, False),  # the official number is one that float32 cannot give
        (3.0, 3.0, 0.1, 0.0, False),  # ours is wrong
        (np.nan, np.nan, 0.0, 0.0, False),
        (np.nan, 0.0, np.nan, np.inf, False),
    ],
)
def test_the_verdict(official, exact, official_exact, explained, ok):
    check = verify.Check(
        name="x", official=official, exact=exact, official_exact=official_exact, tolerance=1.0, explained=explained
    )
    assert check.ok == ok and str(check).startswith("ok  " if ok else "FAIL")

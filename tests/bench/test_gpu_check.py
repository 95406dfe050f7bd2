"""`make gpu-check` without a GPU: stages of the shell, arrays from JPEG files, the choice of epochs, counters."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import gpu_counters, gpu_facts, gpu_run, step_profile
from bench.gpu_check import STAGES, Check, Stage, limit_of, main, run_all, slug
from ensdistill.monitor.gpu import GpuNames
from ensdistill.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    "device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0",
    "python": "3.12.3", "commit": "abc", "capability": 90, "cores": 16, "memory_gb": 150.0, "copy_tb_s": 4.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is started here apart from the `make test ARGS=…` or the parallel run that starts it."""
    for name in ("ARGS", "MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


def stage(name: str, command: str, limit: float = 20.0, **options: Any) -> Stage:
    return Stage(name, limit, "about", command, **options)


def run(tmp_path: Path, *stages: Stage, seconds: float = 60.0, facts: dict[str, Any] = FACTS) -> dict[str, Any]:
    """Run `stages` after one that tells `facts`, and read the rows of check.csv by stage."""
    check = Check(tmp_path / "out", tmp_path / "work", 1.0, {})
    told = stage("facts", f"echo '{json.dumps(facts)}' > $WORK/facts.json")
    outcomes = run_all([told, *stages], time.monotonic() + seconds, check)
    with (tmp_path / "out" / "check.csv").open(newline="") as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    assert [rows[one.part]["status"] for one in outcomes] == [one.status for one in outcomes]
    return rows


# ---- stages -------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_is_shown_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, stage("bad", "echo why; exit 3"), stage("good", "echo $((LIMIT + 1)) of $OUT"))
    assert [(rows[name]["status"], rows[name]["found"]) for name in ("bad", "good")] == [
        ("failed", "why"),
        ("ok", f"21 of {tmp_path / 'out'}"),
    ]
    assert rows["good"]["device"] == "NVIDIA H200" and rows["good"]["copy_tb_s"] == "4.3"
    assert "| why" in capsys.readouterr().out and "why" in (tmp_path / "out" / "log.txt").read_text()


def test_a_stage_that_hangs_is_cut_off_with_its_children_and_keeps_what_it_said(tmp_path: Path) -> None:
    start = time.monotonic()
    hangs = stage(
        "hangs", "echo half way; (trap '' INT; sleep 300) & echo $! > $OUT/pid; trap '' INT; sleep 300; wait", 2.0
    )
    rows = run(tmp_path, hangs, stage("next", "echo next"))
    assert (rows["hangs"]["status"], rows["hangs"]["found"]) == ("cut off", "half way")
    assert rows["next"]["status"] == "ok" and time.monotonic() - start < 15
    state = Path(f"/proc/{(tmp_path / 'out' / 'pid').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_what_is_interrupted_may_write_what_it_has(tmp_path: Path) -> None:
    rows = run(tmp_path, stage("writes", "trap 'echo all that there is; exit 0' INT; sleep 300 & wait", 5.0))
    assert (rows["writes"]["status"], rows["writes"]["found"]) == ("cut off", "all that there is")


def test_the_deadline_is_kept_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    start = time.monotonic()
    rows = run(tmp_path, stage("long", "sleep 300"), stage("late", "echo late", 20.0), seconds=11.5)
    assert rows["long"]["status"] == "cut off" and rows["late"]["status"] == "skipped"
    assert "no time was left" in rows["late"]["found"] and time.monotonic() - start < 20


def test_an_elastic_stage_takes_what_is_left_and_gives_what_is_missing() -> None:
    stages = [stage("tuning", "", 100, elastic=True), stage("a", "", 30), stage("b", "", 40)]
    assert limit_of(stages, 400.0, 1.0) == 330.0
    assert limit_of(stages, 120.0, 1.0) == 50.0
    assert limit_of(stages, 80.0, 1.0) == pytest.approx(100 / 3)
    assert limit_of(stages[1:], 25.0, 1.0) == 25.0 and limit_of(stages[1:], 9.0, 1.0) == 0.0


def test_the_result_is_the_last_line_of_the_pattern(tmp_path: Path) -> None:
    rows = run(tmp_path, stage("one", "echo 3 passed; echo 4 passed; echo behind", found="passed"))
    assert rows["one"]["found"] == "4 passed"


def test_rows_of_the_same_commit_stay(tmp_path: Path) -> None:
    run(tmp_path, stage("a", "true"))
    assert run(tmp_path, stage("b", "true")).keys() == {"facts", "a", "b"}
    assert run(tmp_path, stage("c", "true"), facts=FACTS | {"commit": "def"}).keys() == {"facts", "c"}


def test_pytest_s_report_becomes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "test_it.py"
    source.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2, 'no'\ndef test_c(): pytest.skip('s')\n"
    )
    command = f"python -m pytest -q -p no:cacheprovider --junitxml=$WORK/tests.xml {source}"
    assert run(tmp_path, stage("tests", command))["tests"]["status"] == "failed"
    with (tmp_path / "out" / "tests.csv").open(newline="") as file:
        rows = {row["test"].split("::")[-1]: row["outcome"] for row in csv.DictReader(file)}
    assert rows == {"test_a": "passed", "test_b": "failed", "test_c": "skipped"}
    assert "failed: " in capsys.readouterr().out


def test_without_a_gpu_it_says_so_and_ends_with_2() -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ENSDISTILL_COMMIT": "abc"}
    command = [sys.executable, "-m", "bench.gpu_check", "--parts", "cache"]
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2 and "sees no NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "tsts"], "did you mean 'tests'"),
        (["--parts", ","], "separated by commas"),
        (["--scale", "0"], "positive numbers"),
        (["--parts", "cifar10", "--data", "/nowhere.tar"], "/nowhere.tar: not there"),
        (["--cache", "/nowhere"], "--cache /nowhere: not there"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main(arguments)


def test_the_stages_name_what_is_there() -> None:
    everything = " ".join(one.command for one in STAGES).split()
    for module in {word for before, word in itertools.pairwise(everything) if before == "-m" and "." in word}:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for path in [word for word in everything if word.startswith("tests/")]:
        assert (ROOT / path).exists(), path
    assert slug("NVIDIA H200") == "h200" and slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_make_passes_the_variables_on() -> None:
    given = ["PARTS=run,step", "SCALE=2", "OUT=a folder", "COMMIT=abc", "CACHE=c.tar", "DATA=d.tar"]
    done = subprocess.run(["make", "-n", "gpu-check", *given], cwd=ROOT, capture_output=True, text=True, check=True)
    for option in ("--parts", "--scale", "--out", "--commit", "--cache", "--data"):
        assert option in done.stdout
    assert '"a folder"' in done.stdout and "--network" not in done.stdout


# ---- what the stages run -------------------------------------------------------------------------------------------


def write_archive(path: Path, per_class: int = 20, classes: int = 2) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for number in range(2 * classes * per_class):
            part, label = ("train", "test")[number % 2], number // 2 % classes
            data = io.BytesIO()
            pixels = np.full((8, 8, 3), 100 * label + 50, dtype=np.uint8)
            Image.fromarray(pixels).save(data, "JPEG")
            info = tarfile.TarInfo(f"{part}/class{label}/{number:04d}.jpg")
            info.size = data.tell()
            data.seek(0)
            archive.addfile(info, data)


def test_an_archive_becomes_shuffled_arrays(tmp_path: Path) -> None:
    write_archive(tmp_path / "images.tar.xz")
    gpu_run.write_archive(tmp_path / "images.tar.xz", tmp_path / "arrays")
    for name, of_each in {"train": 18, "valid": 2, "test": 20}.items():
        images = np.load(tmp_path / "arrays" / f"{name}_images.npy")
        labels = np.load(tmp_path / "arrays" / f"{name}_labels.npy")
        assert images.shape == (2 * of_each, 8, 8, 3) and np.bincount(labels).tolist() == [of_each] * 2
        assert (abs(images.mean(axis=(1, 2, 3)) - (100.0 * labels + 50)) < 3).all()


def test_every_part_of_the_splits_has_every_class() -> None:
    labels = np.repeat(np.arange(10), 500)
    train, valid = gpu_run.shuffled_splits(labels)
    assert sorted([*train, *valid]) == list(range(5000))
    for rows, parts in ((train, 45), (valid, 5)):
        for part in np.split(labels[rows], parts):  # a hundred images
            counts = np.bincount(part, minlength=10)
            assert counts.min() >= 1 and counts.max() <= 25


def test_as_many_epochs_as_fit() -> None:
    speed = gpu_run.Speed(step_seconds=1.0, validation_seconds=0.5, other_seconds=30.0)
    assert speed.epochs_in(1e6) == 200 and speed.epochs_in(0.0) == 1
    for seconds in (60.0, 120.0):
        epochs = speed.epochs_in(seconds)
        assert speed.of_run(epochs) <= seconds < speed.of_run(epochs + 1)


def test_a_whole_run_of_an_archive_on_a_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_archive(tmp_path / "images.tar.xz")
    options = [
        "--data",
        str(tmp_path / "images.tar.xz"),
        "--network",
        "wrn10x1",
        "--methods",
        "kd",
        "--backend",
        "auto",
    ]
    options += ["--out", str(tmp_path / "out"), "--work", str(tmp_path), "--seconds", "240", "--most-epochs", "2"]
    small = "--members=2 --teacher.batch-size=8 --student.batch-size=8 --device=cpu"
    assert gpu_run.main([*options, f"--options={small}"]) == 0
    with (tmp_path / "out" / "images-run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {row["epochs"] for row in rows} == {"2"}
    with (tmp_path / "out" / "images.csv").open(newline="") as file:
        quality = list(csv.DictReader(file))
    assert quality and all(0 <= float(row["acc"]) <= 1 and row["nll"] for row in quality)
    assert "images, 2 epochs: " in capfd.readouterr().out


def test_gaps_are_what_no_kernel_covers() -> None:
    assert step_profile.busy_share([(0, 4), (2, 5), (3, 4), (8, 10)]) == pytest.approx(0.7)


def test_rows_of_another_backend_stay(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    for backend, us in (("triton", 3), ("best", 2), ("triton", 1)):
        step_profile.write_rows(path, backend, [{"backend": backend, "kernel": "k", "us": us}])
    with path.open(newline="") as file:
        assert [(row["backend"], row["us"]) for row in csv.DictReader(file)] == [("best", "2"), ("triton", "1")]


def test_counters_are_read_from_what_ncu_prints() -> None:
    header = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    text = f'==PROF== Connected\nlayer\n{header}\n"0","7","conv","Speed","Duration","us","12.5"\n'
    assert gpu_counters.counter_rows(text) == [
        {"Kernel Name": "conv", "Section Name": "Speed", "Metric Name": "Duration", "Metric Unit": "us",
         "Metric Value": "12.5"}
    ]  # fmt: skip


class PretendedNvml:
    """Answers as pynvml does what `gpu_facts` asks, of a GPU whose ECC is not told."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> str:
        if address != "00000000:01:00.0":
            raise self.NVMLError("Not Found")
        return address

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65.06"

    def nvmlDeviceGetEccMode(self, gpu: str) -> list[int]:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetClockInfo(self, gpu: str, clock: int) -> int:
        return {1: 1755, 2: 2619}[clock]

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: str) -> list[Any]:
        return [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=1)]


def test_settings_of_the_board() -> None:
    found = gpu_facts.board_settings(GpuNames(uuids=("x",), pci="00000000:01:00.0"), PretendedNvml())
    assert (found["driver"], found["sm_mhz"], found["other_processes"]) == ("580.65.06", 1755, 1)
    assert found["ecc"] is None and found["power_limit_w"] is None
    unknown = gpu_facts.board_settings(GpuNames(uuids=(), pci="y"), PretendedNvml())
    assert unknown == {"driver": None, "nvml": "does not know this GPU (Not Found)"}


@pytest.mark.gpu
def test_facts_of_a_real_gpu() -> None:
    found = gpu_facts.facts(torch.device("cuda"))
    assert found["device"] == torch.cuda.get_device_name() and found["driver"] and found["sm_max_mhz"] > 0
    assert found["copy_tb_s"] > 0 and found["matmul_tflops"] > 0

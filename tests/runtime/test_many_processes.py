"""The whole command under torchrun: two processes on the CPU, talking by gloo.

One chain of starts is stopped and killed in the middle of epochs; one more start goes on with it to the end and runs
every other command, for a start takes longer than all of these trainings.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_programs as programs
import safetensors.torch
import torch
from rich.console import Console

from ensdistill import evaluate, fast_train
from ensdistill.run.display import Screen
from ensdistill.runtime.errors import run_main

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SMALL = (
    "--members 2 --train-images 64 --teacher.epochs 2 --teacher.warmup-epochs 1 --student.epochs 2 "
    "--student.warmup-epochs 1 --teacher.batch-size 16 --student.batch-size 16 --precision fp32 --threads 1 "
    "--log-every 1"
)
BROKEN = (  # 8 steps an epoch
    "--stage teachers --teacher.epochs 3 --teacher.batch-size 8 --log-every 3 --optimizer adamw --ema 0.9 --swa 2"
)
SYNC = "--sync-bn --methods ce kd latentbe+tdiv-sdiv --swa 1"
APART = "--methods ce"
OTHERS = "--teachers-together yes --recalibrate-bn --methods latentbe be+gaussian hydra+ods --ema 0.9 --swa 1"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A start of torchrun that has ended."""

    code: int
    agent: str
    """What torchrun itself said."""
    stdout: list[str]
    """Of each process."""
    stderr: list[str]
    """Of each process."""
    at: float
    """The time."""


def torchrun(folder: Path, *program: object, restarts: int = 0) -> Ended:
    """Start two processes and wait for them; what each prints goes to files in `folder`."""
    folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    options = ["--standalone", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(folder)]
    options += ["--max-restarts", str(restarts)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *map(str, program)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        agent, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends those that it started
            process.wait(timeout=60)

    def said(name: str) -> list[str]:
        return [path.read_text() for r in (0, 1) for path in folder.glob(f"**/{r}/{name}.log")]

    return Ended(code=process.returncode, agent=agent, stdout=said("stdout"), stderr=said("stderr"), at=time.time())


def alone(*arguments: object) -> tuple[int, str]:
    """The command in this process: its exit code, and its errors."""
    before, printed = sys.argv, io.StringIO()
    sys.argv = ["fast_train", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            return run_main(fast_train.main), printed.getvalue()
    finally:
        sys.argv = before


@dataclass(frozen=True)
class Chain:
    """A run that was ended three times."""

    out: Path
    ends: dict[str, Ended]
    steps: list[int]
    """Of the checkpoint after each end."""
    refused: tuple[int, str]
    """One process that wants to go on with it, after the first end."""
    killed_at: float
    """The latest time at which the killed process can have lived."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    out = folder / "broken"
    command = [*SMALL.split(), *BROKEN.split(), "--out", out]
    checkpoint = out / "teachers" / "0" / "checkpoint.pt"
    steps, ends = [], {}

    def end(name: str, *how: object) -> None:
        ends[name] = torchrun(folder / name, programs.__file__, "sending", *how, *command, "--resume")
        steps.append(torch.load(checkpoint, weights_only=True)["step"])

    end("all", 0, "SIGTERM", 11, "agent")
    refused = alone(*command, "--resume")
    end("one", 1, "SIGTERM", 13, "self")
    end("killed", 1, "SIGKILL", 20, "self")
    killed_at = max(path.stat().st_mtime for path in (folder / "killed").glob("**/stderr.log"))
    return Chain(out, ends, steps, refused, killed_at)


@dataclass(frozen=True)
class Found:
    """What the commands of one start gave."""

    folder: Path
    ranks: Sequence[dict[str, dict[str, Any]]]
    """By rank and command."""
    ended: Ended


@pytest.fixture(scope="module")
def found(chain: Chain) -> Found:
    folder = chain.out.parent
    commands = {
        "broken-in-validation": [*BROKEN.split(), "--resume"],
        "broken": [*BROKEN.split(), "--resume"],
        "unbroken": BROKEN.split(),
        "sync": SYNC.split(),
        "apart": APART.split(),
        "others": OTHERS.split(),
        "others-again": [*OTHERS.split(), "--stage", "distill"],
        "others-evaluated": [*OTHERS.split(), "--stage", "evaluate"],
        "unshared": ["--teacher.batch-size", "15"],
        "infinite": ["--teacher.lr", "1e30"],
    }
    sent = {"broken-in-validation": ["1", "SIGTERM", "24", "validating"]}
    given = [
        (sent.get(name, []), [*SMALL.split(), *options, "--out", str(folder / name.split("-")[0])])
        for name, options in commands.items()
    ]
    (folder / "commands.json").write_text(json.dumps(given))
    ended = torchrun(folder / "logs", programs.__file__, "commands", folder)
    assert ended.code == 0, ended.stderr
    ranks = [dict(zip(commands, torch.load(folder / f"{rank}.pt"), strict=True)) for rank in range(2)]
    return Found(folder, ranks, ended)


def lines(path: Path) -> list[dict[str, Any]]:
    """Of a metrics.jsonl, without those of the device and what depends on the clock."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    rates = {"images_per_s", "data_wait"}
    return [{k: v for k, v in line.items() if k not in rates} for line in read if line["kind"] != "device"]


def files(out: Path, pattern: str) -> list[Path]:
    """Relative to `out`."""
    return sorted(path.relative_to(out) for path in out.glob(pattern))


def test_commands_that_can_run_do(found):
    for rank in found.ranks:
        errors = {name: result["error"] for name, result in rank.items() if result["error"]}
        assert errors.keys() == {"unshared", "infinite", "broken-in-validation"}, errors
    for name in ("broken", "unbroken", "sync", "apart", "others"):
        assert not list(found.folder.glob(f"{name}/**/*.tmp")) and not list(found.folder.glob(f"{name}/**/*.pt"))
        facts = json.loads((found.folder / name / "environment.json").read_text())
        assert facts["processes"] == 2 and facts["threads"] == 1


def test_with_norms_synchronised_two_processes_are_one(found, tmp_path):
    """Measured after 8 steps: 1.6e-6 of a tensor's largest entry, 1.5e-7 of a measure."""
    ours, theirs = found.folder / "sync", tmp_path / "sync"
    assert alone(*SMALL.split(), *SYNC.split(), "--out", theirs) == (0, "")
    networks = [file for name in ("last", "swa") for file in files(ours, f"*/*/{name}*.safetensors")]
    assert all((theirs / network).exists() for network in networks) and len(networks) == 12
    for network in networks:
        expected = safetensors.torch.load_file(theirs / network)
        for name, tensor in safetensors.torch.load_file(ours / network).items():
            atol = 2e-5 * max(0.01, expected[name].abs().max().item())
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023
    for log in files(ours, "*/*/metrics.jsonl"):
        for mine, right in zip(lines(ours / log), lines(theirs / log), strict=True):
            # a validation image may fall on the other side
            tolerances = {
                name: 0.004 if name.endswith("acc") else 2e-6 * max(1, abs(right[name]))
                for name in right
                if name != "kind"
            }
            assert mine == {
                k: pytest.approx(v, rel=0, abs=tolerances[k]) if k in tolerances else v for k, v in right.items()
            }


def test_without_that_each_has_statistics_of_its_own_and_files_have_their_mean(found):
    folder = found.folder / "apart"
    for run, name in (("teachers/0", "0"), ("teachers/1", "1"), ("students/ce-seed0", "ce-seed0")):
        statistics = found.ranks[0]["apart"]["statistics"][name]
        network = safetensors.torch.load_file(folder / run / "last.safetensors")
        shipped = {key: tensor for key, tensor in network.items() if "running" in key}
        assert len(shipped) == len(statistics) > 0
        for key, each in statistics.items():
            assert len(each) == 2 and not torch.equal(each[0], each[1]), key
            torch.testing.assert_close(shipped[key.removeprefix("classifier.network.")], each.mean(0))
        synchronised = safetensors.torch.load_file(found.folder / "sync" / run / "last.safetensors")
        assert any((shipped[key] - synchronised[key]).abs().max() > 1e-3 for key in shipped)


def test_a_validation_is_of_all_its_images(found):
    path = found.folder / "apart" / "students" / "ce-seed0" / "last.safetensors"
    command = evaluate.EvaluateCommand(
        files=(path,), data="digits", folder=found.folder / "data", split="valid", precision="fp32"
    )
    (row,) = evaluate.evaluate(command, Screen(Console(quiet=True)))
    last = [line for line in lines(path.with_name("metrics.jsonl")) if line["kind"] == "valid"][-1]
    assert row.num_images == 397
    assert last["acc"] == pytest.approx(row.measures.acc, abs=1e-6)
    assert last["nll"] == pytest.approx(row.measures.nll, abs=1e-4)


def test_what_was_stopped_ends_as_what_was_not_bit_for_bit(chain, found):
    """Stopped in an epoch by signals to all and to one process, then killed, then stopped by one in validation."""
    assert chain.steps == [12, 15, 16]  # at the next line of the log; of the killed: the end of the epoch before
    for rank in found.ranks:
        assert rank["broken-in-validation"]["error"] == "Stopped: stopped by SIGTERM"
    for run in ("teachers/0", "teachers/1"):
        ours, theirs = found.folder / "broken" / run, found.folder / "unbroken" / run
        for name in ("best", "last", "best-ema", "last-ema", "swa"):
            mine, right = (safetensors.torch.load_file(folder / f"{name}.safetensors") for folder in (ours, theirs))
            assert mine.keys() == right.keys() and all(torch.equal(mine[key], right[key]) for key in mine), name
        assert lines(ours / "metrics.jsonl") == lines(theirs / "metrics.jsonl")
        progress = [json.loads((folder / "outcome.json").read_text()) for folder in (ours, theirs)]
        for key in ("epochs", "best_epoch", "best_acc", "last_acc", "ema", "images"):
            assert progress[0][key] == progress[1][key], key


def test_torchrun_starts_a_lost_process_anew_and_goes_on(found, tmp_path):
    command = [*SMALL.split(), *BROKEN.split(), "--out", tmp_path / "run"]  # without --resume
    ended = torchrun(tmp_path / "logs", programs.__file__, "sending", 1, "SIGKILL", 20, "self", *command, restarts=1)
    assert ended.code == 0, (ended.agent, ended.stderr)
    assert any("teacher 1/2: going on at step 16 of 24" in text for text in ended.stdout)
    for run in ("teachers/0", "teachers/1"):
        for name in ("best", "last"):
            folders = tmp_path / "run" / run, found.folder / "unbroken" / run
            mine, right = (safetensors.torch.load_file(folder / f"{name}.safetensors") for folder in folders)
            assert mine.keys() == right.keys() and all(torch.equal(mine[key], right[key]) for key in mine), name


def test_all_stop_together_and_say_so_once(chain):
    for name, root in (("all", "SignalException"), ("one", "exitcode  : 143")):
        ended = chain.ends[name]
        assert ended.code == 1 and root in ended.agent  # torchrun's own: it knows success and failure
        assert ended.stdout[0].count("stopped by SIGTERM; everything up to the last step is kept") == 1
        assert ended.stdout[1] == "" and "Traceback" not in "".join(ended.stderr)


def test_a_process_that_is_killed_ends_the_others(chain):
    ended = chain.ends["killed"]
    assert ended.code == 1 and "exitcode  : -9" in ended.agent
    assert ended.at - chain.killed_at < 25  # torchrun itself would kill after 30 s
    assert ended.stdout[1] == "" and "Traceback" not in "".join(ended.stderr)


def test_another_number_of_processes_cannot_go_on(chain):
    code, error = chain.refused
    assert code == 2 and error.count("error:") == 1
    assert "written by 2 processes" in error and "resumed by 1; start as many as before" in error
    assert "network" not in error


def test_a_batch_that_cannot_be_shared_is_refused_once(tmp_path):
    ended = torchrun(
        tmp_path / "logs",
        "-m",
        "ensdistill.fast_train",
        *SMALL.split(),
        "--student.batch-size",
        15,
        "--out",
        tmp_path / "run",
    )
    assert "error: batch size 15: it is that of all processes" in ended.stderr[0] and ended.stderr[1] == ""
    assert ended.stdout == ["", ""] and not (tmp_path / "run").exists()
    assert ended.code == 1 and "exitcode  : 2" in ended.agent


def test_half_of_torchruns_variables_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, error = alone(*SMALL.split(), "--out", tmp_path / "run")
    assert code == 2 and error.startswith(
        "error: environment: WORLD_SIZE=2 without RANK, LOCAL_RANK; start with torchrun"
    )
    assert not (tmp_path / "run").exists()


def test_only_the_first_prints(found):
    for name, result in found.ranks[1].items():
        assert result["printed"] == "", name
    assert "teacher ensemble" in found.ranks[0]["sync"]["printed"]
    assert found.ended.stdout == ["", ""] and "Traceback" not in "".join(found.ended.stderr)


def test_every_step_has_one_line(found):
    for log in found.folder.glob("sync/*/*/metrics.jsonl"):
        train = [line["step"] for line in lines(log) if line["kind"] == "train"]
        assert train == list(range(1, 9)), log


def test_a_loss_that_is_not_finite_ends_all_with_the_same_words(found):
    first, second = (rank["infinite"]["error"] for rank in found.ranks)
    assert re.match(r"RunFailed: 0: the loss is (nan|inf) at step \d", first) and second == first
    assert json.loads((found.folder / "infinite" / "teachers" / "0" / "failure.json").read_text())["last_steps"]
    assert not list(found.folder.glob("infinite/*/*/*.safetensors"))


def test_averaged_networks_are_recalibrated_on_every_image(found):
    """Two processes have half of each batch; the pass over the training images is one process's, and of all of it."""
    path = found.folder / "others" / "students" / "latentbe-seed0" / "recalibrated.safetensors"
    of_two = safetensors.torch.load_file(path)
    path.unlink()
    assert alone(*SMALL.split(), *OTHERS.split(), "--stage", "distill", "--out", found.folder / "others") == (0, "")
    of_one = safetensors.torch.load_file(path)
    assert of_two.keys() == of_one.keys() and all(torch.equal(of_two[name], of_one[name]) for name in of_two)


def test_stages_of_a_finished_run_reuse_what_is_there(found):
    first = found.ranks[0]
    assert first["others-again"]["printed"].count("already trained") == 3
    for name in ("others", "others-evaluated"):
        assert re.search(r"^ +hydra\+ods +\d+\.\d\d ", first[name]["printed"], re.MULTILINE), name

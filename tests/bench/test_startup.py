"""The start-up part of `python -m bench`: whose caches are empty when, what is timed, and what a failure leaves."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from bench.harness.context import FAILED, Context
from bench.parts import startup
from bench.parts.startup import StartFailed, Starts, first_step, timed_rows

ROOT = Path(__file__).resolve().parents[2]

IDENTITY = {"device": "a CPU", "versions": "python 3", "commit": "abc"}


def make_context(**changes: Any) -> Context:
    fields: dict[str, Any] = {
        "device": torch.device("cpu"), "quick": True, "precision": "fp32", "threads": 1, "network": "wrn10x1", "E": 2,
        "B": 4, "size": 8, "classes": 5, "providers": (), "rounds": 3, "seconds": 0.1, "identity": IDENTITY,
        "say": lambda text: None,
    }  # fmt: skip
    return Context(**fields | changes)


class Pretended(Starts):
    """Starts that take no time: each leaves a file in its caches and says what it found there."""

    log: list[tuple[str, bool]]

    def seconds(self, kind: str) -> float:
        found = self.caches(kind) / startup.CACHES["TRITON_CACHE_DIR"] / "kernel"
        self.log.append((kind, found.exists()))
        if kind == "ahead-of-time" and sum(one == kind for one, _ in self.log) == 2:
            raise StartFailed("no memory")
        found.parent.mkdir(parents=True, exist_ok=True)
        (self.caches(kind) / "tuning").touch()
        found.touch()
        return 10.0 + len(self.log)


def pretended(folder: Path, **changes: Any) -> Pretended:
    starts = Pretended(folder, make_context(**changes))
    object.__setattr__(starts, "log", [])
    return starts


def test_starts_take_turns_with_the_caches_that_they_stand_for(tmp_path: Path) -> None:
    starts = pretended(tmp_path, quick=False)
    rows = {row.provider: row for row in timed_rows(starts, ["cold", "warm"])}
    assert starts.log == [
        ("warm", False), ("cold", False), ("warm", True), ("warm", True), ("cold", False), ("cold", False),
        ("warm", True),
    ]  # fmt: skip
    assert rows["cold"].n == rows["warm"].n == 3
    assert rows["cold"].p50_ms == 15_000.0 and rows["warm"].p50_ms == 14_000.0  # the first start does not count
    assert rows["cold"].part == "start-up" and rows["cold"].method == "latentbe+tdiv-sdiv" and rows["cold"].E == 2


def test_what_was_compiled_ahead_is_there_at_every_start_and_nothing_else(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "kernel").touch()
    starts = pretended(tmp_path)
    for _ in range(2):
        starts.empty_caches("ahead-of-time")
        folder = starts.caches("ahead-of-time")
        assert [path.name for path in folder.rglob("*") if path.is_file()] == ["kernel"]
        (folder / "tuning").touch()


def test_a_kind_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    starts = pretended(tmp_path, quick=False)
    rows = {row.provider: row for row in timed_rows(starts, ["cold", "ahead-of-time", "warm"])}
    assert rows["ahead-of-time"].note == f"{FAILED}: no memory" and rows["ahead-of-time"].p50_ms is None
    assert [kind for kind, _ in starts.log].count("ahead-of-time") == 2
    assert rows["cold"].n == rows["warm"].n == 3


def test_the_first_line_s_time_is_that_of_its_writing(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as events:
        events.add_scalar("train/loss", 1.0, 1, walltime=1234.5)
        events.add_scalar("train/loss", 1.0, 2, walltime=1240.0)
    assert first_step(tmp_path) == 1234.5


def test_a_log_that_begins_later_is_no_start(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as events:
        events.add_scalar("train/loss", 1.0, 7, walltime=1234.5)
    with pytest.raises(StartFailed, match="begins with step 7"):
        first_step(tmp_path)


def test_caches_of_the_user_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*startup.CACHES, "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "mine")
    found = Starts(tmp_path, make_context()).environment("cold")
    assert "TRITON_INTERPRET" not in found and found["PATH"] == os.environ["PATH"]
    assert all(Path(found[name]).is_relative_to(tmp_path / "caches" / "cold") for name in startup.CACHES)
    assert len({found[name] for name in startup.CACHES}) == 4


def test_a_real_start(tmp_path: Path, device: torch.device) -> None:
    starts = Starts(tmp_path, make_context(device=device))
    starts.prepare()
    begun = time.monotonic()
    seconds = starts.seconds("warm")
    whole = time.monotonic() - begun
    assert 1 < seconds < whole  # it ends well after its step
    assert (tmp_path / "runs" / "warm" / "results.json").exists()
    shutil.rmtree(starts.data)
    with pytest.raises(StartFailed, match=r"error: .*images"):
        starts.seconds("warm")

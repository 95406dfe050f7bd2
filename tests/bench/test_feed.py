"""The feed part of `python -m bench`: who brings the right pixels is timed, who does not is not; workers end."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.context import WRONG, Context
from bench.harness.rows import Row
from bench.parts import feed
from bench.parts.feed import Batch, Problem

ROOT = Path(__file__).resolve().parents[2]

IDENTITY = {"device": "a CPU", "versions": "python 3", "commit": "abc"}


def make_context(**changes: Any) -> Context:
    fields: dict[str, Any] = {
        "device": torch.device("cpu"), "quick": True, "precision": "fp32", "threads": 1, "network": "wrn10x1", "E": 2,
        "B": 4, "size": 16, "providers": (), "rounds": 3, "seconds": 0.1, "identity": IDENTITY,
        "say": lambda text: None,
    }  # fmt: skip
    return Context(**fields | changes)


def small_rows(context: Context, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    monkeypatch.setattr(feed, "QUICK", feed.Amounts(arrays=42, jpegs=9))
    monkeypatch.setattr(feed, "TURN_SECONDS", 0.02)
    return list(feed.rows(context))


def test_everybody_brings_the_right_pixels_and_is_timed(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    rows = small_rows(make_context(device=device), monkeypatch)
    workers = [f"dataloader-{n}" for n in feed.worker_counts()]
    assert [row.provider for row in rows if row.size == 32] == ["ffcv", "ffcv-cached", "resident", *workers]
    assert [row.provider for row in rows if row.size == 224] == ["ffcv", *workers]
    for row in rows:
        assert (row.part, row.B, row.n, row.device, row.commit) == ("feed", 4, 3, "a CPU", "abc"), row
        assert row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.images_per_s == pytest.approx(4e3 / row.p50_ms)
        assert row.images_per_s_core is not None and row.images_per_s_core > 0
    assert len({row.key for row in rows}) == len(rows)
    assert not multiprocessing.active_children()


class Changed:
    """Brings what `loader` brings, changed."""

    def __init__(self, loader: feed.Loader, how: str) -> None:
        self.loader, self.how = loader, how

    def __call__(self, epoch: int) -> Iterator[Batch]:
        for n, (images, labels) in enumerate(self.loader(epoch)):
            if self.how == "pixels" and n == 2:
                images = images.clone()
                images[-1, -1, -1, -1] ^= 1
            elif self.how == "boxes":
                images = images.flip(2)
            elif self.how == "labels":
                labels = labels.flip(0) + 1
            elif self.how == "too few" and n == 2:
                return
            yield images, labels


@pytest.fixture(params=["arrays", "jpegs"])
def problem(request: pytest.FixtureRequest, tmp_path: Path) -> Problem:
    make = feed.array_problem if request.param == "arrays" else feed.jpeg_problem
    return make(tmp_path, 14, make_context())


@pytest.mark.parametrize(
    ("how", "message"),
    [("labels", "batch 0 has other labels"), ("too few", "2 batches came, expected 3"), ("boxes", "batch 0 ")],
)
def test_who_brings_something_else_is_not_timed(problem: Problem, how: str, message: str) -> None:
    right = problem.loaders["ffcv"]
    chosen = Problem(
        size=problem.size,
        num_steps=problem.num_steps,
        about=problem.about,
        loaders={"right": right, "wrong": Changed(right, how)},
        wrong=problem.wrong,
    )
    rows = {row.provider: row for row in feed.problem_rows(chosen, make_context())}
    assert rows["wrong"].note.startswith(f"{WRONG}: {message}") and rows["wrong"].p50_ms is None
    assert rows["right"].p50_ms is not None


def test_one_bit_of_one_pixel_is_noticed(tmp_path: Path) -> None:
    problem = feed.array_problem(tmp_path, 14, make_context())
    wrong = feed.first_wrong(problem, Changed(problem.loaders["dataloader-0"], "pixels"))
    assert wrong == "batch 2 has other pixels"


def test_cpu_time_is_that_of_workers_too() -> None:
    may_end = multiprocessing.Event()
    busy = multiprocessing.Process(target=_spin, args=(0.3, may_end))
    before, deadline = feed.cpu_seconds(), time.monotonic() + 30
    busy.start()
    while feed.cpu_seconds() - before < 0.25 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = feed.cpu_seconds() - before
    may_end.set()
    busy.join()
    assert alive > 0.25 and feed.cpu_seconds() - before > 0.25


def _spin(seconds: float, may_end: Event) -> None:
    while time.process_time() < seconds:
        pass
    may_end.wait(60)

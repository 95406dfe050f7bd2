"""bench/parts/scaling.py on a tiny problem: what is timed, and why the rest is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.harness.context import WRONG, Context
from bench.harness.rows import Row
from bench.parts import scaling
from bench.parts.scaling import Pace, axes
from bench.rivals import PROVIDERS, Problem, Provider, Run
from ensdistill.monitor.memory import Prediction
from ensdistill.runtime.devices import Device

RATES = Device(name="cpu", flops=1e15, bandwidth=1e15, source="of nothing")
OURS = PROVIDERS["auto"].make


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(scaling, "MEMBERS", (1, 2))
    monkeypatch.setattr(scaling, "BATCHES", (2, 8))
    monkeypatch.setattr(scaling, "SIZES", (8,))
    monkeypatch.setattr(scaling, "WIDTHS", (1,))
    monkeypatch.setattr(scaling, "LONGEST_QUICK", 1e9)
    monkeypatch.setattr("bench.harness.context._cache_bytes", lambda device: 10_000)
    return make_context()


def make_context(**changes: Any) -> Context:
    fields: dict[str, Any] = {
        "device": torch.device("cpu"), "quick": True, "precision": "fp32", "threads": 1, "network": "wrn10x1", "E": 2,
        "B": 4, "size": 8, "classes": 10, "providers": (), "rounds": 3, "seconds": 0.0, "rates": RATES,
        "identity": {"device": "a CPU", "versions": "python 3", "commit": "abc"}, "say": lambda text: None,
    }  # fmt: skip
    return Context(**fields | changes)


def place(row: Row) -> tuple[Any, ...]:
    return row.network, row.E, row.B, row.size


def provide(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setitem(PROVIDERS, "auto", Provider(make=make))


def test_every_axis_goes_through_the_problem():
    context = make_context(network="wrn28x4", E=4, B=128, size=32)
    points = axes(context)
    assert all(context in line for line in points.values())
    assert [point.E for point in points["E"]] == [1, 2, 4, 8, 16]
    assert [point.B for point in points["B"]] == [32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert [point.size for point in points["size"]] == [32, 64, 224]
    assert [point.network for point in points["width"]] == ["wrn28x1", "wrn28x2", "wrn28x4", "wrn28x10"]
    assert [point.B for point in axes(make_context(B=48))["B"]][:3] == [32, 48, 64]
    assert set(axes(make_context(network="resnet18"))) == {"E", "B", "size"}


def test_points_are_timed(context):
    rows = list(scaling.rows(context))
    assert [place(row)[1:3] for row in rows] == [(2, 4), (1, 4), (2, 2), (2, 8)]
    assert [row.method for row in rows] == ["latentbe+tdiv-sdiv", "latentbe", *["latentbe+tdiv-sdiv"] * 2]
    for row in rows:
        assert row.n == 3 and row.note == "" and row.device == "a CPU"
        assert row.p20_ms and row.p50_ms and row.p80_ms and row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.tflops and row.gbps and row.peak_gb and row.floor_share and 0 < row.floor_share < 1
    by_batch = sorted(rows[:1] + rows[2:], key=lambda row: row.B or 0)
    peaks = [row.peak_gb or 0 for row in by_batch]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]


def test_what_does_not_fit_is_not_timed_and_says_what_it_needs(context, monkeypatch):
    def needed(B: int) -> Prediction:
        return scaling.predict(scaling._workload(context, "auto", "fp32"), B)

    monkeypatch.setattr(scaling, "capacity", lambda device: needed(8).total - 1)
    fits, _, _, ends = scaling.rows(context)
    assert ends.B == 8 and ends.p50_ms is None and ends.note.startswith("does not fit: needs about")
    assert ends.peak_gb == pytest.approx(needed(8).tensors / 1e9)
    assert fits.p50_ms is not None


def test_the_check_takes_as_many_images_as_have_room(context, monkeypatch):
    def predict(workload: Any, B: int) -> Prediction:
        return Prediction(parameters=0, state=0, step=B * (1 if workload.precision == "bf16" else 3), allowance=0)

    monkeypatch.setattr(scaling, "predict", predict)
    point = replace(context, precision="bf16", B=64)
    assert [scaling._checked_images(point, room) for room in (256, 255, 64, 1)] == [64, 32, 16, 2]
    monkeypatch.setattr(scaling, "capacity", lambda device: 20)
    row = scaling._row(replace(context, precision="bf16", B=8), Pace())
    assert row.p50_ms is not None and row.note == "checked on 4 images"


def test_what_would_take_long_is_not_timed(context, monkeypatch):
    monkeypatch.setattr(scaling, "LONGEST_QUICK", 0.0)
    rows = list(scaling.rows(context))
    # the first is measured always; of an axis one point tells that it ends
    assert [place(row)[1:3] for row in rows] == [(2, 4), (1, 4), (2, 2)]
    assert rows[0].p50_ms is not None
    for row in rows[1:]:
        assert row.p50_ms is None and row.peak_gb is None and row.note.startswith("would take about")
    monkeypatch.setattr(scaling, "LONGEST", 0.0)
    assert len(list(scaling.rows(replace(context, quick=False)))) == 4


def test_wrong_numbers_have_no_time(context, monkeypatch):
    provide(monkeypatch, lambda problem: OURS(replace(problem, lr=3 * problem.lr)))
    rows = list(scaling.rows(replace(context, B=8)))
    assert rows and all(row.p50_ms is None and row.note.startswith(WRONG) for row in rows)
    assert all(row.peak_gb is None for row in rows)  # no end of memory


def test_numbers_that_become_wrong_while_timed_have_no_time(context, monkeypatch):
    def make(problem: Problem) -> Run:
        run = OURS(problem)
        step, calls = run._step, []

        def later_wrong(*arguments: Any) -> Any:
            calls.append(1)
            measures = step(*arguments)
            return measures | {"loss": measures["loss"] / 0} if len(calls) > 2 else measures

        run._step = later_wrong
        return run

    provide(monkeypatch, make)
    row = next(scaling.rows(context))
    assert row.p50_ms is None and row.note == f"{WRONG}: the loss of the last step is inf"


def test_memory_that_ends_in_spite_of_the_prediction_ends_one_point(context, monkeypatch):
    def make(problem: Problem) -> Run:
        if problem.config.method.shown == "clean":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return OURS(problem)

    provide(monkeypatch, make)
    rows = list(scaling.rows(replace(context, quick=False)))
    assert [row.E for row in rows if row.p50_ms is None] == [1] and len(rows) == 4
    assert rows[1].note.startswith("out of memory") and rows[1].peak_gb


def test_a_point_that_cannot_be_computed_ends_one_point(context, monkeypatch):
    def make(problem: Problem) -> Run:
        if problem.config.method.shown == "clean":
            raise ValueError("expected networks that auto can compute")
        return OURS(problem)

    provide(monkeypatch, make)
    rows = list(scaling.rows(replace(context, quick=False)))
    assert [row.note for row in rows] == ["", "expected networks that auto can compute", "", ""]
    assert rows[1].p50_ms is None and rows[1].peak_gb is None


def test_pace_is_a_line_through_what_was_measured():
    pace = Pace()
    assert pace.seconds_for(1.0) == 0.0
    pace.add(2.0, 3.0)
    assert pace.seconds_for(4.0) == 6.0
    pace.add(4.0, 4.0)
    assert pace.seconds_for(8.0) == pytest.approx(6.0)


@pytest.mark.values
@pytest.mark.gpu
def test_points_are_timed_on_a_gpu(context, monkeypatch):
    monkeypatch.setattr(scaling, "PROVIDER", "triton")  # `auto` would first measure every layer of every point
    monkeypatch.setattr(scaling, "BATCHES", (8,))
    monkeypatch.setattr(scaling, "SIZES", (16,))
    rows = list(scaling.rows(replace(context, device=torch.device("cuda"), precision="bf16", B=8, size=16)))
    assert rows and all(row.p50_ms and row.peak_gb for row in rows)

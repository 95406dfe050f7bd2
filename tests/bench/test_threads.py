"""The part `threads`: each provider on one thread and on all, checked, and beside a neighbour stopped in between."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from bench import __main__
from bench.parts import threads
from ensdistill.runtime.devices import Device
from tests.bench.test_scaling import make_context

RATES = {n: Device(name="cpu", flops=n * 1e9, bandwidth=1e9, source="of nothing") for n in (1, 2)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.harness.context._cache_bytes", lambda device: 10_000)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "rates_of", lambda device, precision: RATES[torch.get_num_threads()])


def test_each_is_timed_with_its_threads_and_put_beside_its_own_one_thread() -> None:
    before = torch.get_num_threads()
    rows = {row.provider: row for row in threads.rows(make_context(providers=("pruned", "auto")))}
    assert rows.keys() == {
        f"{name}, {way}"
        for way in ("1 thread", "2 threads", "2 threads, a busy neighbour")
        for name in ("pruned", "auto")
    }
    for label, row in rows.items():
        assert row.n == 3 and row.p50_ms and row.floor_share and row.device == "a CPU"
        alone = rows[f"{label.split(',')[0]}, 1 thread"]
        assert alone.p50_ms is not None
        assert row.note == ("" if row is alone else f"{alone.p50_ms / row.p50_ms:.2f} x one thread")
    one, two = rows["auto, 1 thread"], rows["auto, 2 threads"]
    assert one.floor_share and two.floor_share and one.p50_ms and two.p50_ms
    assert one.floor_share * one.p50_ms > 1.5 * two.floor_share * two.p50_ms  # a floor of its own for as many threads
    assert torch.get_num_threads() == before


def test_the_neighbour_computes_while_it_is_awake_and_no_longer() -> None:
    with threads._neighbour() as (wake, stop):
        child = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[-1]

        def computed() -> int:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        def ticks_in(seconds: float) -> int:
            time.sleep(0.05)
            before = computed()
            time.sleep(seconds)
            return computed() - before

        assert ticks_in(0.1) == 0
        wake()
        assert ticks_in(0.5) > 0
        stop()
        assert ticks_in(0.1) == 0
    assert not Path(f"/proc/{child}").exists()


def test_wrong_numbers_have_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "checked", lambda *arguments: "failed: for a reason")
    rows = list(threads.rows(make_context(providers=("auto",))))
    assert [(row.provider, row.n, row.note) for row in rows] == [
        ("auto, 1 thread", 0, "failed: for a reason"),
        ("auto, 2 threads", 0, "failed: for a reason"),
    ]


def test_the_part_is_measured_by_name_alone() -> None:
    assert "threads" not in __main__.Arguments().parts.split(",") and "threads" in __main__.PARTS

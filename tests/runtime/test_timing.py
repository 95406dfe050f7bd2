"""The device's clock and the capture of graphs."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from ensdistill.runtime.timing import WARM_UPS, capture, clock, device_seconds_of, seconds_in_turns, seconds_of

CPU = torch.device("cpu")


def test_a_call_is_timed_whole() -> None:
    def call() -> None:
        time.sleep(0.02)

    for seconds in (seconds_of(call, CPU), device_seconds_of(call, CPU)):
        assert 0.02 <= seconds < 1


def test_all_calls_take_turns_after_one_that_is_not_timed(device: torch.device) -> None:
    order: list[str] = []
    slow_x, fast_x = torch.randn(1 << 20, device=device), torch.randn(16, device=device)

    def slow() -> None:
        order.append("slow")
        for _ in range(20):
            torch.sin(slow_x)

    def fast() -> None:
        order.append("fast")
        torch.sin(fast_x)

    slow_seconds, fast_seconds = seconds_in_turns([slow, fast], device, rounds=5)
    assert order == ["slow", "fast"] * 6
    assert len(slow_seconds) == len(fast_seconds) == 5
    assert sorted(slow_seconds)[2] > sorted(fast_seconds)[2] > 0


@pytest.mark.gpu
def test_clocks_wait_for_the_device(device: torch.device) -> None:
    x = torch.randn(1 << 26, device=device)

    def call() -> None:
        for _ in range(20):
            torch.sin(x)

    call()
    by_events = device_seconds_of(call, device)
    start = clock(device)
    call()
    queued = time.perf_counter() - start
    by_host = clock(device) - start
    assert queued < by_host and by_events < 1.5 * by_host


@pytest.mark.gpu
def test_a_capture_warms_up_once_and_replays_into_the_same_outputs(device: torch.device) -> None:
    counts: Counter[str] = Counter()
    x = torch.ones(1, device=device)

    def work() -> torch.Tensor:
        counts["work"] += 1
        return x * 2

    replay = capture(work)
    assert counts["work"] == WARM_UPS + 1
    first = replay()
    x.fill_(3.0)
    assert replay() is first and first.item() == 6.0
    assert counts["work"] == WARM_UPS + 1

    pool = torch.cuda.graph_pool_handle()
    capture(work, warm_up=lambda: counts.update(["warm"]), pool=pool, empty_cache=False)()
    assert counts == {"work": WARM_UPS + 2, "warm": 1}


@pytest.mark.gpu
def test_what_waits_for_the_device_is_not_captured(device: torch.device) -> None:
    x = torch.ones(1, device=device)
    with pytest.raises(RuntimeError):
        capture(lambda: x.sum().item())
    torch.cuda.synchronize()
    assert capture(lambda: x + 1)().item() == 2.0

"""Timing one GPU operation in a benchmark: `measure(benchmark, fn, flops=…, bytes=…)`.

The operation is captured in a CUDA graph, so that Python's part of a launch is not timed, and replayed often enough
that a round takes milliseconds; the clock waits for the device. What pytest-benchmark prints and saves is then seconds
a call, and `extra_info` holds the rates and the share of the floor of the device, max(FLOPs / peak, bytes / bandwidth).
An operation that reads what fits in the L2 cache finds it there: whoever wants memory's rate rotates its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ensdistill.runtime.devices import installed_gpu
from ensdistill.runtime.timing import capture, clock, seconds_of

ROUNDS = 20
ROUND_SECONDS = 4e-3


def _captured(fn: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """Capture `fn` in a graph; returns its replay, or `fn` itself where it cannot be captured, and which it was."""
    try:
        return capture(fn), True
    except RuntimeError:  # it waits for the device, or captures graphs itself
        torch.cuda.synchronize()
        return fn, False


def measure(benchmark: Any, fn: Callable[[], object], *, flops: float, bytes: float) -> dict[str, Any]:
    """Run `fn()` as pytest-benchmark's `benchmark` and give its `extra_info`.

    Args:
        flops, bytes: what one call computes and must move, each tensor once.
    """
    captured = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fn()
    if device.type == "cuda":
        fn, captured = _captured(fn)

    def three_times() -> None:
        for _ in range(3):
            fn()

    seconds = seconds_of(three_times, device) / 3
    calls = max(1, min(1000, round(ROUND_SECONDS / max(seconds, 1e-7))))
    # pedantic() takes a clock only from a marker, which every caller would have to repeat
    benchmark._timer = partial(clock, device)
    benchmark.pedantic(fn, rounds=ROUNDS, iterations=calls, warmup_rounds=2)
    info: dict[str, Any] = benchmark.extra_info
    info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    info["flops"], info["bytes"], info["captured"] = flops, bytes, captured
    if benchmark.stats is None:  # --benchmark-disable
        return info
    seconds = benchmark.stats.stats.median
    info["microseconds"] = round(1e6 * seconds, 2)
    info["TFLOP/s"] = round(flops / seconds / 1e12, 2)
    info["GB/s"] = round(bytes / seconds / 1e9, 1)
    if (gpu := installed_gpu()) is not None:
        info["share of the floor"] = round(max(flops / gpu.flops, bytes / gpu.bandwidth) / seconds, 3)
    return info

"""Timing one GPU operation in a benchmark: `measure(benchmark, fn, flops=…, bytes=…)`.

The operation is captured in a CUDA graph, so that Python's part of a launch is not timed, and replayed often enough
that a round takes milliseconds; the clock waits for the device. What pytest-benchmark prints and saves is then seconds
a call, and `extra_info` holds the rates and the share of the floor of the device, max(FLOPs / peak, bytes / bandwidth).
An operation that reads what fits in the L2 cache finds it there: whoever wants memory's rate rotates its inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ensdistill.runtime.devices import installed_gpu

ROUNDS = 20
ROUND_SECONDS = 4e-3


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(fn: Callable[[], object], calls: int) -> float:
    start = _clock()
    for _ in range(calls):
        fn()
    return (_clock() - start) / calls


def _captured(fn: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """`fn` as the replay of a graph, and whether it could be captured; its outputs live as long as the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = fn()
    except RuntimeError:  # it waits for the device, or captures graphs itself
        torch.cuda.synchronize()
        return fn, False

    def replay() -> object:
        graph.replay()
        return kept

    return replay, True


def measure(
    benchmark: Any, fn: Callable[[], object], *, flops: float, bytes: float, capture: bool = True
) -> dict[str, Any]:
    """Run `fn()` as pytest-benchmark's `benchmark` and give its `extra_info`.

    Args:
        flops, bytes: what one call computes and must move, each tensor once.
        capture: False times plain calls, Python's part of the launches included.
    """
    captured = False
    fn()
    if capture and torch.cuda.is_available():
        fn, captured = _captured(fn)
    calls = max(1, min(1000, round(ROUND_SECONDS / max(_seconds(fn, 3), 1e-7))))
    benchmark._timer = _clock  # pedantic() takes a clock only from a marker, and every caller would have to repeat it
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
    if (device := installed_gpu()) is not None:
        info["share of the floor"] = round(max(flops / device.flops, bytes / device.bandwidth) / seconds, 3)
    return info

"""Timing rivals side by side: CUDA graphs over rotating inputs, replayed in turn; the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

ROUNDS = 25
MAX_SETS = 32
"""Sets of inputs at most that a rival rotates through."""
Call = Callable[[], object]
"""One call of a rival on one set of inputs; what it returns is kept alive until the round's last call."""


class Timing(NamedTuple):
    """Microseconds of one call: median over the rounds, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} µs ({self.low:.1f} to {self.high:.1f})"


def num_sets(bytes: float, device: torch.device) -> int:
    """How many sets of inputs, of `bytes` a call, are together at least twice as large as the L2 cache; at least 2."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(MAX_SETS, max(2, -(-2 * cache // max(1, int(bytes)))))


def interleaved(
    rivals: Mapping[str, Sequence[Call]], device: torch.device, *, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Time every rival: in each round, each of them runs all of its calls once, one a set of inputs.

    On CUDA a rival's calls are one graph, so that neither Python nor a launch is timed, and rounds wait for nothing:
    the device is never idle before a replay. A clock that changes meets all rivals alike.
    """
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    runs = [_all_of(calls) if pool is None else _captured(calls, pool) for calls in rivals.values()]
    for run in runs:
        run()
    seconds = (_by_host if pool is None else _by_events)(runs, rounds)
    timings = {}
    for (name, calls), each in zip(rivals.items(), seconds, strict=True):
        ordered = sorted(1e6 * one / len(calls) for one in each)
        tail = len(ordered) // 10
        timings[name] = Timing(statistics.median(ordered), ordered[tail], ordered[-1 - tail])
    del runs, run
    if pool is not None:
        torch.cuda.empty_cache()  # the graphs' pool
    return timings


def _all_of(calls: Sequence[Call]) -> Callable[[], None]:
    def run() -> None:
        kept = [call() for call in calls]  # outputs of one call must not land where the last ones' still are
        del kept

    return run


def _captured(calls: Sequence[Call], pool: Any) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what compiles, tunes or chooses algorithms at first does it here
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        _all_of(calls)()
    return graph.replay


def _by_events(runs: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    events: list[list[tuple[Any, Any]]] = [
        [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for _ in runs
    ]
    for i in range(rounds):
        for run, pairs in zip(runs, events, strict=True):
            pairs[i][0].record()
            run()
            pairs[i][1].record()
    torch.cuda.synchronize()
    return [[1e-3 * start.elapsed_time(end) for start, end in pairs] for pairs in events]


def _by_host(runs: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, each in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            each.append(time.perf_counter() - start)
    return seconds

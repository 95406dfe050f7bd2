"""Timing rivals side by side: CUDA graphs over rotating inputs, replayed in turn; the host's clock on a CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ensdistill.runtime.timing import capture, seconds_in_turns

ROUNDS = 25
MAX_SETS = 32
"""Most sets of inputs that a rival rotates through."""
Call = Callable[[], object]
"""Function that calls a rival on one set of inputs; what it returns is kept alive until the round's last call."""


class Timing(NamedTuple):
    """Microseconds of one call: median over the rounds, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} µs ({self.low:.1f} to {self.high:.1f})"


def num_sets(bytes: float, device: torch.device) -> int:
    """Count the sets of inputs, of `bytes` a call, that are together at least twice the L2 cache; at least 2."""
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
    runs = [_all_of(calls) if pool is None else capture(_all_of(calls), pool=pool) for calls in rivals.values()]
    seconds = seconds_in_turns(runs, device, rounds)
    timings = {}
    for (name, calls), each in zip(rivals.items(), seconds, strict=True):
        ordered = sorted(1e6 * one / len(calls) for one in each)
        tail = len(ordered) // 10
        timings[name] = Timing(statistics.median(ordered), ordered[tail], ordered[-1 - tail])
    del runs
    if pool is not None:
        torch.cuda.empty_cache()  # the graphs' pool
    return timings


def _all_of(calls: Sequence[Call]) -> Callable[[], None]:
    def run() -> None:
        kept = [call() for call in calls]  # outputs of one call must not land where the last ones' still are
        del kept

    return run

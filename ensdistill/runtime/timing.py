"""The device's clock and the capture of CUDA graphs, for everything that measures seconds.

On a GPU CUDA events time what the device does; elsewhere the host's clock does. How often something runs, over which
inputs, and whether the median or the best run counts, is the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 3
"""Runs before a capture: the first may compile, tune and choose algorithms."""


def clock(device: torch.device) -> float:
    """Seconds by the host's clock, once the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call by the host's clock, which waits for the device before and after it."""
    start = clock(device)
    call()
    return clock(device) - start


def device_seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time what one call queues on the device, by CUDA events; by the host's clock where there is no GPU."""
    if device.type != "cuda":
        return seconds_of(call, device)
    start, end = _event(), _event()
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def seconds_in_turns(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[list[float]]:
    """Time all calls in each of `rounds`, one after the other, so that a clock that changes meets them all.

    Each runs once untimed. On a GPU nothing waits in between: the device never idles before a call.

    Returns: seconds of each call, one a round.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        by_round = [[seconds_of(call, device) for call in calls] for _ in range(rounds)]
        return [list(seconds) for seconds in zip(*by_round, strict=True)]
    events = [[(_event(), _event()) for _ in range(rounds)] for _ in calls]
    for i in range(rounds):
        for call, pairs in zip(calls, events, strict=True):
            pairs[i][0].record()
            call()
            pairs[i][1].record()
    torch.cuda.synchronize(device)
    return [[1e-3 * start.elapsed_time(end) for start, end in pairs] for pairs in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Replay(Generic[T]):
    """A CUDA graph; each call replays it and returns the outputs of the capture, written anew."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: T) -> None:
        self._graph, self._outputs = graph, outputs

    def __call__(self) -> T:
        self._graph.replay()
        return self._outputs


def capture(
    work: Callable[[], T],
    *,
    warm_up: Callable[[], object] | None = None,
    pool: Any = None,
    empty_cache: bool = True,
) -> Replay[T]:
    """Capture `work` as a graph on the current GPU; other threads may use the GPU meanwhile.

    Args:
        warm_up: run once before, on the capture's stream (default: `work`, `WARM_UPS` times).
        pool: memory that graphs share, of `torch.cuda.graph_pool_handle()` (default: of its own).
        empty_cache: first give unused memory back, as `torch.cuda.graph` does; among many small captures it is slow.

    Raises:
        RuntimeError: something in `work` cannot be captured, such as waiting for the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS if warm_up is None else 1):
            (warm_up or work)()
        torch.cuda.synchronize()
        if empty_cache:
            torch.cuda.empty_cache()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        finally:
            graph.capture_end()
    return Replay(graph, outputs)

"""A second CUDA stream: work that runs beside the current stream's, forked off it and joined to it again.

The caching allocator gives a block that is free again to the stream that made it, without asking whether another one
still reads it. So what a fork reads is held until the current stream has waited for the fork; and what a fork makes may
be dropped only where the next fork comes later than its last reader, as in one step after another.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

LAG = 3
"""Most forks that the current stream is ahead of: so many forks' inputs are held."""

lane = 0
"""Stream whose memory a tensor that is made now belongs to: the current one (0), or the side stream (1). Two streams
share none, so that a prediction of memory adds up their peaks."""
meta_stands_for = "cuda"
"""Kind of device that tensors on `meta` stand for when memory is counted: cpu or cuda."""


@contextmanager
def meta_as(device_type: str) -> Iterator[None]:
    """Let what runs on `meta` hold what it would hold on such a device."""
    global meta_stands_for
    before, meta_stands_for = meta_stands_for, device_type
    try:
        yield
    finally:
        meta_stands_for = before


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Side stream of `device`, one for all forks, which then share its memory."""
    return torch.cuda.Stream(device)


class SideStream:
    """A GPU's second stream. On `meta` memory is held as it would be there; on a CPU a fork is the work itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[torch.cuda.Event | None, tuple[Tensor, ...]]] = deque()

    @contextmanager
    def fork(self, *reads: Tensor) -> Iterator[None]:
        """Run the block's work beside the current stream's from here on, until `join`.

        Args:
            reads: what it reads and the caller may drop before.
        """
        global lane
        kind = meta_stands_for if self._device.type == "meta" else self._device.type
        if kind != "cuda":
            yield
            return
        side = None
        if self._device.type == "cuda":
            side = _stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
        before, lane = lane, 1
        try:
            with torch.cuda.stream(side) if side is not None else nullcontext():
                yield
        finally:
            lane = before
        self._pending.append((None if side is None else side.record_event(), reads))
        while len(self._pending) > LAG:
            self._wait_for_oldest()

    def join(self) -> None:
        """Have the current stream wait for every fork."""
        while self._pending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        event, _ = self._pending.popleft()
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

"""Timing several ways of doing one thing so that the comparison is fair: in turns, warmed up, with the spread kept.

Round j runs everybody once, forwards or, in odd rounds, backwards, so that a clock that changes meets all alike. A turn
is as many calls as take `TURN_SECONDS`; on a GPU CUDA events time it, elsewhere the host's clock. Whoever wants
memory's rate gives every call other inputs (`call(i)`), more than the L2 cache holds. The device is read while it
works: clock, throttling, energy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ensdistill.monitor.monitor import source_of
from ensdistill.monitor.readings import Figures, Reading, Source, together
from ensdistill.runtime.timing import device_seconds_of

Call = Callable[[int], object]
"""Function that does the thing once; the number counts the calls."""

WARM_UPS = 3
SLOW_SECONDS = 0.5
"""Seconds of a call beyond which, even the second time, it counts as warm."""
TURN_SECONDS = 0.05
MOST_CALLS = 1000
"""Calls in a turn, at most."""


@dataclass
class Timing:
    """Times of one of those who took turns."""

    seconds: list[float] = field(default_factory=list)
    """Seconds of a call, one a round."""
    clocks_mhz: list[float] = field(default_factory=list)
    """SM clock at the end of each turn, where it is known."""
    parts: list[Figures] = field(default_factory=list)
    """Readings of the device over each turn."""
    calls: int = 0
    """Number of calls in all turns."""

    def quantile_ms(self, share: float) -> float:
        """Give the milliseconds of a call at `share` of the rounds in order, 0.2, 0.5 or 0.8."""
        if len(self.seconds) == 1:
            return 1e3 * self.seconds[0]
        cuts = statistics.quantiles(self.seconds, n=10, method="inclusive")
        return 1e3 * cuts[round(10 * share) - 1]

    @property
    def figures(self) -> Figures:
        """Readings of the device over all turns."""
        return together(self.parts)

    @property
    def clock_mhz(self) -> float | None:
        """Mean of the SM clocks; None where they are not known."""
        return statistics.fmean(self.clocks_mhz) if self.clocks_mhz else None


def ties(one: Timing, other: Timing) -> bool:
    """Tell whether their spreads overlap: then neither is called the faster."""
    return max(one.quantile_ms(0.2), other.quantile_ms(0.2)) <= min(one.quantile_ms(0.8), other.quantile_ms(0.8))


def in_turns(calls: Mapping[str, Call], device: torch.device, *, rounds: int, max_seconds: float) -> dict[str, Timing]:
    """Time everybody in turns.

    Args:
        rounds: turns of each.
        max_seconds: stop after the round in which they are over, three rounds at least.
    """
    timings = {name: Timing() for name in calls}
    counts = {name: _warmed(call, device) for name, call in calls.items()}
    source = source_of(device)()
    try:
        end = time.perf_counter() + max_seconds
        for j in range(rounds):
            order = list(calls) if j % 2 == 0 else list(calls)[::-1]
            for name in order:
                _turn(calls[name], counts[name], timings[name], source, device)
            if j >= 2 and time.perf_counter() > end:
                break
    finally:
        source.close()
    return timings


def _warmed(call: Call, device: torch.device) -> int:
    """Warm up, and count the calls that make a turn."""
    for i in range(WARM_UPS):
        seconds, _ = _timed(call, range(i, i + 1), device)
        if i > 0 and seconds > SLOW_SECONDS:
            return 1
    seconds, _ = _timed(call, range(WARM_UPS, WARM_UPS + 2), device)
    return max(1, min(MOST_CALLS, round(TURN_SECONDS / max(seconds, 1e-7))))


def _turn(call: Call, count: int, timing: Timing, source: Source, device: torch.device) -> None:
    before: Reading = source.read()
    seconds, total = _timed(call, range(timing.calls, timing.calls + count), device)
    after: Reading = source.read()
    timing.seconds.append(seconds)
    timing.calls += count
    timing.parts.append(Figures.between(before, after, total))
    if after.clock_mhz is not None:
        timing.clocks_mhz.append(after.clock_mhz)


def _timed(call: Call, numbers: range, device: torch.device) -> tuple[float, float]:
    """Time calls: seconds a call, and of all by the host's clock."""

    def turn() -> None:
        for i in numbers:
            call(i)

    start = time.perf_counter()
    seconds = device_seconds_of(turn, device)
    return seconds / len(numbers), time.perf_counter() - start

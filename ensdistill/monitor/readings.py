"""Readings of a device, and the figures of a whole training that many readings make."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

SETTINGS = ("application clocks", "display clocks")
"""Limits that somebody set on purpose: they are recorded, but are no throttling."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One look at a device. None: it does not say."""

    device: Literal["GPU", "CPU"]
    """Kind of device that was looked at."""
    utilisation: float | None = None
    """GPU: share of the last moment (up to a second) in which a kernel ran. CPU: share of the cores that this process
    may use that it used since the last reading."""
    machine_utilisation: float | None = None
    """CPU: share of all cores that anything used since the last reading."""
    clock_mhz: float | None = None
    """GPU: clock of the SMs."""
    power_w: float | None = None
    """GPU: power of the board. CPU: power of its packages, everything that runs on them included."""
    memory_gb: float | None = None
    """GPU: memory in use, by anybody. CPU: this process's resident memory."""
    temperature_c: float | None = None
    """GPU: temperature of the chip."""
    limits: tuple[str, ...] | None = None
    """GPU: what holds the clock down, in words; idling is none."""
    other_processes: int | None = None
    """GPU: processes beside this one that compute on it."""
    energy_j: float | None = None
    """Energy counter: only differences mean something."""

    @property
    def throttled(self) -> tuple[str, ...]:
        """Limits that hold the clock down against everybody's will."""
        return tuple(limit for limit in self.limits or () if limit not in SETTINGS)

    def values(self) -> dict[str, float | None]:
        """Values for a line of the log."""
        return {
            "utilisation": self.utilisation,
            "machine_utilisation": self.machine_utilisation,
            "clock_mhz": self.clock_mhz,
            "power_w": self.power_w,
            "memory_gb": self.memory_gb,
            "temperature_c": self.temperature_c,
            "throttled": None if self.limits is None else float(bool(self.throttled)),
            "other_processes": self.other_processes,
        }

    def line(self) -> str:
        """Text for a progress line; what is not known is left out."""
        parts = [f"{self.device} {_percent(self.utilisation)}" if self.utilisation is not None else self.device]
        if self.machine_utilisation is not None:
            parts[0] += f" (machine {_percent(self.machine_utilisation)})"
        if self.clock_mhz is not None:
            parts.append(f"{self.clock_mhz:,.0f} MHz")
        if self.power_w is not None:
            parts.append(f"{self.power_w:.0f} W")
        if self.throttled:
            parts.append("throttled")
        return "  ".join(parts)


class Source(Protocol):
    """Gives readings of a device. A field that fails once is None from then on."""

    notes: list[str]
    """Notes of what is not known, and why; each once. Whoever shows them empties the list."""

    def read(self) -> Reading:
        """Read the device as it is."""

    def close(self) -> None:
        """Let go of the device."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of a training's device. None: not known for the whole of it. `+` joins two parts of one training."""

    seconds: float = 0.0
    """Seconds watched, validation and saving included."""
    samples: int = 0
    """Number of readings."""
    utilisation: float | None = None
    """Mean utilisation over the time."""
    energy_wh: float | None = None
    """Energy of the GPU, or of the CPU's packages."""
    throttled: float | None = None
    """Share of the samples in which the GPU was throttled."""
    limits: dict[str, float] = field(default_factory=dict)
    """Share of the samples by what held the clock down, settings included."""
    shared: float | None = None
    """Share of the samples in which others computed on the GPU."""

    @classmethod
    def between(cls, before: Reading, now: Reading, seconds: float) -> Figures:
        """Figures of the `seconds` between two readings: one sample, which is `now`."""
        return cls(
            seconds=seconds,
            samples=1,
            utilisation=now.utilisation,
            energy_wh=_energy_wh(before, now, seconds),
            throttled=None if now.limits is None else float(bool(now.throttled)),
            limits=dict.fromkeys(now.limits or (), 1.0),
            shared=None if now.other_processes is None else float(now.other_processes > 0),
        )

    def __add__(self, other: Figures) -> Figures:
        if not self.seconds or not other.seconds:
            return self if self.seconds else other

        def share(a: float | None, b: float | None) -> float | None:
            return _mean(a, b, self.samples, other.samples)

        throttled = share(self.throttled, other.throttled)
        words = self.limits | other.limits if throttled is not None else {}
        energy = _mean(self.energy_wh, other.energy_wh, 1, 1)
        return Figures(
            seconds=self.seconds + other.seconds,
            samples=self.samples + other.samples,
            utilisation=_mean(self.utilisation, other.utilisation, self.seconds, other.seconds),
            energy_wh=None if energy is None else 2 * energy,
            throttled=throttled,
            limits={word: share(self.limits.get(word, 0), other.limits.get(word, 0)) or 0 for word in words},
            shared=share(self.shared, other.shared),
        )

    def of_one(self, networks: int) -> Figures:
        """Share of one of so many networks that trained together."""
        energy = None if self.energy_wh is None else self.energy_wh / networks
        return replace(self, seconds=self.seconds / networks, energy_wh=energy)

    def text(self) -> str:
        """Text for the line that ends a training, a comma before each part; what is not known is left out."""
        known = f", utilisation {_percent(self.utilisation)}" if self.utilisation is not None else ""
        return known + (f", {format_wh(self.energy_wh)} Wh" if self.energy_wh is not None else "")


def total_of(parts: Iterable[Figures]) -> Figures:
    """Join the figures of several trainings, as of one."""
    return functools.reduce(operator.add, parts, Figures())


def across_devices(devices: Sequence[Figures]) -> Figures:
    """Figures of one training on several devices: their energies' sum, their mean use, the worst that befell one."""

    def known(name: str) -> list[float]:
        values = [getattr(figures, name) for figures in devices]
        return [] if None in values else values

    use, energy, throttled, shared = (known(n) for n in ("utilisation", "energy_wh", "throttled", "shared"))
    words = {word for figures in devices for word in figures.limits}
    return replace(
        devices[0],
        utilisation=sum(use) / len(use) if use else None,
        energy_wh=sum(energy) if energy else None,
        throttled=max(throttled, default=None),
        limits={word: max(figures.limits.get(word, 0.0) for figures in devices) for word in sorted(words)},
        shared=max(shared, default=None),
    )


def spoiled(trainings: Iterable[Figures | None]) -> list[str]:
    """Warnings of what spoils the speeds, times and energies measured in `trainings`, a line each."""
    known = [figures for figures in trainings if figures is not None]
    lines = []
    throttled = total_of(figures for figures in known if figures.throttled is not None)
    if throttled.throttled:
        by = [f"{word} {_share(share)}" for word, share in throttled.limits.items() if word not in SETTINGS]
        lines.append(
            f"the GPU was throttled in {_share(throttled.throttled)} of the samples ({', '.join(by)}): "
            "speed, time and energy are not what it can do"
        )
    shared = total_of(figures for figures in known if figures.shared is not None)
    if shared.shared:
        lines.append(
            f"other processes computed on the GPU in {_share(shared.shared)} of the samples: "
            "speed, time and energy are not this program's alone"
        )
    return lines


def format_wh(value: float) -> str:
    """Format an energy: `0.0123`, `4.56`, `1,234`."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _energy_wh(before: Reading, now: Reading, seconds: float) -> float | None:
    """Energy by the counter, or by the power where there is none (or it started anew)."""
    if before.energy_j is not None and now.energy_j is not None and now.energy_j >= before.energy_j:
        return (now.energy_j - before.energy_j) / 3600
    if before.power_w is not None and now.power_w is not None:
        return (before.power_w + now.power_w) / 2 * seconds / 3600
    return None


def _mean(a: float | None, b: float | None, weight_a: float, weight_b: float) -> float | None:
    """Mean of two weighted values; None where either is not known, or nothing was weighed."""
    if a is None or b is None or not weight_a + weight_b:
        return None
    return (a * weight_a + b * weight_b) / (weight_a + weight_b)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _share(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "under 1 %"

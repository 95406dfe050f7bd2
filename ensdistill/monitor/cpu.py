"""Readings of the CPU: this process and the machine by /proc, the energy of its packages by RAPL."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ensdistill.monitor.readings import Reading

PROC = Path("/proc")
POWERCAP = Path("/sys/class/powercap")


@dataclass
class _Package:
    """One package's counter, which starts anew at `range_uj`."""

    path: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def read(self) -> int:
        """Microjoules since the counter was first read."""
        now = int(self.path.read_text())
        self.total_uj += now - self.last_uj if now >= self.last_uj else now + self.range_uj - self.last_uj
        self.last_uj = now
        return self.total_uj


class CpuSource:
    """A `readings.Source` of this process and its machine."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._cores = len(os.sched_getaffinity(0))
        self._packages = self._find_packages()
        self._ticks = self._machine_ticks()
        self._joules: float | None = 0.0
        self._used, self._at = time.process_time(), time.perf_counter()

    def read(self) -> Reading:
        """The machine as it is; utilisation and power are of the time since the last reading."""
        used, at = time.process_time(), time.perf_counter()
        seconds = at - self._at
        ticks, joules = self._machine_ticks(), self._energy()
        power = None
        if joules is not None and self._joules is not None and seconds > 0:
            power = (joules - self._joules) / seconds
        reading = Reading(
            device="CPU",
            utilisation=min((used - self._used) / (seconds * self._cores), 1.0) if seconds > 0 else None,
            machine_utilisation=_busy(self._ticks, ticks),
            power_w=power,
            memory_gb=_resident_gb(),
            energy_j=joules,
        )
        self._used, self._at, self._ticks, self._joules = used, at, ticks, joules
        return reading

    def close(self) -> None:
        """Do nothing: nothing is held open."""

    def _find_packages(self) -> list[_Package]:
        """The packages' counters: intel-rapl:N, on AMD too; parts of them (intel-rapl:N:M) are left out.

        The energy is not known where one cannot be read: since Linux 5.10 the counters are root's.
        """
        packages = []
        try:
            for zone in sorted(POWERCAP.glob("intel-rapl:*")):
                if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package"):
                    counter, range_uj = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())
                    packages.append(_Package(counter, range_uj, int(counter.read_text())))
        except (OSError, ValueError) as error:
            self.notes.append(f"energy and power ({error})")
            return []
        return packages

    def _energy(self) -> float | None:
        """Joules of all packages since the beginning."""
        if not self._packages:
            return None
        try:
            return sum(package.read() for package in self._packages) / 1e6
        except (OSError, ValueError) as error:
            self._packages = []
            self.notes.append(f"energy and power ({error})")
            return None

    def _machine_ticks(self) -> tuple[int, int] | None:
        """(busy, all) of all cores since the machine started; None where it does not say."""
        try:
            fields = (PROC / "stat").read_text().split("\n", 1)[0].split()
            ticks = [int(value) for value in fields[1:9]]  # guests count as users too
            return sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # without idle and iowait
        except (OSError, ValueError, IndexError):
            return None


def _busy(before: tuple[int, int] | None, now: tuple[int, int] | None) -> float | None:
    if before is None or now is None or now[1] <= before[1]:
        return None
    return min(max((now[0] - before[0]) / (now[1] - before[1]), 0.0), 1.0)


def _resident_gb() -> float | None:
    try:
        pages = int((PROC / "self" / "statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

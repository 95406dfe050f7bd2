"""The monitor: a thread that looks at the device while a network trains.

It asks the driver and the system, never CUDA, so that nothing waits for it; whatever goes wrong in it costs figures,
not the run. It prints nothing by itself: the thread that trains polls it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from ensdistill.monitor.cpu import CpuSource
from ensdistill.monitor.gpu import GpuNames, GpuSource
from ensdistill.monitor.readings import Figures, Reading, Source

_PATIENCE = 2.0  # seconds that the end of a run waits for a driver that does not answer


def source_of(device: torch.device) -> Callable[[], Source]:
    """Opens the readings of `device`; what is asked of CUDA for that is asked here, once."""
    return functools.partial(GpuSource, GpuNames.of(device)) if device.type == "cuda" else CpuSource


class Monitor:
    """Watches the device of one training.

    Args:
        opening: opens the source, in the thread.
        say: shows a note: what is not known.
        warn: shows, once each, that throttling or sharing has begun.
        interval: seconds between two readings; 0 watches nothing.
    """

    def __init__(
        self,
        opening: Callable[[], Source],
        *,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        interval: float = 1.0,
    ) -> None:
        self._opening, self._say, self._warn, self._interval = opening, say, warn, interval
        self._lock = threading.Lock()  # around the fields below, never around a question to the device
        self._before, self._figures = Figures(), Figures()
        self._started = time.perf_counter()
        self._is_lost = False
        self._latest: Reading | None = None
        self._notes: list[str] = []
        self._warnings: list[str] = []
        self._warned: set[str] = set()

    @contextmanager
    def watching(self, before: Figures) -> Iterator[None]:
        """Watch until the end of the block. `before`: of the part of this training that an earlier process did."""
        with self._lock:
            self._before, self._figures, self._is_lost = before, Figures(), self._interval == 0
            self._started = time.perf_counter()
        stop = threading.Event()
        thread = self._start(stop) if self._interval > 0 else None
        try:
            yield
        finally:
            stop.set()
            if thread is not None:
                thread.join(_PATIENCE)
                if thread.is_alive():
                    self._lose(f"it has not answered for {_PATIENCE:.0f} s")
            self.poll()

    def poll(self) -> Reading | None:
        """Give the newest reading, once, and say what has come up since. For the thread that trains."""
        with self._lock:
            reading, self._latest = self._latest, None
            notes, self._notes = self._notes, []
            warnings, self._warnings = self._warnings, []
        for text in notes:
            self._say(text)
        for text in warnings:
            self._warn(text)
        return reading

    def figures(self) -> Figures:
        """Figures of the whole training up to the last reading."""
        with self._lock:
            if self._is_lost:
                return self._before + Figures(seconds=time.perf_counter() - self._started)
            return self._before + self._figures

    def _start(self, stop: threading.Event) -> threading.Thread | None:
        thread = threading.Thread(target=self._watch, args=(stop,), name="monitor", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            self._lose(str(error))
            return None
        return thread

    def _watch(self, stop: threading.Event) -> None:
        try:
            source = self._opening()
            try:
                self._read_until(stop, source)
            finally:
                with suppress(Exception):
                    source.close()
        except Exception as error:  # whatever it is, the run goes on
            self._lose(str(error) or type(error).__name__)

    def _read_until(self, stop: threading.Event, source: Source) -> None:
        """Read at every interval and once at the end, so that even the shortest training has one reading."""
        before, at = source.read(), time.perf_counter()
        while True:
            stopping = stop.wait(self._interval)
            reading, now = source.read(), time.perf_counter()
            figures = Figures.between(before, reading, now - at)
            with self._lock:
                self._figures += figures
                self._latest = reading
                if source.notes:
                    self._notes.append(f"{reading.device} figures that are not known: {', '.join(source.notes)}")
                    source.notes.clear()
                self._look_for_trouble(reading)
            if stopping:
                return
            before, at = reading, now

    def _look_for_trouble(self, reading: Reading) -> None:
        if reading.throttled and "throttled" not in self._warned:
            self._warned.add("throttled")
            reasons = ", ".join(reading.throttled)
            self._warnings.append(f"the GPU is throttled ({reasons}): it is slower than it can be")
        if reading.other_processes and "shared" not in self._warned:
            self._warned.add("shared")
            others = f"{reading.other_processes} other process{'es' if reading.other_processes > 1 else ''}"
            self._warnings.append(f"{others} on this GPU: what is measured now is not this program's alone")

    def _lose(self, why: str) -> None:
        with self._lock:
            self._is_lost = True
            self._notes.append(f"the device is not watched ({why})")

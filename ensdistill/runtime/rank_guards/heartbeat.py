"""Signs of life of the processes (ranks) of a run: one that is stopped or lost is named, and then the others end.

A thread of each process counts up in a store every few seconds and reads what the others count. Whoever works for
hours or waits for another still counts; a process that was stopped (SIGSTOP), or whose machine is lost, does not.
Neither does one that hangs between two training steps (`Steps`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ensdistill.runtime.rank_guards import Store

MAX_SILENCE = 90.0
"""Seconds without a sign of life after which a run ends by default; torchrun may take 30 more to end it."""
_TIMES = 10
"""A step that takes so many times the longest before it is given up as one that never ends."""
_BEAT = 5.0
"""Seconds between two signs of life, at most."""
_SILENCE = 5.0
"""Seconds that torchrun has to end a process whose error another one has said."""
_PATIENCE = 2.0
"""Seconds that leaving waits for a store that does not answer."""


class Steps:
    """Tells whether the thread that trains goes on: what is expected of it between two steps, and nowhere else.

    Preparing data, compiling, validating and saving may take hours; so may the first step of an epoch, and waiting for
    another process or the device.
    """

    def __init__(self) -> None:
        self._longest = 0.0
        """Seconds that this process worked at most without a sign, in steps that came to an end."""
        self._since: float | None = None
        """Time of the latest sign; None while there is nothing to measure."""
        self._num_done = 0

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Within, expect steps: from the second on, when it is known how long one takes."""
        self._num_done = 0
        try:
            yield
        finally:
            self._since = None

    def done(self) -> None:
        """Note that a step is done, and that another is to come."""
        self._measure()
        self._since = time.monotonic()
        self._num_done += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, expect nothing: this process waits for another, or does what may take its time."""
        self._measure()
        before, self._since = self._since, None
        try:
            yield
        finally:
            self._since = None if before is None else time.monotonic()

    def go_on(self, interval: float) -> bool:
        """Tell whether the next step may still come: up to `interval` seconds, or `_TIMES` times the longest."""
        since = self._since
        if since is None or self._num_done < 2:
            return True
        return time.monotonic() - since <= max(interval, _TIMES * self._longest)

    def _measure(self) -> None:
        if self._since is not None:
            self._longest = max(self._longest, time.monotonic() - self._since)


steps = Steps()
"""The steps of this process."""


class Heartbeat:
    """The signs of life of this process, and an eye on those of the others.

    Args:
        store: a connection of its own, for a call that waits keeps other threads from calling. It need not answer.
        rank: number of this process.
        size: number of processes.
        max_silence: seconds without a sign of life from another after which `end` is called; it is named half-way.
        keeper: the rank that keeps the store; None where torchrun does.
        say: shows one line.
        end: ends this process, with one line to say; None where another process says it.
        steps: of this process, which counts on only while they go on.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        max_silence: float,
        keeper: int | None,
        say: Callable[[str], None],
        end: Callable[[str | None], None],
        steps: Steps = steps,
    ) -> None:
        self._store, self._rank, self._size, self._max_silence = store, rank, size, max_silence
        self._say, self._end, self._steps = say, end, steps
        self._interval = min(_BEAT, max_silence / 10)
        self._keys = [f"beats/{r}" for r in range(size)]
        self._others = {r: _Silence() for r in range(size) if r != rank}
        self._keeper, self._store_silence = keeper, _Silence()
        self._exchanges = 0
        self._leaving = threading.Event()
        # Two threads: a store that does not answer holds the first for ever.
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch_store)]

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat and watch within."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._leaving.set()
            for thread in self._threads:
                thread.join(_PATIENCE)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store's: it is gone, which the other thread notices
            self._store.set(f"places/{self._rank}", f"pid {os.getpid()} on {socket.gethostname()}")
            for key in self._keys:
                self._store.add(key, 0)  # reading waits for a key that is not there
            while True:
                self._store.add(self._keys[self._rank], int(self._steps.go_on(self._interval)))
                counts = self._store.multi_get(self._keys)
                self._exchanges += 1
                self._judge(counts)
                if self._leaving.wait(self._interval):
                    return

    def _judge(self, counts: list[bytes]) -> None:
        """Name the others that have not counted on, and end the run if one has not for too long."""
        for r, silence in self._others.items():
            silence.look(counts[r], 2 * self._interval)
        for r, silence in self._others.items():
            has_begun = counts[r] != b"0"
            if silence.seconds == 0 and silence.is_named:
                silence.is_named = False
                self._speak(r, f"process {r} of {self._size} is back")
            elif silence.seconds >= self._first_limit and not silence.is_named:
                silence.is_named = True
                what = f"has given no sign of life for {silence.seconds:.0f} s" if has_begun else "has not started yet"
                self._speak(r, f"warning: {self._name(r, has_begun)} {what}" + (self._threat if has_begun else ""))
            elif silence.seconds >= self._limit and has_begun:
                self._give_up(r, self._name(r, has_begun), silence.seconds)

    def _watch_store(self) -> None:
        silence = self._store_silence
        keeper = "torchrun" if self._keeper is None else f"process {self._keeper} of {self._size}"
        subject = f"{keeper}, which keeps the processes' store,"
        while not self._leaving.wait(self._interval):
            silence.look(self._exchanges, 2 * self._interval)
            if silence.seconds >= self._first_limit and not silence.is_named:
                silence.is_named = True
                self._speak(self._keeper, f"warning: {subject} is silent for {silence.seconds:.0f} s{self._threat}")
            elif silence.seconds >= self._limit:
                self._give_up(self._keeper, subject, silence.seconds)

    @property
    def _limit(self) -> float:
        """Seconds of seen silence that are `max_silence` at most: two intervals may pass before it is seen."""
        return self._max_silence - 2 * self._interval

    @property
    def _first_limit(self) -> float:
        return self._limit - self._max_silence / 2

    @property
    def _threat(self) -> str:
        return f"; the run ends after {self._max_silence:.0f} s (--max-silence)"

    def _speaks(self, about: int | None) -> bool:
        """Tell whether this is the first of those that are not silent and can speak of the process `about`."""
        silent = {r for r, silence in self._others.items() if silence.seconds >= self._first_limit}
        return self._rank == min(set(range(self._size)) - silent - {about}, default=self._rank)

    def _speak(self, about: int | None, line: str) -> None:
        if self._speaks(about):
            self._say(line)

    def _name(self, r: int, has_begun: bool) -> str:
        place = f" ({self._store.get(f'places/{r}').decode()})" if has_begun else ""
        return f"process {r} of {self._size}{place}"

    def _give_up(self, about: int | None, who: str, seconds: float) -> None:
        line = (
            f"error: {who} has given no sign of life for {seconds:.0f} s: it was stopped, hangs, has ended, or its "
            f"machine is lost; the run ends (--max-silence {self._max_silence:g}): go on with --resume"
        )
        self._end(line if self._speaks(about) else None)
        self._leaving.set()


class _Silence:
    """Seconds for which a sign has stood still, of those in which another could have been seen.

    Between two looks at most `longest` seconds count: whoever was stopped itself did not look meanwhile.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.is_named = False
        self._sign: object = None
        self._time = time.monotonic()

    def look(self, sign: object, longest: float) -> None:
        now = time.monotonic()
        self.seconds = 0.0 if sign != self._sign else self.seconds + min(now - self._time, longest)
        self._sign, self._time = sign, now


def say(line: str) -> None:
    """Print a line to stderr, past whatever lock another thread holds."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def end_process(line: str | None) -> None:
    """End this process at once, with exit code 1, and leave its files as a killed one does: whole or absent.

    The main thread waits in a call that nothing can end. Without a line another process says it, and has time for it.
    """
    if line is None:
        time.sleep(_SILENCE)
    else:
        say(line)
    os._exit(1)

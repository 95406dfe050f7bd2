"""Ctrl-C and SIGTERM: the run ends between two steps, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):  # as KeyboardInterrupt: whoever catches every Exception must not catch it
    """Raised where the run was asked to end, by the signal `signal_number`; a command exits with 128 + it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Stop:
    """Turns the two signals into `Stopped`: at once, or, inside `deferred`, where `check` is called.

    A second signal inside `deferred` does not wait: whoever presses Ctrl-C twice means it.
    """

    def __init__(self) -> None:
        self._requested: int | None = None
        self._deferred = False

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Handle SIGINT and SIGTERM within; the handlers from before come back after."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal waits for `check`. It may stand within another."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @property
    def requested(self) -> bool:
        """True where a signal waits."""
        return self._requested is not None

    def check(self) -> None:
        """Raise `Stopped` if a signal waits."""
        if self._requested is not None:
            raise Stopped(self._requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or self._requested is not None:
            raise Stopped(number)
        self._requested = number

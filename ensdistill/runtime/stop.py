"""Ctrl-C and SIGTERM: the run ends between two steps, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AGAIN = 0.1
"""Seconds after which a signal is sent again whose exception was swallowed."""


class Stopped(BaseException):  # as KeyboardInterrupt: whoever catches every Exception must not catch it
    """Raised where the run was asked to end, by the signal `signal_number`; a command exits with 128 + it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Stop:
    """Turns the two signals into `Stopped`: at once, or, inside `deferred`, where `check` is called.

    A second signal inside `deferred` does not wait: whoever presses Ctrl-C twice means it.

    Python ignores an exception in a finaliser, or in a function that a compiler calls back, wherever a signal may come.
    Such a signal is remembered and sent again; one whose `Stopped` others have caught still waits for `check`.
    """

    def __init__(self) -> None:
        self._requested: int | None = None
        self._deferred = False
        self._again: threading.Timer | None = None

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Handle SIGINT and SIGTERM within; the handlers from before come back after."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        report = sys.unraisablehook

        def ignored(what: Any) -> None:
            if isinstance(what.exc_value, Stopped):
                self._send_again(what.exc_value.signal_number)
            else:
                report(what)

        sys.unraisablehook = ignored
        try:
            yield self
        finally:
            sys.unraisablehook = report
            if self._again is not None:
                self._again.cancel()
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
        is_second = self._requested is not None and self._again is None
        if self._again is not None:
            self._again.cancel()
        self._requested, self._again = number, None
        if is_second or not self._deferred:
            raise Stopped(number)

    def _send_again(self, number: int) -> None:
        main = threading.main_thread().ident
        assert main is not None
        self._again = threading.Timer(_AGAIN, signal.pthread_kill, (main, number))
        self._again.daemon = True
        self._again.start()

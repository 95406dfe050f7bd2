"""Ctrl-C and SIGTERM: the run ends between two steps, with a checkpoint; whatever else runs ends at once.

An exception that a signal raises may fall where it is swallowed: into an import that tries something and goes on
without it, a finaliser, a function that a compiler calls back. So a command that is still being loaded, and has nothing
to lose, is killed by Ctrl-C, and what finalisers ignored is sent again.
"""

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


def killed_while_loading() -> None:
    """Let Ctrl-C kill this process until `raising_again`; where something else was arranged for it, that stays."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _loading.append(True)


@contextmanager
def raising_again() -> Iterator[None]:
    """Have Ctrl-C raise `KeyboardInterrupt` within, and once more where that was ignored."""
    if _loading and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _loading.clear()
    report = sys.unraisablehook

    def ignored(what: Any) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):
            _send_again(signal.SIGINT)
        else:
            report(what)

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = report


_loading: list[bool] = []
"""Holds True from `killed_while_loading` on."""


def _send_again(number: int) -> threading.Timer:
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(_AGAIN, signal.pthread_kill, (main, number))
    timer.daemon = True
    timer.start()
    return timer


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
                self._again = _send_again(what.exc_value.signal_number)
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

"""Ctrl-C and SIGTERM, now or at the next safe point."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensdistill.runtime.errors import run_main
from ensdistill.runtime.stop import Stop, Stopped, _send_again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_once_outside_of_steps(number):
    with pytest.raises(Stopped) as stopped, Stop().installed():
        os.kill(os.getpid(), number)
    assert stopped.value.signal_number == number and number.name in str(stopped.value)


def test_deferred_waits_for_check_and_a_second_signal_does_not_wait():
    with Stop().installed() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            with pytest.raises(Stopped):
                stop.check()
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGTERM)
        stop2 = Stop()
        stop2.check()


def test_the_end_of_an_inner_deferral_is_not_that_of_the_outer():
    with Stop().installed() as stop:
        with stop.deferred():
            with stop.deferred():
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        with pytest.raises(Stopped):
            stop.check()


def test_handlers_from_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop().installed():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_python_ignores_comes_again():
    """As one that comes while a compiler calls back, or in a finaliser."""

    class Signalled:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # the handler runs here

    with pytest.raises(Stopped), Stop().installed():
        signalled = Signalled()
        del signalled
        time.sleep(5)
    with Stop().installed() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        stop._again = _send_again(signal.SIGTERM)  # as if it had been raised and ignored before
        time.sleep(0.3)
        assert stop.requested  # and is no second one


def test_a_signal_that_others_have_caught_waits_for_check():
    with Stop().installed() as stop:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.check()


INTERRUPTED = """
import os, signal, sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ensdistill.config.configs":
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            except BaseException:  # as some that try an import and go on without it
                pass

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def heard() -> Iterator[None]:
    """Have SIGINT do what it does in a terminal, here and in processes from here: in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_a_command_that_is_being_loaded_is_killed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-m", "ensdistill.fast_train", "--help"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGINT and done.stdout == done.stderr == b""


@pytest.mark.usefixtures("heard")
def test_an_import_of_the_package_leaves_signals_as_they_are() -> None:
    code = "import signal, ensdistill; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.usefixtures("heard")
def test_an_interrupt_that_a_finaliser_ignored_comes_again() -> None:
    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def main() -> None:
        Finalised()
        time.sleep(20)

    start = time.perf_counter()
    assert run_main(main) == 130
    assert time.perf_counter() - start < 10

"""Ctrl-C and SIGTERM, now or at the next safe point."""

from __future__ import annotations

import os
import signal

import pytest

from ensdistill.runtime.stop import Stop, Stopped


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

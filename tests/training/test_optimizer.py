"""The learning rate at the corners of its schedule."""

from __future__ import annotations

import math

import pytest

from ensdistill.training.optimizer import Schedule


def test_linear_then_cosine():
    schedule = Schedule(peak=0.4, warmup_steps=4, total_steps=12)
    assert [schedule(step) for step in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert schedule(8) == pytest.approx(0.2)
    assert schedule(10) == pytest.approx(0.4 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert schedule(12) == pytest.approx(0) and schedule(13) == pytest.approx(0)


def test_without_warm_up_it_starts_at_the_peak():
    assert Schedule(peak=0.1, warmup_steps=0, total_steps=5)(0) == 0.1

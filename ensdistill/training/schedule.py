"""The learning rate: linear from 0 over the warm-up, then one cosine to 0, a value a step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`schedule(step)` is the learning rate of the update at `step`, the first being 0."""

    peak: float
    """Learning rate at the end of the warm-up."""
    warmup_steps: int
    """Steps from 0 to the peak."""
    total_steps: int
    """Steps after which the rate is 0."""

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

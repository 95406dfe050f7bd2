"""Numbers that a network's own modules draw (dropout, drop-path): functions of (seed, step, row) as all others are.

Modules ask the generators of PyTorch, NumPy and Python, which remember how often they were asked. Set anew before every
step, they give what they gave there before: in a second run, and after a resume in the middle of an epoch. A loop of
somebody else's goes on with what it had (`kept_generators`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ensdistill.kernels.philox import STREAM_MODULES, philox


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Give the generators of PyTorch on the CPU and `device`, of NumPy and of Python their states of before back."""
    numpys, pythons = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        np.random.set_state(numpys)
        random.setstate(pythons)


def seed_modules(seed: int, step: int, first_row: int, device: torch.device) -> None:
    """Set the generators that modules on `device` draw from.

    While a CUDA graph is captured nothing is set, for nothing may be: a replay draws from the seed that was set before
    it, as the step itself does.

    Args:
        first_row: the global row of the first image: each process draws numbers of its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    high, low, word, _ = philox(seed, first_row, step, STREAM_MODULES)
    torch.default_generator.manual_seed(high << 32 | low)
    if device.type == "cuda":
        torch.cuda.manual_seed(high << 32 | low)
    np.random.seed(word)
    random.seed(word)

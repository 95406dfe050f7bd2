"""Numbers that a network's own modules draw (dropout, drop-path): functions of (seed, step, row) as all others are.

Modules ask the generators of PyTorch, NumPy and Python, which remember how often they were asked. Set anew before every
step, they give what they gave there before: in a second run, and after a resume in the middle of an epoch.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from ensdistill.kernels.philox import STREAM_MODULES, philox


def seed_modules(seed: int, step: int, first_row: int, device: torch.device) -> None:
    """Set the generators that modules on `device` draw from. Not while a CUDA graph is captured.

    Args:
        first_row: the global row of the first image: each process draws numbers of its own.
    """
    high, low, word, _ = philox(seed, first_row, step, STREAM_MODULES)
    torch.default_generator.manual_seed(high << 32 | low)
    if device.type == "cuda":
        torch.cuda.manual_seed(high << 32 | low)
    np.random.seed(word)
    random.seed(word)

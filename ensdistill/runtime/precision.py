"""The type of a run's arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Convolutions and linear layers in bf16 where `precision` says so; everything else keeps its type."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

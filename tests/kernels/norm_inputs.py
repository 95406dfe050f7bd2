"""Random activations, vectors and sums for the tests of norms."""

from __future__ import annotations

import torch
from torch import Tensor


def activations(shape, dtype, device, seed=0, mean=0.3):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1.5 + mean).to(device, dtype)


def vectors(*shape, device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        x.to(device) for x in (torch.rand(shape, generator=generator) + 0.5, torch.randn(shape, generator=generator))
    ]


def sums_of(x: Tensor, y: Tensor, parts: int = 1) -> Tensor:
    """Σx and Σx·y (M, parts, 2, C), each in the type of its products."""
    parts_of = torch.stack((x, x * y), 1).flatten(2, -2).tensor_split(parts, dim=2)
    return torch.stack([part.sum(2) for part in parts_of], 1)

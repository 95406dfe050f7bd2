"""Shapes, random activations, vectors and sums for the tests of norms and pools."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

SHAPES = [
    (1, 1, 3, 5, 3),
    (3, 2, 7, 9, 20),
    (2, 3, 4, 4, 64),
    (2, 1, 3, 2, 160),  # five tiles of channels
    pytest.param((4, 128, 32, 32, 64), marks=pytest.mark.gpu),
    pytest.param((4, 127, 8, 8, 256), marks=pytest.mark.gpu),
]
POOL_SHAPES = [
    (1, 3, 1, 1, 3),
    (3, 2, 7, 9, 20),
    (2, 3, 8, 8, 64),
    (2, 1, 3, 5, 160),  # five tiles of channels
    (1, 3, 13, 17, 64),  # four tiles of pixels in the forward
    pytest.param((4, 128, 8, 8, 256), marks=pytest.mark.gpu),
    pytest.param((4, 127, 7, 7, 512), marks=pytest.mark.gpu),
]
TYPES = [torch.float32, torch.bfloat16]


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


def random(*shape, dtype=torch.float32, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1.5 + 0.3).to(device, dtype)


def affine(members, C, device):
    return random(members, C, device=device, seed=1), random(members, C, device=device, seed=2)

"""Random layers and networks for the tests of members' weights, and how they are judged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ensdistill.kernels.weights.layout import Layer, NormVectors
from ensdistill.kernels.weights.member_weights import WeightSlots

FLOOR = 1e-7
# CO, CI, k (0: linear), layout; which of f(actors), b(ias), n(orm), s(econd norm) there are
MIXED = [
    (20, 12, 3, "contiguous", "fn"),
    (33, 17, 3, "channels last", "fbs"),
    (70, 50, 3, "transposed", "f"),
    (32, 16, 1, "contiguous", "bns"),
    (32, 48, 3, "channels last", "f"),
    (5, 3, 5, "channels last", "fns"),
    (6, 4, 3, "odd", "f"),
    (10, 24, 0, "contiguous", "fb"),
]
PLAIN = [(16, 3, 3, "channels last", "n"), (32, 16, 3, "channels last", "ns"), (7, 32, 0, "contiguous", "b")]
NETWORKS = [
    (3, MIXED),
    (1, PLAIN),
    (2, PLAIN),  # no factors: all members are equal
    pytest.param(4, [(256, 256, 3, "channels last", "fn"), *MIXED], marks=pytest.mark.gpu),
]
IDS = ["mixed", "plain", "equal", "large"]
LAYER = Layer(torch.ones(6, 5, 3, 3), torch.ones(2, 5), torch.ones(2, 6), torch.ones(6))


def error(x: Tensor, truth: Tensor) -> float:
    """Measure the error's norm as a share of the true norm."""
    assert x.shape == truth.shape
    worst = ((x.detach().double() - truth).norm() / truth.norm()).item()
    return float("inf") if worst != worst else worst


def make_layer(E, CO, CI, k, layout, have, device="cpu") -> Layer:
    weight = torch.randn((CO, CI, k, k) if k else (CO, CI))
    if layout == "channels last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        axes = (2, 3, 1, 0)
        weight = weight.permute(axes).contiguous().permute(3, 2, 0, 1)
    elif layout == "odd":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)

    def norm() -> NormVectors:
        vectors = torch.randn(3, CO).to(device), (0.1 + torch.rand(CO)).to(device)
        return NormVectors(*vectors[0], vectors[1], 1e-3)

    rhos = [0.5 * torch.randn(E, C) if "f" in have else None for C in (CI, CO)]
    given = weight, *rhos, torch.randn(CO) if "b" in have else None
    given = [v if v is None else v.to(device) for v in given]
    return Layer(*given, norm() if "n" in have else None, norm() if "s" in have else None)


def make_network(E, shapes, device) -> list[Layer]:
    return [make_layer(E, *shape, device) for shape in shapes]


def double(layer: Layer) -> Layer:
    """Give the layer in float64."""

    def of(v):
        if isinstance(v, NormVectors):
            return NormVectors(*(x.double() for x in v[:4]), v.eps)
        return v if v is None else v.double()

    return Layer(*map(of, layer))


def results(slots: WeightSlots, i: int, members: slice) -> list[Tensor | None]:
    """Give w, bias, a and b of layer i."""
    second = slots.second[i] or (None, None)
    return [v if v is None else v[members] for v in (slots.weights[i], slots.bias[i], *second)]

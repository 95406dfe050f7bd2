"""Weights of all layers' members against float64 references, and those against batch-ensemble layers.

Relative errors (norms) in the interpreter: fp32 up to 8e-8, bf16 1.7e-3 (rounding), vectors up to 9e-8. The references
agree with s ∘ conv(W, r ∘ x) to 1e-15 in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from weights_inputs import FLOOR, IDS, LAYER, NETWORKS, double, error, make_layer, make_network, results

from ensdistill.kernels.weights.gradient import member_weights_gradient_ref
from ensdistill.kernels.weights.member_weights import (
    WeightSlots,
    member_weights,
    member_weights_by_layers,
    member_weights_ref,
)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@TYPES
@pytest.mark.parametrize("E, shapes", NETWORKS, ids=IDS)
def test_weights(E, shapes, dtype, device):
    network, tables = make_network(E, shapes, device), {}
    slots = WeightSlots(network, E + 2, dtype=dtype)
    for first in (0, 2, 1):  # with one table
        slots.flat.fill_(7.0), slots.vectors.fill_(7.0)
        member_weights(slots, [network], E=E, first=first, tables=tables)
    assert len(tables) == 1
    for i, layer in enumerate(network):
        w, bias, second = member_weights_ref(double(layer), E=E, dtype=torch.float64)
        own_w, own_bias, own_second = member_weights_ref(layer, E=E, dtype=dtype)
        found = results(slots, i, slice(1, E + 1))
        assert found[0].dtype == dtype and slots.weights[i].is_contiguous()
        for x, own, truth in zip(
            found, (own_w, own_bias, *(own_second or (None,) * 2)), (w, bias, *(second or (None,) * 2)), strict=True
        ):
            assert (x is None) == (truth is None)
            if x is not None:
                assert error(x, truth) <= 2 * error(own, truth) + FLOOR
        for outside in (0, -1):
            assert all((v == 7).all() for v in results(slots, i, slice(outside, outside + 1 or None)) if v is not None)


@pytest.mark.parametrize("layout", ["channels last", "transposed"])
def test_networks_with_parameters_of_their_own(layout, device):
    """Networks of one member each."""
    shapes = [(16, 3, 3, layout, "b"), (32, 16, 3, layout, "b"), (7, 32, 1, layout, "b")]
    networks = [make_network(1, shapes, device) for _ in range(3)]
    slots, expected = (WeightSlots(networks[0], 3, dtype=torch.bfloat16) for _ in range(2))
    member_weights(slots, networks, E=1)
    member_weights_by_layers(expected, networks, E=1)
    for i in range(len(shapes)):
        for x, y in zip(results(slots, i, slice(None)), results(expected, i, slice(None)), strict=True):
            assert x is y is None or torch.equal(x, y)


def test_replaced_parameters_are_seen(device):
    """A parameter that changes in place keeps its table; another tensor gets another."""
    (layer,), tables = make_network(2, [(16, 16, 1, "contiguous", "f")], device), {}
    slots = WeightSlots([layer], 2, dtype=torch.float32)
    kept = []
    for replaced in (False, False, True):
        layer = layer._replace(weight=layer.weight.clone()) if replaced else layer
        kept.append(layer)
        layer.weight.mul_(2)
        member_weights(slots, [[layer]], E=2, tables=tables)
        assert torch.equal(slots.weights[0], member_weights_ref(layer, E=2, dtype=torch.float32)[0])
    assert len(tables) == 2


def test_weights_that_lie_in_no_order_follow_their_parameter(device):
    (layer,), tables = make_network(2, [(6, 4, 3, "odd", "f")], device), {}
    slots = WeightSlots([layer], 2, dtype=torch.float32)
    for _ in range(2):
        layer.weight.add_(1)
        member_weights(slots, [[layer]], E=2, tables=tables)
        torch.testing.assert_close(slots.weights[0], member_weights_ref(layer, E=2, dtype=torch.float32)[0])


@pytest.mark.parametrize("k", [0, 3])
def test_reference_is_a_batch_ensemble_layer(k):
    """Through w and its gradient the same as through s ∘ (W * (r ∘ x) + b), to 1e-15 in float64."""
    layer = double(make_layer(3, 6, 5, k, "contiguous", "fb"))
    leaves = [v.requires_grad_() for v in layer[:4]]
    weight, rho_r, rho_s, bias = leaves
    x = torch.randn(3, 2, 5, 7, 4, dtype=torch.float64)[..., : None if k else 1, : None if k else 1]
    four = weight if k else weight[:, :, None, None]
    r, s = (1 + rho for rho in (rho_r, rho_s))
    y = torch.stack(
        [s[e, :, None, None] * F.conv2d(r[e, :, None, None] * x[e], four, bias, padding=k // 2) for e in range(3)]
    )
    dy = torch.randn_like(y)
    truth = torch.autograd.grad(y, leaves, dy)

    w, b, _ = member_weights_ref(layer, E=3, dtype=torch.float64)
    w, b = w.detach().requires_grad_(), b.detach()
    through = torch.stack([F.conv2d(x[e], w[e].permute(3, 2, 0, 1), b[e], padding=k // 2) for e in range(3)])
    assert error(through, y.detach()) < 1e-15
    (dw,) = torch.autograd.grad(through, w, dy)
    for gradient, t in zip(member_weights_gradient_ref(dw, dy.sum((1, 3, 4)), layer), truth, strict=True):
        assert error(gradient, t) < 1e-15


def test_reference_folds_norms():
    layer = double(make_layer(2, 6, 5, 3, "contiguous", "fbns"))
    x = torch.randn(2, 2, 5, 7, 4, dtype=torch.float64)
    w, bias, second = member_weights_ref(layer, E=2, dtype=torch.float64)
    for e in range(2):
        r, s = 1 + layer.rho_r[e, :, None, None], 1 + layer.rho_s[e, :, None, None]
        y = s * F.conv2d(r * x[e], layer.weight, layer.bias, padding=1)
        gamma, beta, mean, var, eps = layer.norm
        y = F.batch_norm(y, mean, var, gamma, beta, eps=eps)
        through = F.conv2d(x[e], w[e].permute(3, 2, 0, 1), bias[e], padding=1)
        assert error(through, y) < 1e-14
        gamma, beta, mean, var, eps = layer.second
        z = second[0][e, :, None, None] * y + second[1][e, :, None, None]
        assert error(z, F.batch_norm(y, mean, var, gamma, beta, eps=eps)) < 1e-14


@pytest.mark.parametrize(
    "given, message",
    [
        ({"dtype": torch.float64}, "out: expected bf16 or fp32"),
        ({"first": 1}, "first: expected"),
        ({"E": 3, "slots": 3}, r"rho_r: expected contiguous fp32 \(3, 5\)"),
    ],
)
def test_errors(given, message):
    given = {"dtype": torch.float32, "first": 0, "E": 2, "slots": 2} | given
    out = WeightSlots([LAYER], given["slots"], dtype=given["dtype"])
    with pytest.raises(ValueError, match=message):
        member_weights(out, [[LAYER]], E=given["E"], first=given["first"])

"""Gradients of all layers' parameters against float64 references.

Relative errors (norms) in the interpreter: 3e-8 to 2.2e-7, as the references' in fp32.
"""

from __future__ import annotations

import pytest
import torch
from weights_inputs import FLOOR, IDS, LAYER, NETWORKS, double, error, make_network

from ensdistill.kernels.weights.gradient import (
    GradientParts,
    member_weights_gradient,
    member_weights_gradient_by_layers,
    member_weights_gradient_ref,
)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


@pytest.mark.parametrize("E, shapes", NETWORKS, ids=IDS)
def test_gradients(E, shapes, device):
    network, tables = make_network(E, shapes, device), {}
    splits = [1 + 3 * i % 8 for i in range(len(network))]
    parts = GradientParts(network, E, splits, dtype=torch.float32)
    assert parts.flat.isnan().all()
    for v in (*parts.weights, *parts.bias):
        if v is not None:
            v.normal_()
    found = member_weights_gradient(parts, [network], E=E, tables=tables)
    again = member_weights_gradient(parts, [network], E=E, tables=tables)
    for i, (layer, of_layer) in enumerate(zip(network, found, strict=True)):
        dw, db = parts.weights[i], parts.bias[i]
        own = member_weights_gradient_ref(dw.sum(0), db, layer)
        truth = member_weights_gradient_ref(dw.double().sum(0), db if db is None else db.double(), double(layer))
        for v, x, reference, t, same in zip(layer[:4], of_layer, own, truth, again[i], strict=True):
            assert (x is None) == (t is None) == (v is None)
            if x is not None:
                assert x.dtype == torch.float32 and x.shape == v.shape and torch.equal(x, same)
                assert error(x, t) <= 2 * error(reference, t) + FLOOR
        assert of_layer.weight.stride() == layer.weight.stride() or shapes[i][3] == "odd"


@pytest.mark.parametrize("layout", ["channels last", "transposed"])
def test_networks_with_parameters_of_their_own(layout, device):
    """One member each; the gradients are stacks."""
    shapes = [(16, 3, 3, layout, "b"), (32, 16, 3, layout, "b"), (7, 32, 1, layout, "b")]
    networks = [make_network(1, shapes, device) for _ in range(3)]
    parts = GradientParts(networks[0], 3, [2, 1, 3], dtype=torch.float32)
    parts.flat.normal_()
    found = member_weights_gradient(parts, networks, E=1)
    by_layers = member_weights_gradient_by_layers(parts, networks, E=1)
    for i in range(len(shapes)):
        assert found[i].weight[0].stride() == networks[0][i].weight.stride()
        for x, y in zip(found[i], by_layers[i], strict=True):
            assert x is y is None or error(x, y.double()) < 3e-7


@pytest.mark.parametrize(
    "M, dtype, message",
    [(2, torch.float64, "parts: expected fp32"), (3, torch.float32, "E: expected 3 members of 1 networks")],
)
def test_errors(M, dtype, message):
    with pytest.raises(ValueError, match=message):
        member_weights_gradient(GradientParts([LAYER], M, [2], dtype=dtype), [[LAYER]], E=2)

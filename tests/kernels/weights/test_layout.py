"""Layers that the kernels can read, and tables that find them."""

from __future__ import annotations

import pytest
import torch
from weights_inputs import LAYER, MIXED, PLAIN, make_network

from ensdistill.kernels.launch import recording
from ensdistill.kernels.weights.gradient import GradientParts, member_weights_gradient
from ensdistill.kernels.weights.layout import CHANNELS_LAST, CO_FASTEST, TAPS_INNER, NormVectors, check_layers
from ensdistill.kernels.weights.member_weights import WeightSlots, member_weights

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def test_one_launch_for_all_layers():
    """Two for the gradients; layers whose weights lie in several orders make more."""
    launched: list[str] = []
    for shapes, orders in (
        (PLAIN, 1),
        ([(4, 8, 3, "contiguous", "f"), (4, 8, 1, "channels last", "f")], 1),
        (MIXED, 3),
    ):
        network = make_network(2, shapes, "cpu")
        parts = GradientParts(network, 2, [3] * len(network), dtype=torch.float32)
        with recording(lambda kernel, *_: launched.append(kernel.fn.__name__)):
            member_weights(WeightSlots(network, 2, dtype=torch.float32), [network], E=2)
            member_weights_gradient(parts, [network], E=2)
        expected = ["member_weights_kernel"] * orders + ["member_weights_gradient_kernel"] * orders
        assert launched == [*expected, "vector_gradients_kernel"]
        launched.clear()


def test_heavy_programs_come_first(device):
    network = make_network(2, [(64, 16, 3, "channels last", "f")] * 3, device)
    parts = GradientParts(network, 2, [2, 9, 4], dtype=torch.float32)
    tables: dict = {}
    member_weights_gradient(parts, [network], E=2, tables=tables)
    (own,) = tables.values()
    (programs,) = own.weights.programs.values()
    assert [*dict.fromkeys(programs[:, 0].tolist())] == [1, 2, 0]
    assert {CHANNELS_LAST, TAPS_INNER, CO_FASTEST} >= own.weights.programs.keys() == {CHANNELS_LAST}


def by_weights(layer):
    member_weights(WeightSlots([LAYER], 2, dtype=torch.float32), [[layer]], E=2)


def by_gradient(layer):
    member_weights_gradient(GradientParts([LAYER], 2, [2], dtype=torch.float32), [[layer]], E=2)


@pytest.mark.parametrize("both", [by_weights, by_gradient])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": LAYER.weight.double()}, "weight: expected fp32"),
        ({"weight": LAYER.weight[..., :2]}, "networks: expected layers of"),
        ({"weight": LAYER.weight[:5]}, "networks: expected layers of"),
        ({"rho_r": LAYER.rho_s}, r"rho_r: expected contiguous fp32 \(2, 5\)"),
        ({"rho_s": LAYER.rho_r}, r"rho_s: expected contiguous fp32 \(2, 6\)"),
        ({"rho_r": None}, "rho_r, rho_s: expected both or neither"),
        ({"bias": LAYER.bias.double()}, r"bias: expected contiguous fp32 \(6,\)"),
        ({"norm": NormVectors(*[LAYER.bias] * 3, torch.ones(5), 0.0)}, "norm's var: expected contiguous fp32"),
    ],
)
def test_errors_of_layers(both, change, message):
    with pytest.raises(ValueError, match=message):
        both(LAYER._replace(**change))


def test_layers_of_no_members_are_refused():
    with pytest.raises(ValueError, match="weight: expected at least one member and one element"):
        check_layers([[LAYER._replace(rho_r=None, rho_s=None)]], 0)

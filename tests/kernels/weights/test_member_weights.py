"""Weights of all layers' members and the gradients of their parameters against float64 references.

Relative errors (norms) in the interpreter: weights fp32 up to 8e-8, bf16 1.7e-3 (rounding), vectors up to 9e-8;
gradients 3e-8 to 2.2e-7, as the references' in fp32. The references agree with s ∘ conv(W, r ∘ x) to 1e-15 in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ensdistill.kernels.weights import gradient as gradients
from ensdistill.kernels.weights import member_weights as weights
from ensdistill.kernels.weights.gradient import (
    GradientParts,
    member_weights_gradient,
    member_weights_gradient_by_layers,
    member_weights_gradient_ref,
)
from ensdistill.kernels.weights.layout import CHANNELS_LAST, CO_FASTEST, TAPS_INNER, Layer, NormVectors
from ensdistill.kernels.weights.member_weights import (
    WeightSlots,
    member_weights,
    member_weights_by_layers,
    member_weights_ref,
)

FLOOR = 1e-7
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
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


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def error(x: Tensor, truth: Tensor) -> float:
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
    def of(v):
        if isinstance(v, NormVectors):
            return NormVectors(*(x.double() for x in v[:4]), v.eps)
        return v if v is None else v.double()

    return Layer(*map(of, layer))


def results(slots: WeightSlots, i: int, members: slice) -> list[Tensor | None]:
    """w, bias, a and b of layer i."""
    second = slots.second[i] or (None, None)
    return [v if v is None else v[members] for v in (slots.weights[i], slots.bias[i], *second)]


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
    slots = WeightSlots(networks[0], 3, dtype=torch.bfloat16)
    member_weights(slots, networks, E=1)
    parts = GradientParts(networks[0], 3, [2, 1, 3], dtype=torch.float32)
    parts.flat.normal_()
    found = member_weights_gradient(parts, networks, E=1)
    by_layers = member_weights_gradient_by_layers(parts, networks, E=1)
    expected = WeightSlots(networks[0], 3, dtype=torch.bfloat16)
    member_weights_by_layers(expected, networks, E=1)
    for i in range(len(shapes)):
        for x, y in zip(results(slots, i, slice(None)), results(expected, i, slice(None)), strict=True):
            assert x is y is None or torch.equal(x, y)
        assert found[i].weight[0].stride() == networks[0][i].weight.stride()
        for x, y in zip(found[i], by_layers[i], strict=True):
            assert x is y is None or error(x, y.double()) < 3e-7


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


def test_one_launch_for_all_layers(monkeypatch):
    """Two for the gradients; layers whose weights lie in several orders make more."""
    launched = []
    for module in (weights, gradients):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **options: launched.append(kernel.fn.__name__))
    for shapes, orders in (
        (PLAIN, 1),
        ([(4, 8, 3, "contiguous", "f"), (4, 8, 1, "channels last", "f")], 1),
        (MIXED, 3),
    ):
        network = make_network(2, shapes, "cpu")
        member_weights(WeightSlots(network, 2, dtype=torch.float32), [network], E=2)
        parts = GradientParts(network, 2, [3] * len(network), dtype=torch.float32)
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


LAYER = Layer(torch.ones(6, 5, 3, 3), torch.ones(2, 5), torch.ones(2, 6), torch.ones(6))


def run(layer: Layer = LAYER, *, slots: int = 2, E: int = 2, first: int = 0, dtype=torch.float32) -> None:
    member_weights(WeightSlots([LAYER], slots, dtype=dtype), [[layer]], E=E, first=first)


def run_gradient(layer: Layer = LAYER, *, M: int = 2, E: int = 2, dtype=torch.float32) -> None:
    member_weights_gradient(GradientParts([LAYER], M, [2], dtype=dtype), [[layer]], E=E)


@pytest.mark.parametrize("both", [run, run_gradient])
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


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: run(dtype=torch.float64), "out: expected bf16 or fp32"),
        (lambda: run(first=1), "first: expected"),
        (lambda: run(E=3, slots=3), r"rho_r: expected contiguous fp32 \(3, 5\)"),
        (lambda: run_gradient(dtype=torch.float64), "parts: expected fp32"),
        (lambda: run_gradient(M=3), "E: expected 3 members of 1 networks"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""`member_weights` and its gradient against their float64 references, those against a BatchEnsemble layer's autograd.

Relative errors (norms) in the interpreter: weights fp32 up to 4e-8, bf16 1.7e-3 (rounding); gradients 4e-8 to 1.4e-7,
as the references' in fp32. The reference agrees with s ∘ conv(W, r ∘ x) to 1e-15 in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ensdistill.kernels.member_weights import (
    member_weights,
    member_weights_gradient,
    member_weights_gradient_ref,
    member_weights_into,
    member_weights_ref,
)

OPS = torch.ops.ensdistill
FLOOR = 1e-7
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LAYERS = [  # E, CO, CI, k (0: linear), layout
    (3, 20, 12, 3, "contiguous"),
    (2, 33, 17, 3, "channels last"),
    (2, 70, 50, 3, "transposed"),
    (1, 24, 40, 1, "contiguous"),
    (4, 10, 24, 0, "contiguous"),
    (2, 10, 24, 0, "transposed"),
    (2, 5, 3, 5, "channels last"),
    pytest.param((4, 256, 256, 3, "channels last"), marks=pytest.mark.gpu),
    pytest.param((4, 256, 128, 3, "contiguous"), marks=pytest.mark.gpu),
]


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


def operands(layer, factors, device) -> list[Tensor | None]:
    """W in the layer's layout, r and s as far as `factors` has them."""
    E, CO, CI, k, layout = layer
    generator = torch.Generator().manual_seed(CO)
    shape = (CO, CI, k, k) if k else (CO, CI)
    weight = torch.randn(shape, generator=generator)
    if layout == "channels last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    r, s = (1 + 0.5 * torch.randn(E, C, generator=generator) for C in (CI, CO))
    given = (weight, r if "r" in factors else None, s if "s" in factors else None)
    return [t if t is None else t.to(device) for t in given]


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


@TYPES
@pytest.mark.parametrize("factors", ["", "r", "s", "rs"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_weights(layer, factors, dtype, device):
    given, E = operands(layer, factors, device), layer[0]
    out = member_weights(*given, E=E, dtype=dtype)
    truth = member_weights_ref(*double(given), E=E, dtype=torch.float64)
    assert out.dtype == dtype and out.is_contiguous()
    assert error(out, truth) <= 2 * error(member_weights_ref(*given, E=E, dtype=dtype), truth) + FLOOR
    larger = torch.full((E + 2, *out.shape[1:]), 7.0, dtype=dtype, device=device)
    member_weights_into(larger[1:-1], *given)
    assert torch.equal(larger[1:-1], out) and (larger[0] == 7).all() and (larger[-1] == 7).all()


@pytest.mark.parametrize("factors", ["", "r", "s", "rs"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gradient(layer, factors, device):
    given = operands(layer, factors, device)
    dw = torch.randn(member_weights(*given, E=layer[0], dtype=torch.float32).shape).to(device)
    out = member_weights_gradient(dw, *given)
    own = member_weights_gradient_ref(dw, *given)
    truth = member_weights_gradient_ref(dw.double(), *double(given))
    for x, reference, t in zip(out, own, truth, strict=True):
        assert (x is None) == (t is None)
        if x is not None:
            assert x.dtype == torch.float32 and error(x, t) <= 2 * error(reference, t) + FLOOR
    if layer[4] != "transposed":
        assert out[0].stride() == given[0].stride()
    assert all(x is y or torch.equal(x, y) for x, y in zip(out, member_weights_gradient(dw, *given), strict=True))


@TYPES
def test_autograd(dtype, device):
    leaves = [t.requires_grad_() for t in operands((3, 20, 12, 3, "channels last"), "rs", device)]
    out = member_weights(*leaves, dtype=dtype)
    dw = torch.randn(out.shape).to(device, dtype)
    truth = member_weights_gradient_ref(dw.double(), *(t.detach().double() for t in leaves))
    for gradient, t in zip(torch.autograd.grad(out, leaves, dw), truth, strict=True):
        assert error(gradient, t) < 3e-7
    member_weights(leaves[0], E=2, dtype=dtype).sum().backward()
    assert (leaves[0].grad == 2).all()


@pytest.mark.parametrize("k", [0, 3])
def test_reference_is_a_batch_ensemble_layer(k):
    """Through w and its gradient the same as through s ∘ (W * (r ∘ x)), to 1e-15 in float64."""
    weight, r, s = (t.double().requires_grad_() for t in operands((3, 6, 5, k, "contiguous"), "rs", "cpu"))
    x = torch.randn(3, 2, 5, 7, 4, dtype=torch.float64)[..., : None if k else 1, : None if k else 1]
    four = weight if k else weight[:, :, None, None]
    y = torch.stack(
        [s[e, :, None, None] * F.conv2d(r[e, :, None, None] * x[e], four, padding=k // 2) for e in range(3)]
    )
    dy = torch.randn_like(y)
    truth = torch.autograd.grad(y, (weight, r, s), dy)

    w = member_weights_ref(weight, r, s, dtype=torch.float64).detach().requires_grad_()
    through = torch.stack([F.conv2d(x[e], w[e].permute(3, 2, 0, 1), padding=k // 2) for e in range(3)])
    assert error(through, y.detach()) < 1e-15
    (dw,) = torch.autograd.grad(through, w, dy)
    for gradient, t in zip(member_weights_gradient_ref(dw, weight, r, s), truth, strict=True):
        assert error(gradient, t) < 1e-15


@pytest.mark.parametrize("factors", ["rs", ""])
def test_registration(factors, device):
    given = operands((2, 6, 5, 3, "channels last"), factors, device)
    out = torch.zeros(2, 3, 3, 5, 6, device=device)
    leaves = [t if t is None else t.requires_grad_() for t in given]
    torch.library.opcheck(OPS.member_weights.default, (*leaves, 2, torch.bfloat16))
    plain = [t if t is None else t.detach() for t in leaves]
    torch.library.opcheck(OPS.member_weights_gradient.default, (torch.randn_like(out), *plain))
    torch.library.opcheck(OPS.member_weights_into.default, (out, *plain))


W, R, S = torch.ones(6, 5, 3, 3), torch.ones(2, 5), torch.ones(2, 6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: member_weights(W, dtype=torch.float32), "E: expected given once"),
        (lambda: member_weights(W, R, S, E=3, dtype=torch.float32), "E: expected given once"),
        (lambda: member_weights(W, R, S, dtype=torch.float64), "dtype: expected bf16 or fp32"),
        (lambda: member_weights(W.double(), R, S, dtype=torch.float32), "weight: expected fp32"),
        (lambda: member_weights(W[..., :2], R, S, dtype=torch.float32), "weight: expected fp32"),
        (lambda: member_weights(W, S, R, dtype=torch.float32), r"r: expected contiguous fp32 \(2, 5\)"),
        (lambda: member_weights(W, R, R, dtype=torch.float32), r"s: expected contiguous fp32 \(2, 6\)"),
        (lambda: member_weights_into(torch.ones(2, 3, 3, 6, 5), W, R, S), "out: expected contiguous"),
        (lambda: member_weights_into(torch.ones(2, 3, 3, 5, 6, dtype=torch.half), W, R, S), "out: expected bf16"),
        (
            lambda: member_weights_gradient(torch.ones(2, 3, 3, 5, 6).bfloat16(), W, R, S),
            "dw: expected contiguous fp32",
        ),
        (lambda: member_weights_gradient(torch.ones(3, 3, 3, 5, 6), W, R, S), "r: expected contiguous fp32"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""BatchNorm's kernels against their references in float64, and the whole of it against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, doubled, error
from norm_inputs import activations, sums_of, vectors
from torch.nn import functional as F

from ensdistill.kernels.epilogue import unpack_bits_ref
from ensdistill.kernels.norm.apply import batch_norm_apply, batch_norm_apply_ref
from ensdistill.kernels.norm.gradient import (
    batch_norm_coefficients,
    batch_norm_coefficients_ref,
    batch_norm_input_gradient,
    batch_norm_input_gradient_ref,
)
from ensdistill.kernels.norm.statistics import BatchStatistics, batch_norm_statistics, batch_norm_statistics_ref

OPS = torch.ops.ensdistill
SHAPES = [
    (1, 1, 3, 5, 3),
    (3, 2, 7, 9, 20),
    (2, 3, 4, 4, 64),
    (2, 1, 3, 2, 160),  # five tiles of channels
    pytest.param((4, 128, 32, 32, 64), marks=pytest.mark.gpu),
    pytest.param((4, 127, 8, 8, 256), marks=pytest.mark.gpu),
]
TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Fills `torch.empty` with NaN, so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


# Measured: at most 5.2e-8, equal to the reference, which rounds once to fp32.
@pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
@pytest.mark.parametrize(("M", "T", "C"), [(1, 1, 3), (3, 5, 20), (2, 70, 64), (1, 4099, 256)])
def test_statistics(M, T, C, groups, device):
    per_member = groups != "shared"
    G = M if per_member else 1
    x = activations((M, 4 * T, C), torch.float32, device)
    sums = sums_of(x, x, T)
    gamma, beta = vectors(*((M, C) if groups == "own_gamma" else (C,)), device=device)
    running = [v.view((M, C) if per_member else (C,)) for v in vectors(G, C, device=device, seed=2)]
    old = [v.clone() for v in running]
    arguments = {"count": 4 * T, "per_member": per_member, "eps": 1e-3}
    result = batch_norm_statistics(
        sums, gamma, beta, running_mean=running[0], running_var=running[1], momentum=0.3, **arguments
    )
    ref = batch_norm_statistics_ref(sums, gamma, beta, **arguments)
    truth_running = [v.double() for v in old]
    truth = batch_norm_statistics_ref(
        *doubled(sums, gamma, beta),
        running_mean=truth_running[0],
        running_var=truth_running[1],
        momentum=0.3,
        **arguments,
    )
    for name in BatchStatistics._fields:
        assert getattr(result, name).shape == (G, C)
        agrees(getattr(result, name), getattr(ref, name), getattr(truth, name), 1e-7)
    for new, wanted in zip(running, truth_running, strict=True):
        assert error(new, wanted) < 2e-7
    without = batch_norm_statistics(sums, gamma, beta, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(result, without, strict=True))
    # the definition itself, from the values: the variance is the biased one
    x_GNC = x.double().reshape(G, -1, C)
    assert error(result.mean, x_GNC.mean(1)) < 2e-6
    assert error(result.rstd, (x_GNC.var(1, correction=0) + 1e-3).rsqrt()) < 2e-6
    wanted = old[1].double() + 0.3 * (x_GNC.var(1, correction=0).view_as(old[1]) - old[1])
    assert error(running[1], wanted) < 2e-6
    batch_norm_statistics(
        sums, gamma, beta, running_mean=running[0].zero_(), running_var=running[1].zero_(), unbiased=True, **arguments
    )
    assert error(running[1], 0.1 * x_GNC.var(1, correction=1).view_as(running[1])) < 2e-6


def test_variance_where_the_mean_is_a_hundred_standard_deviations(device):
    """E[x²] − mean² loses what the fp32 parts lost: measured 1.5e-3 of the variance with one part, 1.8e-4 with 64.

    With the second stage in fp32 it was 2.2e-3 and 2.8e-3.
    """
    x = activations((2, 8192, 20), torch.float32, device, mean=150.0)
    gamma, beta = vectors(20, device=device)
    truth = x.double().flatten(0, 1).var(0, correction=0)

    def lost(parts: int) -> float:
        rstd = batch_norm_statistics(sums_of(x, x, parts), gamma, beta, count=8192, eps=1e-12).rstd
        return error(rstd[0].double() ** -2, truth)

    assert lost(64) < 5e-4
    assert lost(1) < 4e-3


def test_variance_is_never_negative(device):
    x = torch.full((1, 333, 8), 1234.567, device=device)
    statistics = batch_norm_statistics(sums_of(x, x), *vectors(8, device=device), count=333)
    assert (statistics.rstd <= 1e-5**-0.5 * 1.0001).all() and statistics.rstd.isfinite().all()
    sums = torch.tensor([3.0, 8.9]).view(1, 1, 2, 1).to(device)  # 8.9 / 1 − 3² < 0
    assert batch_norm_statistics(sums, *vectors(1, device=device), count=1).rstd.item() == pytest.approx(1e-5**-0.5)


# Measured: fp32 3.8e-8 to 1.0e-7, bf16 1.8e-3 to 3.2e-3, both equal to the reference.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("per_member", "relu", "residual", "bits"),
    [(False, True, None, 0), (True, True, "same", 1), (True, False, "float32", 0), (False, True, "same", "all")],
)
def test_apply(shape, dtype, per_member, relu, residual, bits, device):
    M, C = shape[0], shape[-1]
    x = activations(shape, dtype, device)
    scale, shift = vectors(M if per_member else 1, C, device=device)
    other = None if residual is None else activations(shape, dtype if residual == "same" else torch.float32, device, 3)
    bits = M if bits == "all" else bits
    z, packed = batch_norm_apply(x, scale, shift, relu=relu, residual=other, bits=bits)
    ref, _ = batch_norm_apply_ref(x, scale, shift, relu=relu, residual=other)
    x_64, scale_64, shift_64, other_64 = doubled(x, scale, shift, other)
    truth, _ = batch_norm_apply_ref(x_64, scale_64, shift_64, relu=relu, residual=other_64)
    agrees(z, ref, truth, 1e-7)
    if bits:
        assert packed.shape == (bits, *shape[1:-1], -(-C // 8))
        assert torch.equal(unpack_bits_ref(packed, C), z[:bits] > 0)
        assert torch.equal(
            unpack_bits_ref(packed, 8 * packed.shape[-1])[..., C:].any(), torch.tensor(False, device=device)
        )
    else:
        assert packed is None


def test_apply_passes_nan_on(device):
    x = activations((1, 2, 5, 16), torch.float32, device)
    x[0, 1, 2, 3] = float("nan")
    z, _ = batch_norm_apply(x, *vectors(1, 16, device=device))
    assert torch.equal(z.isnan(), x.isnan())


# Measured: at most 7.1e-8, the reference 5.4e-8.
@pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
@pytest.mark.parametrize(("M", "T", "C"), [(1, 1, 3), (3, 5, 20), (2, 70, 64)])
def test_coefficients(M, T, C, groups, device):
    per_member = groups != "shared"
    du, x = (activations((M, 4 * T, C), torch.float32, device, seed) for seed in (4, 5))
    gamma, beta = vectors(*((M, C) if groups == "own_gamma" else (C,)), device=device)
    arguments = {"count": 4 * T, "per_member": per_member}
    statistics = batch_norm_statistics_ref(sums_of(x, x), gamma, beta, **arguments)
    sums = sums_of(du, x, T)
    result = batch_norm_coefficients(sums, statistics, gamma, **arguments)
    ref = batch_norm_coefficients_ref(sums, statistics, gamma, **arguments)
    statistics_64 = BatchStatistics(*(v.double() for v in statistics))
    truth = batch_norm_coefficients_ref(sums.double(), statistics_64, gamma.double(), **arguments)
    assert result[0].shape == result[1].shape == gamma.shape
    for i in range(2):
        agrees(result[i], ref[i], truth[i], 2e-7)
    for i in range(3):
        agrees(result[2][:, i], ref[2][:, i], truth[2][:, i], 2e-7)


# Measured: fp32 4.4e-8 to 8.5e-8, bf16 1.4e-3 to 2.9e-3, both equal to the reference.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("per_member", "residual"), [(False, True), (True, False)])
def test_input_gradient(shape, dtype, per_member, residual, device):
    du, x, other = (activations(shape, dtype, device, seed) for seed in (6, 7, 8))
    coefficients = torch.stack(
        [vectors(shape[0] if per_member else 1, shape[-1], device=device, seed=s)[1] for s in (1, 2, 3)], 1
    )
    other = other if residual else None
    dx = batch_norm_input_gradient(du, x, coefficients, residual=other)
    ref = batch_norm_input_gradient_ref(du, x, coefficients, residual=other)
    du_64, x_64, coefficients_64, other_64 = doubled(du, x, coefficients, other)
    agrees(dx, ref, batch_norm_input_gradient_ref(du_64, x_64, coefficients_64, residual=other_64), 1e-7)


def by_pytorch(x, gamma, beta, residual, dz, per_member):
    """z and the gradients of x, γ, β and the residual by autograd through F.batch_norm, in the type of `x`.

    γ and β: (C,), or (M, C) where every member has its own.
    """
    leaves = [v.detach().clone().requires_grad_() for v in (x, gamma, beta, residual)]
    x, gamma, beta, residual = leaves
    M, C = x.shape[0], x.shape[-1]
    groups = x.reshape(M if per_member else 1, -1, C)
    gammas, betas = (v.expand(len(groups), C) for v in (gamma, beta))
    rows = zip(groups, gammas, betas, strict=True)
    normed = [F.batch_norm(own, None, None, *affine, training=True) for own, *affine in rows]
    z = (torch.stack(normed).view_as(x) + residual).relu()
    return (z.detach(), *torch.autograd.grad(z, leaves, dz))


# Measured: at most 2.4e-7 and 1.4 times the error of PyTorch in fp32, which has up to 4.0e-7.
@pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_composed_with_autograd_it_is_pytorch_s_batch_norm(shape, groups, device):
    per_member = groups != "shared"
    x, residual, dz = (activations(shape, torch.float32, device, seed) for seed in (9, 10, 11))
    gamma, beta = vectors(*((shape[0], shape[-1]) if groups == "own_gamma" else shape[-1:]), device=device)
    truth = by_pytorch(*doubled(x, gamma, beta, residual, dz), per_member)
    ref = by_pytorch(x, gamma, beta, residual, dz, per_member)
    leaves = [v.clone().requires_grad_() for v in (x, gamma, beta, residual)]
    running = [torch.zeros((shape[0], shape[-1]) if per_member else shape[-1:], device=device) for _ in "mv"]
    sums = sums_of(leaves[0], leaves[0], 3)
    statistics = batch_norm_statistics(
        sums,
        *leaves[1:3],
        count=x[0, ..., 0].numel(),
        per_member=per_member,
        running_mean=running[0],
        running_var=running[1],
    )
    z, _ = batch_norm_apply(leaves[0], statistics.scale, statistics.shift, residual=leaves[3])
    result = (z.detach(), *torch.autograd.grad(z, leaves, dz))
    for a, b, c in zip(result, ref, truth, strict=True):
        agrees(a, b, c, 1e-6)
    assert (
        error(running[0].view_as(statistics.mean), 0.1 * statistics.mean.detach()) < 1e-6
    )  # gradients change nothing here


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_backward_by_hand_is_pytorch_s_batch_norm(shape, groups, dtype, device):
    """Floors as measured: fp32 4e-7; bf16 stores z and du, 2⁻⁸ of the largest value, as PyTorch's does."""
    per_member = groups != "shared"
    x, residual, dz = (activations(shape, dtype, device, seed) for seed in (9, 10, 11))
    gamma, beta = vectors(*((shape[0], shape[-1]) if groups == "own_gamma" else shape[-1:]), device=device)
    truth = by_pytorch(*doubled(x, gamma, beta, residual, dz), per_member)
    arguments = {"count": x[0, ..., 0].numel(), "per_member": per_member}
    statistics = batch_norm_statistics(sums_of(x.float(), x.float(), 2), gamma, beta, **arguments)
    z, packed = batch_norm_apply(x, statistics.scale, statistics.shift, residual=residual, bits=len(x))
    du = dz * unpack_bits_ref(packed, shape[-1])
    sums = sums_of(du.float(), x.float(), 2)
    dgamma, dbeta, coefficients = batch_norm_coefficients(sums, statistics, gamma, **arguments)
    dx = batch_norm_input_gradient(du, x, coefficients)
    for a, c in zip((z, dx, dgamma, dbeta, du), truth, strict=True):
        assert error(a, c) < (2e-6 if dtype == torch.float32 else 2**-8)


def test_statistics_themselves_are_differentiable(device):
    """The gradient through mean and rstd, which the composition above does not read."""
    gamma, beta = vectors(5, device=device)
    x = activations((2, 31, 5), torch.float32, device)
    sums = sums_of(x, x, 2)
    weights = [activations((1, 5), torch.float32, device, seed) for seed in range(20, 24)]

    def gradients(statistics, weights, leaves):
        return torch.autograd.grad(sum((v * w).sum() for v, w in zip(statistics, weights, strict=True)), leaves)

    leaves = [v.clone().requires_grad_() for v in (sums, gamma, beta)]
    result = gradients(batch_norm_statistics(*leaves, count=31), weights, leaves)
    leaves_64 = [v.double().requires_grad_() for v in (sums, gamma, beta)]
    truth = gradients(batch_norm_statistics_ref(*leaves_64, count=31), doubled(*weights), leaves_64)
    for a, b in zip(result, truth, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_of_apply(dtype, device):
    shape = (2, 3, 7, 9, 20)
    x, residual, dz = (activations(shape, dtype, device, seed) for seed in (12, 13, 14))
    for members, relu in ((1, True), (2, True), (2, False)):
        scale, shift = vectors(members, 20, device=device)
        leaves = [v.clone().requires_grad_() for v in (x, scale, shift, residual)]
        z, _ = batch_norm_apply(*leaves[:3], relu=relu, residual=leaves[3], bits=1 if relu else 0)
        result = torch.autograd.grad(z, leaves, dz)
        grads = []
        for kind in (torch.float32, torch.float64):
            wide = [v.detach().to(torch.float64 if kind == torch.float64 else v.dtype).requires_grad_() for v in leaves]
            z, _ = batch_norm_apply_ref(*wide[:3], relu=relu, residual=wide[3])
            grads.append(torch.autograd.grad(z, wide, dz.to(z.dtype)))
        for a, b, c in zip(result, *grads, strict=True):
            assert a.dtype == b.dtype
            agrees(a, b, c, 2e-7)


@pytest.mark.gpu
def test_past_two_to_the_31_values(device):
    shape = (5, 128, 64, 64, 1024)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
    assert x.numel() > 2**31
    scale, shift = vectors(1, 1024, device=device)
    z, packed = batch_norm_apply(x, scale, shift, bits=5)
    ref, _ = batch_norm_apply_ref(x[-1:, -1:], scale, shift)
    assert error(z[-1:, -1:], ref.double()) < 2**-8
    assert torch.equal(unpack_bits_ref(packed[-1, -1], 1024), z[-1, -1] > 0)


def test_opcheck(device):
    x = activations((2, 3, 3, 2, 20), torch.float32, device)
    gamma, beta = vectors(20, device=device)
    sums = sums_of(x, x, 2)
    leaves = [v.clone().requires_grad_() for v in (sums, gamma, beta)]
    torch.library.opcheck(OPS.batch_norm_statistics.default, (*leaves, 18, False, 1e-5))
    running = (torch.zeros(20, device=device), torch.ones(20, device=device))
    torch.library.opcheck(
        OPS.batch_norm_statistics_.default, (sums, gamma, beta, 18, False, 1e-5, *running, 0.1, True, None)
    )
    scale, shift = (v.requires_grad_() for v in vectors(2, 20, device=device))
    x_leaf, residual = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.library.opcheck(OPS.batch_norm_apply.default, (x_leaf, scale, shift, True, residual, 1))
    torch.library.opcheck(OPS.batch_norm_apply.default, (x, scale.detach(), shift.detach(), False, None, 0))
    statistics = batch_norm_statistics(sums, gamma, beta, count=18)
    coefficients = (sums, statistics.mean, statistics.rstd, gamma, 18, False)
    torch.library.opcheck(OPS.batch_norm_coefficients.default, coefficients)
    own = [v.requires_grad_() for v in vectors(2, 20, device=device)]
    torch.library.opcheck(OPS.batch_norm_statistics.default, (leaves[0], *own, 9, True, 1e-5))
    running = (torch.zeros(2, 20, device=device), torch.ones(2, 20, device=device))
    arguments = (sums, *(v.detach() for v in own), 9, True, 1e-5, *running, 0.1, False, None)
    torch.library.opcheck(OPS.batch_norm_statistics_.default, arguments)
    statistics = batch_norm_statistics(sums, *(v.detach() for v in own), count=9, per_member=True)
    coefficients = (sums, statistics.mean, statistics.rstd, own[0].detach(), 9, True)
    torch.library.opcheck(OPS.batch_norm_coefficients.default, coefficients)
    c_G3C = torch.rand(2, 3, 20, device=device)
    torch.library.opcheck(OPS.batch_norm_input_gradient.default, (x, x, c_G3C, x))


def test_bad_arguments():
    x, sums = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 2, 5)
    gamma, beta, scale = torch.rand(5), torch.rand(5), torch.rand(1, 5)
    statistics = BatchStatistics(*torch.rand(4, 1, 5).unbind())

    def bad(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    bad(
        "sums_MT2C: expected contiguous float32 partial sums",
        batch_norm_statistics,
        sums[:, :, :1],
        gamma,
        beta,
        count=3,
    )
    bad(
        "sums_MT2C: expected contiguous float32 partial sums",
        batch_norm_statistics,
        sums.double(),
        gamma,
        beta,
        count=3,
    )
    bad("sums_MT2C: expected at least one partial sum", batch_norm_statistics, sums[:, :0], gamma, beta, count=3)
    bad("count: expected a positive number", batch_norm_statistics, sums, gamma, beta, count=0)
    bad(r"gamma: expected contiguous float32 \(5,\), got", batch_norm_statistics, sums, torch.rand(2, 5), beta, count=3)
    bad("beta: expected contiguous float32", batch_norm_statistics, sums, gamma, beta.bfloat16(), count=3)
    bad(
        "beta: expected the shape of gamma",
        *(batch_norm_statistics, sums, torch.rand(2, 5), beta),
        count=3,
        per_member=True,
    )
    bad("both or neither", batch_norm_statistics, sums, gamma, beta, count=3, running_mean=beta)
    running = {"running_mean": torch.rand(2, 5), "running_var": beta}
    bad(
        r"running_mean: expected contiguous float32 \(5,\)",
        batch_norm_statistics,
        sums,
        gamma,
        beta,
        count=3,
        **running,
    )

    bad("x: expected a contiguous float32 or bfloat16", batch_norm_apply, x.double(), scale, scale)
    bad("x: expected a contiguous", batch_norm_apply, x.transpose(1, 2), scale, scale)
    bad(r"scale: expected contiguous float32 \(1, 5\) or \(2, 5\)", batch_norm_apply, x, gamma, scale)
    bad("shift: expected the shape of scale", batch_norm_apply, x, scale, torch.rand(2, 5))
    bad(r"residual: expected .* \(2, 3, 4, 5\)", batch_norm_apply, x, scale, scale, residual=x[:1])
    bad("bits: expected 0 without ReLU", batch_norm_apply, x, scale, scale, relu=False, bits=1)
    bad("bits: expected .* at most the members", batch_norm_apply, x, scale, scale, bits=3)

    bad("sums_MT2C: expected", batch_norm_coefficients, sums[0], statistics, gamma, count=3)
    bad("gamma: expected contiguous float32", batch_norm_coefficients, sums, statistics, torch.rand(4), count=3)
    bad(
        r"statistics.mean: expected contiguous float32 \(2, 5\)",
        *(batch_norm_coefficients, sums, statistics, gamma),
        count=3,
        per_member=True,
    )
    coefficients = torch.rand(1, 3, 5)
    bad("du: expected a contiguous", batch_norm_input_gradient, x.half(), x, coefficients)
    bad(r"x: expected .* \(2, 3, 4, 5\)", batch_norm_input_gradient, x, x[:1], coefficients)
    bad("coefficients_G3C: expected contiguous", batch_norm_input_gradient, x, x, coefficients[:, :2])
    bad("residual: expected", batch_norm_input_gradient, x, x, coefficients, residual=x[..., :3])

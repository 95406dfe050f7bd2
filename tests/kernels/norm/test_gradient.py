"""BatchNorm's backward against its reference in float64, and the whole norm against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, assert_launches_alike_on_meta, doubled, error
from norm_inputs import SHAPES, TYPES, activations, sums_of, vectors
from torch.nn import functional as F

from ensdistill.kernels.epilogue import unpack_bits_ref
from ensdistill.kernels.norm.apply import batch_norm_apply
from ensdistill.kernels.norm.gradient import (
    batch_norm_coefficients,
    batch_norm_coefficients_ref,
    batch_norm_input_gradient,
    batch_norm_input_gradient_ref,
)
from ensdistill.kernels.norm.statistics import BatchStatistics, batch_norm_statistics, batch_norm_statistics_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


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


@pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
def test_on_meta(groups, device):
    x = activations((2, 36, 20), torch.bfloat16, device)
    (gamma,) = vectors(*((2, 20) if groups == "own_gamma" else (20,)), device=device)[:1]
    mean, rstd = vectors(1 if groups == "shared" else 2, 20, device=device)
    statistics = BatchStatistics(mean, rstd, mean, rstd)
    options = {"count": 36, "per_member": groups != "shared"}
    sums = sums_of(x.float(), x.float(), 2)
    assert_launches_alike_on_meta(batch_norm_coefficients, sums, statistics, gamma, **options)
    coefficients = activations((len(mean), 3, 20), torch.float32, device)
    assert_launches_alike_on_meta(batch_norm_input_gradient, x, x.float(), coefficients, residual=x)


def test_bad_arguments():
    x, sums, gamma = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 2, 5), torch.rand(5)
    statistics = BatchStatistics(*torch.rand(4, 1, 5).unbind())

    def bad(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

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

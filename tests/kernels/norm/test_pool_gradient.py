"""The gradient of global pooling against its reference in float64, and that of the pool by autograd."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, assert_launches_alike_on_meta, doubled, error
from norm_inputs import POOL_SHAPES, TYPES, affine, random

from ensdistill.kernels.epilogue import pack_bits_ref
from ensdistill.kernels.norm.channels import over_pixels
from ensdistill.kernels.norm.pool import global_pool_ref
from ensdistill.kernels.norm.pool_gradient import global_pool_gradient, global_pool_gradient_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def away_from_zero(x, a, b):
    """`x` with a·x + b not so near 0 that its sign is a matter of rounding."""
    for _ in range(10):
        near = (over_pixels(a, x).double() * x + over_pixels(b, x)).abs() < 1e-3
        x = torch.where(near, x + 0.75, x)
    assert not near.any()
    return x


# Measured: dx in fp32 at most 9.3e-8, the reference 5.2e-8; in bf16 2.8e-3, equal to the reference; sums 3.2e-7 more
# than twice the error of the reference, which rounds as the kernel does but adds in another order.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", POOL_SHAPES)
@pytest.mark.parametrize(
    ("bits", "norm", "scale"),
    [
        (False, None, None),
        (True, None, "shared"),
        (False, "shared", None),
        (False, "per_member", "per_member"),
        (True, "shared", None),
        (True, "per_member", "shared"),
    ],
)
def test_gradient(shape, dtype, bits, norm, scale, device):
    M, B, H, W, C = shape
    df = random(M, B, C, dtype=dtype, device=device)
    x = random(*shape, dtype=dtype, device=device, seed=3)
    packed = pack_bits_ref(random(M + 1, *shape[1:], device=device, seed=4)) if bits else None  # of one member more
    if norm is not None:
        ab = affine(M if norm == "per_member" else 1, C, device)
        norm = (away_from_zero(x, *ab), *ab)
    scale = None if scale is None else random(M if scale == "per_member" else 1, C, device=device, seed=5)
    dx, sums = global_pool_gradient(df, size=(H, W), bits=packed, norm=norm, scale=scale, dtype=dtype)
    ref = global_pool_gradient_ref(df, size=(H, W), bits=packed, norm=norm, scale=scale, dtype=dtype)
    scale_64 = None if scale is None else scale.double()
    options = {
        "bits": packed,
        "norm": None if norm is None else doubled(*norm),
        "scale": scale_64,
        "dtype": torch.float64,
    }
    truth = global_pool_gradient_ref(df.double(), size=(H, W), **options)
    assert dx.shape == shape
    agrees(dx, ref[0], truth[0], 2e-7)
    assert (sums is None) == (norm is None)
    if sums is not None:
        assert sums.shape[0] == M and sums.shape[2:] == (2, C) and sums.dtype == torch.float32
        for i in range(2):
            agrees(sums.sum(1)[:, i], ref[1].sum(1)[:, i], truth[1].sum(1)[:, i], 1e-6)


# Measured: fp32 at most 6.3e-7, the reference 1.7e-7 (the sums over pixels); bf16 3.6e-3, equal to the reference.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("members", [None, 1, 3])
def test_it_is_autograd_s_gradient_of_the_pool(members, dtype, device):
    M, B, H, W, C = 3, 2, 7, 9, 20
    x, df = random(M, B, H, W, C, dtype=dtype, device=device), random(M, B, C, dtype=dtype, device=device, seed=6)
    leaves = [x] if members is None else [x, *affine(members, C, device)]

    def by_autograd(leaves, df):
        leaves = [v.clone().requires_grad_() for v in leaves]
        f = global_pool_ref(leaves[0], prologue=None if members is None else tuple(leaves[1:]))
        return torch.autograd.grad(f, leaves, df)

    norm, scale = (None, None) if members is None else (tuple(leaves), leaves[1])
    dx, sums = global_pool_gradient(df, size=(H, W), norm=norm, scale=scale, dtype=dtype)
    result = [dx]
    if sums is not None:
        db, da = sums.sum(1).unbind(1)
        result += [da.sum_to_size(members, C), db.sum_to_size(members, C)]
    for a, b, c in zip(result, by_autograd(leaves, df), by_autograd(doubled(*leaves), df.double()), strict=True):
        agrees(a, b, c, 5e-7)


@pytest.mark.parametrize("rows", [5, 1])
def test_the_scale_of_chosen_members(rows, device):
    M, B, H, W, C = 3, 2, 3, 5, 20
    df, scale = random(M, B, C, device=device), random(rows, C, device=device, seed=5)
    members = torch.tensor([4, 0, 4], device=device)
    dx, _ = global_pool_gradient(df, size=(H, W), scale=scale, members=members, dtype=torch.float32)
    scales = scale.double()[members if rows > 1 else [0] * M]
    truth, _ = global_pool_gradient_ref(df.double(), size=(H, W), scale=scales, dtype=torch.float64)
    ref, _ = global_pool_gradient_ref(df, size=(H, W), scale=scale, members=members, dtype=torch.float32)
    agrees(dx, ref, truth, 2e-7)


def test_sums_are_of_what_is_stored(device):
    """Rounded to the gradient's type, unless it is scaled on the way."""
    M, B, H, W, C = 2, 3, 4, 5, 24
    df, x = random(M, B, C, device=device), random(M, B, H, W, C, dtype=torch.bfloat16, device=device)
    norm = (x, *affine(1, C, device))
    dx, sums = global_pool_gradient(df, size=(H, W), norm=norm, dtype=torch.bfloat16)
    assert error(sums.sum(1)[:, 0], dx.double().sum((1, 2, 3))) < 1e-6
    one = torch.ones(1, C, device=device)
    _, sums = global_pool_gradient(df, size=(H, W), norm=norm, scale=one, dtype=torch.bfloat16)
    exact, _ = global_pool_gradient(df, size=(H, W), norm=norm, dtype=torch.float32)
    assert error(sums.sum(1)[:, 0], exact.double().sum((1, 2, 3))) < 1e-6


@pytest.mark.gpu
def test_past_two_to_the_31_values(device):
    df = random(5, 128, 1024, device=device)
    dx, _ = global_pool_gradient(df, size=(64, 64), dtype=torch.bfloat16)
    assert dx.numel() > 2**31
    assert error(dx[-1, -1, -1, -1], df[-1, -1].double() / 4096) < 2**-8


def test_on_meta(device):
    df, x, ab = random(2, 3, 20, device=device), random(2, 3, 3, 2, 20, device=device), affine(1, 20, device)
    norm = {"bits": pack_bits_ref(x), "norm": (x, *ab), "scale": ab[0]}
    assert_launches_alike_on_meta(global_pool_gradient, df, size=(3, 2), dtype=torch.bfloat16, **norm)
    assert_launches_alike_on_meta(global_pool_gradient, df, size=(3, 2), dtype=torch.float32)


def test_bad_arguments():
    x, df, a = torch.rand(2, 3, 4, 5, 6), torch.rand(2, 3, 6), torch.rand(1, 6)
    bits = torch.zeros(2, 3, 4, 5, 1, dtype=torch.uint8)

    def bad_gradient(message, df=df, size=(4, 5), dtype=torch.float32, **kwargs):
        with pytest.raises(ValueError, match=message):
            global_pool_gradient(df, size=size, dtype=dtype, **kwargs)

    bad_gradient("df_MBC: expected a contiguous", df=df.half())
    bad_gradient(r"df_MBC: expected \(M, B, C\)", df=df[0])
    bad_gradient("dtype: expected float32 or bfloat16", dtype=torch.float64)
    bad_gradient("size: expected positive", size=(0, 5))
    bad_gradient(r"bits: expected contiguous uint8 \(2, 3, 4, 5, 1\)", bits=bits[:1])
    bad_gradient("bits: expected contiguous uint8", bits=bits.int())
    bad_gradient(r"norm x: expected .* \(2, 3, 4, 5, 6\)", norm=(x[:1], a, a))
    bad_gradient("norm a: expected contiguous float32", norm=(x, a[0], a))
    bad_gradient("norm b: expected the shape of a", norm=(x, a, torch.rand(2, 6)))
    bad_gradient("scale: expected contiguous float32", scale=a.double())
    bad_gradient(r"members: expected contiguous int64 \(2,\), beside a scale", members=torch.tensor([0, 1]))
    bad_gradient(r"members: expected contiguous int64 \(2,\)", scale=torch.rand(5, 6), members=torch.tensor([0]))

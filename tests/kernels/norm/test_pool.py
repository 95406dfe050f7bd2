"""Global pooling and its gradient against their references in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ensdistill.kernels.epilogue import pack_bits_ref
from ensdistill.kernels.norm.channels import over_pixels
from ensdistill.kernels.norm.pool import global_pool, global_pool_ref
from ensdistill.kernels.norm.pool_gradient import global_pool_gradient, global_pool_gradient_ref

SHAPES = [
    (1, 3, 1, 1, 3),
    (3, 2, 7, 9, 20),
    (2, 3, 8, 8, 64),
    (2, 1, 3, 5, 160),  # five tiles of channels
    (1, 3, 13, 17, 64),  # four tiles of pixels in the forward
    pytest.param((4, 128, 8, 8, 256), marks=pytest.mark.gpu),
    pytest.param((4, 127, 7, 7, 512), marks=pytest.mark.gpu),
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


def error(x: Tensor, truth: Tensor) -> float:
    """The largest error, as a share of the largest value."""
    assert x.shape == truth.shape
    worst = ((x.double() - truth.double()).abs().max() / truth.double().abs().max()).item()
    return float("inf") if worst != worst else worst


def agrees(x: Tensor, ref: Tensor, truth: Tensor, floor: float) -> None:
    """At most twice the reference's error in the same type, plus `floor`."""
    assert x.dtype == ref.dtype and truth.dtype == torch.float64
    assert error(x, truth) <= 2 * error(ref, truth) + floor


def doubled(tensors):
    return None if tensors is None else tuple(x.double() for x in tensors)


def random(*shape, dtype=torch.float32, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1.5 + 0.3).to(device, dtype)


def affine(members, C, device):
    return random(members, C, device=device, seed=1), random(members, C, device=device, seed=2)


def away_from_zero(x, a, b):
    """`x` with a·x + b not so near 0 that its sign is a matter of rounding."""
    for _ in range(10):
        near = (over_pixels(a, x).double() * x + over_pixels(b, x)).abs() < 1e-3
        x = torch.where(near, x + 0.75, x)
    assert not near.any()
    return x


# Measured: fp32 at most 3.1e-7, the reference 1.6e-7; bf16 3.2e-3, equal to the reference.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prologue", [None, "shared", "per_member"])
def test_pool(shape, dtype, prologue, device):
    M, C = shape[0], shape[-1]
    x = random(*shape, dtype=dtype, device=device)
    ab = None if prologue is None else affine(M if prologue == "per_member" else 1, C, device)
    for out_dtype in {None, torch.float32}:
        f = global_pool(x, prologue=ab, out_dtype=out_dtype)
        ref = global_pool_ref(x, prologue=ab, out_dtype=out_dtype)
        truth = global_pool_ref(x.double(), prologue=doubled(ab))
        assert f.shape == (*shape[:2], C)
        agrees(f, ref, truth, 3e-7)


# Measured: dx in fp32 at most 9.3e-8, the reference 5.2e-8; in bf16 2.8e-3, equal to the reference; sums 3.2e-7 more
# than twice the error of the reference, which rounds as the kernel does but adds in another order.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
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
    options = {"bits": packed, "norm": doubled(norm), "scale": scale_64, "dtype": torch.float64}
    truth = global_pool_gradient_ref(df.double(), size=(H, W), **options)
    assert dx.shape == shape
    agrees(dx, ref[0], truth[0], 2e-7)
    assert (sums is None) == (norm is None)
    if sums is not None:
        assert sums.shape[0] == M and sums.shape[2:] == (2, C) and sums.dtype == torch.float32
        for i in range(2):
            agrees(sums.sum(1)[:, i], ref[1].sum(1)[:, i], truth[1].sum(1)[:, i], 1e-6)


def test_the_scale_of_chosen_members(device):
    M, B, H, W, C = 3, 2, 3, 5, 20
    df, scale = random(M, B, C, device=device), random(5, C, device=device, seed=5)
    members = torch.tensor([4, 0, 4], device=device)
    dx, _ = global_pool_gradient(df, size=(H, W), scale=scale, members=members, dtype=torch.float32)
    truth, _ = global_pool_gradient_ref(df.double(), size=(H, W), scale=scale.double()[members], dtype=torch.float64)
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


# Measured: fp32 at most 6.3e-7, the reference 1.7e-7 (the sums over pixels); bf16 3.6e-3, equal to the reference.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("members", [None, 1, 3])
def test_gradients_by_autograd(members, dtype, device):
    M, B, H, W, C = 3, 2, 7, 9, 20
    x, df = random(M, B, H, W, C, dtype=dtype, device=device), random(M, B, C, dtype=dtype, device=device, seed=6)
    leaves = [x] if members is None else [x, *affine(members, C, device)]

    def gradients(pool, leaves, df):
        leaves = [v.clone().requires_grad_() for v in leaves]
        f = pool(leaves[0], prologue=None if members is None else tuple(leaves[1:]))
        return torch.autograd.grad(f, leaves, df)

    result, ref = gradients(global_pool, leaves, df), gradients(global_pool_ref, leaves, df)
    truth = gradients(global_pool_ref, doubled(leaves), df.double())
    for a, b, c in zip(result, ref, truth, strict=True):
        assert a.dtype == b.dtype
        agrees(a, b, c, 5e-7)


def test_pool_passes_nan_on(device):
    x = random(1, 2, 3, 5, 16, device=device)
    x[0, 1, 2, 3, 4] = float("nan")
    f = global_pool(x, prologue=affine(1, 16, device))
    assert torch.equal(f.isnan(), x.isnan().any(2).any(2))


@pytest.mark.gpu
def test_past_two_to_the_31_values(device):
    shape = (5, 128, 64, 64, 1024)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
    assert x.numel() > 2**31
    f = global_pool(x, out_dtype=torch.float32)
    assert error(f[-1, -1], x[-1, -1].double().mean((0, 1))) < 1e-5
    dx, _ = global_pool_gradient(f, size=(64, 64), dtype=torch.bfloat16)
    assert error(dx[-1, -1, -1, -1], f[-1, -1].double() / 4096) < 2**-8


def test_opcheck(device):
    x = random(2, 3, 3, 2, 20, device=device)
    ops = torch.ops.ensdistill
    leaves = [v.clone().requires_grad_() for v in (x, *affine(2, 20, device))]
    torch.library.opcheck(ops.global_pool.default, (*leaves, torch.float32))
    torch.library.opcheck(ops.global_pool.default, (x, None, None, torch.bfloat16))
    df, bits, ab = random(2, 3, 20, device=device), pack_bits_ref(x), affine(1, 20, device)
    torch.library.opcheck(ops.global_pool_gradient.default, (df, 3, 2, bits, x, *ab, ab[0], None, torch.bfloat16))
    torch.library.opcheck(
        ops.global_pool_gradient.default, (df, 3, 2, None, None, None, None, None, None, torch.float32)
    )


def test_bad_arguments():
    x, df, a = torch.rand(2, 3, 4, 5, 6), torch.rand(2, 3, 6), torch.rand(1, 6)
    bits = torch.zeros(2, 3, 4, 5, 1, dtype=torch.uint8)

    def bad(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    def bad_gradient(message, df=df, size=(4, 5), dtype=torch.float32, **kwargs):
        bad(message, global_pool_gradient, df, size=size, dtype=dtype, **kwargs)

    bad("x_MBHWC: expected a contiguous", global_pool, x.double())
    bad(r"x_MBHWC: expected \(M, B, H, W, C\)", global_pool, x[0])
    bad("x_MBHWC: expected at least one pixel", global_pool, x[:, :, :0])
    bad("out_dtype: expected float32 or bfloat16", global_pool, x, out_dtype=torch.float16)
    bad(r"prologue a: expected contiguous float32 \(1, 6\) or \(2, 6\)", global_pool, x, prologue=(a[0], a))
    bad("prologue b: expected the shape of a", global_pool, x, prologue=(a, torch.rand(2, 6)))
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

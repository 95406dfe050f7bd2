"""Global pooling against its reference in float64."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, assert_launches_alike_on_meta, doubled, error
from norm_inputs import POOL_SHAPES, TYPES, affine, random

from ensdistill.kernels.norm.pool import global_pool, global_pool_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


# Measured: fp32 at most 3.1e-7, the reference 1.6e-7; bf16 3.2e-3, equal to the reference.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", POOL_SHAPES)
@pytest.mark.parametrize("prologue", [None, "shared", "per_member"])
def test_pool(shape, dtype, prologue, device):
    M, C = shape[0], shape[-1]
    x = random(*shape, dtype=dtype, device=device)
    ab = None if prologue is None else affine(M if prologue == "per_member" else 1, C, device)
    for out_dtype in {None, torch.float32}:
        f = global_pool(x, prologue=ab, out_dtype=out_dtype)
        ref = global_pool_ref(x, prologue=ab, out_dtype=out_dtype)
        truth = global_pool_ref(x.double(), prologue=None if ab is None else doubled(*ab))
        assert f.shape == (*shape[:2], C)
        agrees(f, ref, truth, 3e-7)


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


def test_on_meta(device):
    x = random(2, 3, 3, 2, 20, dtype=torch.bfloat16, device=device)
    assert_launches_alike_on_meta(global_pool, x)
    assert_launches_alike_on_meta(global_pool, x, prologue=affine(2, 20, device), out_dtype=torch.float32)


def test_bad_arguments():
    x, a = torch.rand(2, 3, 4, 5, 6), torch.rand(1, 6)

    def bad(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    bad("x_MBHWC: expected a contiguous", global_pool, x.double())
    bad(r"x_MBHWC: expected \(M, B, H, W, C\)", global_pool, x[0])
    bad("x_MBHWC: expected at least one pixel", global_pool, x[:, :, :0])
    bad("out_dtype: expected float32 or bfloat16", global_pool, x, out_dtype=torch.float16)
    bad(r"prologue a: expected contiguous float32 \(1, 6\) or \(2, 6\)", global_pool, x, prologue=(a[0], a))
    bad("prologue b: expected the shape of a", global_pool, x, prologue=(a, torch.rand(2, 6)))

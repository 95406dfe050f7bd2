"""Max-pooling against PyTorch's and its reference in float64: values, positions, ties, NaN."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_launches_alike_on_meta
from norm_inputs import TYPES, affine, random
from torch.nn import functional as F

from ensdistill.kernels.norm.max_pool import max_pool, max_pool_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
SHAPES = [
    (1, 1, 1, 1, 3),
    (3, 2, 7, 10, 20),
    (2, 1, 8, 5, 64),
    (2, 1, 3, 4, 160),  # five tiles of channels
    pytest.param((4, 128, 112, 112, 64), marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_pytorch_s(shape, dtype, device):
    """The same bits, and the same one of equals: half of the values are one of four."""
    x = random(*shape, dtype=dtype, device=device)
    x = torch.where(random(*shape, device=device, seed=1) > 0, x, x.round())
    y, positions = max_pool(x, positions=1)
    expected, index = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), 3, 2, padding=1, return_indices=True)
    assert torch.equal(y.flatten(0, 1), expected.permute(0, 2, 3, 1))
    OH, OW = y.shape[2:4]
    h, w = (2 * torch.arange(n, device=device) - 1 for n in (OH, OW))
    at = (h[:, None, None] + positions // 3) * shape[3] + w[:, None] + positions % 3
    assert torch.equal(at[0], index[: shape[1]].permute(0, 2, 3, 1))


# The kernel rounds what it compares, as the definition does: both choose the same bits but where a·x + b is rounded
# once (a fused product and sum) or twice, one step of the type apart.
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("members", [1, 3])
def test_behind_a_norm_and_a_relu(members, dtype, device):
    x, ab = random(3, 2, 7, 9, 20, dtype=dtype, device=device), affine(members, 20, device)
    y, positions = max_pool(x, prologue=ab, positions=3)
    ref, of_ref = max_pool_ref(x, prologue=ab, positions=3)
    truth, _ = max_pool_ref(x.double(), prologue=(ab[0].double(), ab[1].double()))
    step = 2**-8 if dtype == torch.bfloat16 else 2e-7
    assert ((y - truth).abs() <= step * truth.abs() + 1e-6).all() and y.dtype == dtype
    assert ((ref - truth).abs() <= step * truth.abs() + 1e-6).all()
    assert (y == 0).any() and (y > 0).any()
    same = positions == of_ref
    assert same.double().mean() > 0.99
    assert torch.equal(same | (y == ref), torch.ones_like(same))  # another one of what rounding made equal


def test_the_first_of_equals_and_the_last_nan(device):
    x = torch.zeros(1, 1, 4, 4, 8, device=device)
    x[0, 0, 2, 3] = 5.0
    x[0, 0, 3, 1] = 5.0
    x[..., 1] = float("-inf")
    x[0, 0, 0, 0, 2], x[0, 0, 1, 1, 2] = float("nan"), float("nan")
    y, positions = max_pool(x, positions=1)
    ref, of_ref = max_pool_ref(x, positions=1)
    assert torch.equal(y, ref) or torch.equal(y.isnan(), ref.isnan())
    assert torch.equal(positions, of_ref)
    # from the image's corner on, where two rows and columns of a window are left; (2, 3) comes before (3, 1)
    assert positions[0, 0, :, :, 0].tolist() == [[4, 3], [8, 5]]
    assert positions[0, 0, :, :, 1].tolist() == [[4, 3], [1, 0]]
    assert positions[0, 0, 0, 0, 2] == 8 and y[0, 0, 0, 0, 2].isnan()


def test_every_provider_agrees(device):
    x, ab = random(2, 2, 6, 7, 16, device=device), affine(1, 16, device)
    for one, other in zip(max_pool.kernel(x, positions=1), max_pool.library(x, positions=1), strict=True):
        assert torch.equal(one, other)
    y, kept = max_pool.library(x, prologue=ab)
    assert kept is None and max_pool(x, prologue=ab)[1] is None
    torch.testing.assert_close(max_pool(x, prologue=ab)[0], y)


def test_on_meta(device):
    x = random(2, 3, 3, 6, 20, dtype=torch.bfloat16, device=device)
    assert_launches_alike_on_meta(max_pool, x, positions=1)
    assert_launches_alike_on_meta(max_pool, x, prologue=affine(2, 20, device))
    assert_launches_alike_on_meta(max_pool.library, x, positions=2)


def test_bad_arguments():
    x, a = torch.rand(2, 3, 4, 5, 6), torch.rand(1, 6)

    def bad(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            max_pool(*args, **kwargs)

    bad("x_MBHWC: expected a contiguous", x.double())
    bad(r"x_MBHWC: expected \(M, B, H, W, C\)", x[0])
    bad("x_MBHWC: expected at least one element", x[:, :, :0])
    bad("positions: expected 0 to 2 members", x, positions=3)
    bad(r"prologue a: expected contiguous float32 \(1, 6\) or \(2, 6\)", x, prologue=(a[0], a))
    bad("prologue b: expected the shape of a", x, prologue=(a, torch.rand(2, 6)))

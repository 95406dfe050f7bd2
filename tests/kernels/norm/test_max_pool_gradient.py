"""The gradient of max-pooling against its reference in float64, and that of PyTorch's max-pool by autograd."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, assert_launches_alike_on_meta, doubled
from norm_inputs import TYPES, affine, random
from torch.nn import functional as F

from ensdistill.kernels.epilogue import pack_bits_ref
from ensdistill.kernels.norm.channels import over_pixels
from ensdistill.kernels.norm.max_pool import max_pool, max_pool_ref
from ensdistill.kernels.norm.max_pool_gradient import max_pool_gradient, max_pool_gradient_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
SHAPES = [
    (1, 1, 1, 1, 3),
    (3, 2, 7, 10, 20),
    (2, 1, 8, 5, 64),
    (2, 1, 3, 4, 160),  # five tiles of channels
    pytest.param((4, 128, 112, 112, 64), marks=pytest.mark.gpu),
]
NAMES = ("before", "bits", "norm", "scale", "after")


def given(names, shape, dtype, device, rows=1):
    """Random arguments for the named epilogues."""
    C = shape[-1]
    values = {
        "before": lambda: random(*shape, dtype=dtype, device=device, seed=3),
        "bits": lambda: pack_bits_ref(random(shape[0] + 1, *shape[1:], device=device, seed=4)),  # of one member more
        "norm": lambda: (random(*shape, dtype=dtype, device=device, seed=5), *affine(rows, C, device)),
        "scale": lambda: random(rows, C, device=device, seed=6),
        "after": lambda: random(*shape, dtype=dtype, device=device, seed=7),
    }
    return {name: values[name]() for name in names}


def in_double(options):
    return {
        name: tuple(doubled(*value)) if isinstance(value, tuple) else value if name == "bits" else value.double()
        for name, value in options.items()
    }


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_autograd_s_of_pytorch_s_pool(shape, dtype, device):
    x = random(*shape, dtype=dtype, device=device).round()  # full of equals
    y, positions = max_pool(x, positions=shape[0])
    dy = random(*y.shape, dtype=dtype, device=device, seed=2)

    def by_autograd(x, dy):
        leaf = x.flatten(0, 1).permute(0, 3, 1, 2).requires_grad_()
        pooled = F.max_pool2d(leaf, 3, 2, padding=1)
        (gradient,) = torch.autograd.grad(pooled, leaf, dy.flatten(0, 1).permute(0, 3, 1, 2))
        return gradient.permute(0, 2, 3, 1).reshape(x.shape)

    dx, sums = max_pool_gradient(dy, positions, size=shape[2:4])
    assert sums is None and dx.shape == shape
    agrees(dx, by_autograd(x, dy), by_autograd(x.double(), dy.double()), 1e-7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("names", "rows"),
    [(("bits",), 1), (("norm",), 1), (("before", "norm"), 0), (("bits", "scale", "after"), 0), (NAMES, 1)],
    ids=str,
)
def test_with_what_lies_before_the_pool(names, rows, shape, dtype, device):
    options = given(names, shape, dtype, device, rows or shape[0])
    _, positions = max_pool(random(*shape, dtype=dtype, device=device), positions=shape[0])
    dy = random(*positions.shape, dtype=dtype, device=device, seed=2)
    dx, sums = max_pool_gradient(dy, positions, size=shape[2:4], **options)
    ref, of_ref = max_pool_gradient_ref(dy, positions, size=shape[2:4], **options)
    truth, true_sums = max_pool_gradient_ref(dy.double(), positions, size=shape[2:4], **in_double(options))
    agrees(dx, ref, truth, 2e-7)
    assert (sums is None) == ("norm" not in names)
    if sums is not None:
        assert sums.shape[0] == shape[0] and sums.shape[2:] == (2, shape[-1]) and sums.dtype == torch.float32
        for i in range(2):
            agrees(sums.sum(1)[:, i], of_ref.sum(1)[:, i], true_sums.sum(1)[:, i], 1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_norm_a_relu_and_the_pool_by_autograd(dtype, device):
    """Forward and backward as training runs them: zeros of the ReLU, which tie, pass nothing on whoever wins."""
    M, B, H, W, C = 2, 2, 7, 9, 16
    x = random(M, B, H, W, C, dtype=dtype, device=device)
    a, b = affine(1, C, device)
    near = (over_pixels(a, x).double() * x + over_pixels(b, x)).abs() < 1e-2
    x = torch.where(near, x + 0.5, x)
    y, positions = max_pool(x, prologue=(a, b), positions=M)
    assert (y == 0).double().mean() > 0.02
    dy = random(*y.shape, dtype=dtype, device=device, seed=2)

    def by_autograd(x, a, b, dy):
        x = x.clone().requires_grad_()
        z = ((x if x.dtype == torch.float64 else x.float()) * over_pixels(a, x) + over_pixels(b, x)).relu()
        z = z if x.dtype == torch.float64 else z.to(x.dtype)
        return torch.autograd.grad(max_pool_ref(z)[0], x, dy)[0]

    dx, sums = max_pool_gradient(dy, positions, size=(H, W), norm=(x, a, b), scale=a)
    if dtype == torch.float32:
        agrees(dx, by_autograd(x, a, b, dy), by_autograd(*doubled(x, a, b, dy)), 2e-7)
    else:  # what rounding made equal has no truth in float64
        agrees(dx, by_autograd(x, a, b, dy), by_autograd(x, a, b, dy).double(), 2**-7)
    assert sums is not None and sums.isfinite().all()


def test_the_scale_of_chosen_members(device):
    shape, members = (3, 1, 5, 4, 20), torch.tensor([4, 0, 4], device=device)
    options = given(("bits", "scale", "after"), shape, torch.float32, device, rows=5)
    _, positions = max_pool(random(*shape, device=device), positions=3)
    dy = random(*positions.shape, device=device, seed=2)
    dx, _ = max_pool_gradient(dy, positions, size=(5, 4), members=members, **options)
    ref, _ = max_pool_gradient_ref(dy, positions, size=(5, 4), members=members, **options)
    options["scale"] = options["scale"][members]
    truth, _ = max_pool_gradient_ref(dy.double(), positions, size=(5, 4), **in_double(options))
    agrees(dx, ref, truth, 2e-7)


def test_every_provider_agrees(device):
    shape = (2, 1, 6, 7, 16)
    _, positions = max_pool(random(*shape, device=device), positions=2)
    dy, options = random(*positions.shape, device=device, seed=2), given(NAMES, shape, torch.float32, device)
    ours, of_ours = max_pool_gradient.kernel(dy, positions, size=(6, 7), **options)
    library, of_library = max_pool_gradient.library(dy, positions, size=(6, 7), **options)
    torch.testing.assert_close(ours, library)
    torch.testing.assert_close(of_ours.sum(1), of_library.sum(1), rtol=1e-5, atol=1e-5)


def test_on_meta(device):
    shape = (2, 1, 3, 6, 20)
    _, positions = max_pool(random(*shape, device=device), positions=2)
    dy = random(*positions.shape, device=device)
    assert_launches_alike_on_meta(max_pool_gradient, dy, positions, size=(3, 6))
    options = given(NAMES, shape, torch.float32, device)
    assert_launches_alike_on_meta(max_pool_gradient, dy, positions, size=(3, 6), **options)


def test_bad_arguments():
    dy, positions, a = torch.rand(2, 3, 2, 3, 6), torch.zeros(2, 3, 2, 3, 6, dtype=torch.uint8), torch.rand(1, 6)
    x, bits = torch.rand(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 1, dtype=torch.uint8)

    def bad(message, dy=dy, positions=positions, size=(4, 5), **kwargs):
        with pytest.raises(ValueError, match=message):
            max_pool_gradient(dy, positions, size=size, **kwargs)

    bad("dy_MBHWC: expected a contiguous", dy=dy.half())
    bad(r"dy_MBHWC: expected \(M, B, OH, OW, C\)", dy=dy[0])
    bad("size: expected rows and columns that", size=(5, 5))
    bad("positions_MBHWC: expected contiguous uint8", positions=positions.int())
    bad("positions_MBHWC: expected contiguous uint8", positions=positions[:1])
    bad("before: expected .* \\(2, 3, 4, 5, 6\\)", before=x[:1])
    bad("norm's x: expected", norm=(x[0], a, a))
    bad("norm: expected a and b of one shape", norm=(x, a, torch.rand(2, 6)))
    bad("scale: expected contiguous float32", scale=a.double())
    bad("bits: expected contiguous uint8", bits=bits[:1])
    bad(r"members: expected contiguous int64 \(2,\)", members=torch.tensor([0]))

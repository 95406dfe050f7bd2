"""The perturbation's step: its length, its box, and the gradients that are hard to normalise.

Measured in the interpreter, largest error of kernel and of reference: x' 3.1e-8 and 3.2e-8, x̂' in fp32 9.5e-8 of its
largest value, both.
"""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, assert_launches_alike_on_meta, fresh_memory_is_nan, order

from ensdistill.kernels.images.perturb import perturb


def perturbed(*given, **how):
    """Give x' alone."""
    y, z = perturb(*given, **how)
    assert z is None
    return y


def test_step_has_the_stated_length_and_direction():
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(5, 3, 7, 9, generator=generator, dtype=torch.float64)
    g = torch.randn(5, 3, 7, 9, generator=generator, dtype=torch.float64) * torch.tensor(
        [1e-300, 1e-9, 1, 1e9, 1e200], dtype=torch.float64
    ).view(5, 1, 1, 1)
    step = perturbed(x, g) - x
    length = math.sqrt(3 * 7 * 9) / 255
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((5,), length, dtype=torch.float64))
    cosine = torch.nn.functional.cosine_similarity(
        step.flatten(1), (g / g.abs().amax((1, 2, 3), keepdim=True)).flatten(1)
    )
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_float32_gradients_whose_squares_leave_the_range(scale):
    x, g = torch.full((2, 3, 5, 5), 0.5), torch.randn(2, 3, 5, 5) * scale
    torch.testing.assert_close((perturbed(x, g) - x).flatten(1).norm(dim=1), torch.full((2,), math.sqrt(75) / 255))


def test_zero_gradient_leaves_the_image_and_only_that_image():
    x, g = torch.rand(3, 1, 4, 4) * 0.5 + 0.25, torch.randn(3, 1, 4, 4)
    g[1] = 0
    y = perturbed(x, g)
    assert torch.equal(y[1], x[1]) and not torch.equal(y[0], x[0]) and y.isfinite().all()


def test_clips_to_the_box():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    g = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    assert torch.equal(perturbed(x, g), x)


def test_scale_is_an_image_s_own():
    x, g = torch.full((2, 1, 4, 4), 0.5), torch.randn(2, 1, 4, 4)
    full, scaled = perturbed(x, g) - x, perturbed(x, g, torch.tensor([0.5, 0.0])) - x
    torch.testing.assert_close(scaled[0], full[0] / 2)
    assert not scaled[1].any()


def test_bad_shapes():
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="g: expected the shape of x"):
        perturb(x, x[:1])
    with pytest.raises(ValueError, match="scale_B: expected shape"):
        perturb(x, x, torch.rand(3))
    with pytest.raises(ValueError, match="x: expected 3 channels that lie together"):
        perturb(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), normalise=(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match=r"std: expected a float32 tensor \(1,\)"):
        perturb(x, x, normalise=(torch.ones(1), torch.ones(3)))
    with pytest.raises(ValueError, match="kernel: expected float32 or bfloat16"):
        perturb(x.double(), x.double(), kernel=True)
    with pytest.raises(ValueError, match="x: expected float32 images for the kernel"):
        perturb(x.bfloat16(), x, kernel=True)


FLOOR = 3e-8
"""Half a unit of the last place below 1: where x' of the reference happens to be exact."""


def problem(shape, layout, dtype, scale):
    """Images, gradients of widely different scale (one of them 0), and factors, on the CPU."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, g = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    g = g * (10.0 ** torch.linspace(-30, 30, shape[0])).view(-1, 1, 1, 1)
    if shape[0] > 2:
        g[1] = 0
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x, g.to(dtype), torch.rand(shape[0], generator=generator) if scale else None


def move(x, device):
    return None if x is None else x.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "layout", "scale"),
    [
        ((1, 3, 7, 9), "channels_last", True),
        ((5, 3, 8, 8), "channels_last", False),
        ((37, 1, 5, 5), "contiguous", True),
        ((2, 3, 75, 76), "channels_last", True),  # past what one program holds
        pytest.param((128, 3, 32, 32), "channels_last", False, marks=pytest.mark.gpu),
        pytest.param((33, 3, 64, 64), "contiguous", True, marks=pytest.mark.gpu),
        pytest.param((65, 3, 224, 224), "channels_last", True, marks=pytest.mark.gpu),
    ],
)
def test_kernel_is_as_accurate_as_the_reference(shape, layout, scale, dtype, device):
    x, g, factors = problem(shape, layout, dtype, scale)
    truth = perturbed(x.double(), g.double(), None if factors is None else factors.double())
    with fresh_memory_is_nan():
        got = perturbed(x.to(device), g.to(device), move(factors, device), kernel=True)
    assert order(got) == order(x)
    assert_accurate(got, perturbed(x, g, factors), truth, FLOOR)
    if shape[0] > 2:
        assert torch.equal(got[1].cpu(), x[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (3, 2, 75, 111), (5, 1, 7, 5)])
@pytest.mark.parametrize("as_bhwc", [False, True])
def test_normalises_in_the_same_pass(shape, dtype, as_bhwc, device):
    x, g, _ = problem(shape, "channels_last", torch.float32, False)
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.rand(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.2
    by_channel = (mean.double().view(-1, 1, 1), std.double().view(-1, 1, 1))
    truth = (perturbed(x.double(), g.double()) - by_channel[0]) / by_channel[1]
    if as_bhwc:
        x, g, truth = (t.permute(0, 2, 3, 1) for t in (x, g, truth))
    _, reference = perturb(x, g, normalise=(mean, std), dtype=dtype)
    with fresh_memory_is_nan():
        y, z = perturb(
            x.to(device), g.to(device), normalise=(mean.to(device), std.to(device)), dtype=dtype, kernel=True
        )
    assert z.dtype == dtype and order(y) == order(z) == order(x) == order(reference)
    assert_accurate(z, reference, truth, 2 * FLOOR)


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e38])
def test_kernel_normalises_what_leaves_the_range(scale, device):
    x, g = torch.full((2, 3, 5, 5), 0.5), torch.rand(2, 3, 5, 5, dtype=torch.float64) + 1
    for image in (x, x.repeat(1, 1, 16, 16)):  # 19,200 values: tiles with norms of their own
        gradient = (g.repeat(1, 1, *(side // 5 for side in image.shape[2:])) * scale).float()
        step = perturbed(image.to(device), gradient.to(device), kernel=True).cpu() - image
        length = torch.full((2,), math.sqrt(image[0].numel()) / 255)
        torch.testing.assert_close(step.flatten(1).norm(dim=1), length, rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", [5, 80])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kernel_lets_a_bad_gradient_spoil_its_image_alone(bad, side, device):
    x, g = torch.rand(2, 3, side, side), torch.randn(2, 3, side, side)
    g[1, 2, 0, 3] = bad
    y = perturbed(x.to(device), g.to(device), kernel=True)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_kernel_takes_strides_that_it_does_not_know(device):
    x, g = torch.rand(3, 8, 7, 5)[..., 1:4].to(device), torch.randn(3, 5, 8, 7).to(device).permute(0, 2, 3, 1)[..., :3]
    assert_accurate(
        perturbed(x, g, kernel=True), perturbed(x, g).cpu(), perturbed(x.cpu().double(), g.cpu().double()), FLOOR
    )


@pytest.mark.parametrize("normalise", [True, False])
def test_on_meta(normalise, device):
    x, g, factors = (move(t, device) for t in problem((2, 3, 5, 7), "channels_last", torch.bfloat16, True))
    vectors = (torch.rand(3, device=device), torch.rand(3, device=device) + 1) if normalise else None
    assert_launches_alike_on_meta(perturb, x, g, factors, normalise=vectors, kernel=True)

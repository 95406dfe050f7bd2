"""The perturbation's step: its length, its box, and the gradients that are hard to normalise."""

from __future__ import annotations

import math

import pytest
import torch

from ensdistill.kernels.perturb import perturb


def test_step_has_the_stated_length_and_direction():
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(5, 3, 7, 9, generator=generator, dtype=torch.float64)
    g = torch.randn(5, 3, 7, 9, generator=generator, dtype=torch.float64) * torch.tensor(
        [1e-300, 1e-9, 1, 1e9, 1e200], dtype=torch.float64
    ).view(5, 1, 1, 1)
    step = perturb(x, g) - x
    length = math.sqrt(3 * 7 * 9) / 255
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((5,), length, dtype=torch.float64))
    cosine = torch.nn.functional.cosine_similarity(
        step.flatten(1), (g / g.abs().amax((1, 2, 3), keepdim=True)).flatten(1)
    )
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_float32_gradients_whose_squares_leave_the_range(scale):
    x, g = torch.full((2, 3, 5, 5), 0.5), torch.randn(2, 3, 5, 5) * scale
    torch.testing.assert_close((perturb(x, g) - x).flatten(1).norm(dim=1), torch.full((2,), math.sqrt(75) / 255))


def test_zero_gradient_leaves_the_image_and_only_that_image():
    x, g = torch.rand(3, 1, 4, 4) * 0.5 + 0.25, torch.randn(3, 1, 4, 4)
    g[1] = 0
    y = perturb(x, g)
    assert torch.equal(y[1], x[1]) and not torch.equal(y[0], x[0]) and y.isfinite().all()


def test_clips_to_the_box():
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    g = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3)
    assert torch.equal(perturb(x, g), x)


def test_scale_is_an_image_s_own():
    x, g = torch.full((2, 1, 4, 4), 0.5), torch.randn(2, 1, 4, 4)
    full, scaled = perturb(x, g) - x, perturb(x, g, torch.tensor([0.5, 0.0])) - x
    torch.testing.assert_close(scaled[0], full[0] / 2)
    assert not scaled[1].any()


def test_bad_shapes():
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="g: expected the shape of x"):
        perturb(x, x[:1])
    with pytest.raises(ValueError, match="scale_B: expected shape"):
        perturb(x, x, torch.rand(3))

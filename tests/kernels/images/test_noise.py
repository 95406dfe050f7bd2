"""Noise on images: its definition, the kernel's numbers against float64, pixel by pixel whatever the memory's order.

Measured in the interpreter on 64 images of 3×32×32, largest errors of kernel and of reference: x' 6e-8, both; the
normal numbers themselves, read off images of 0, 6.4e-7 and 1.4e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, assert_launches_alike_on_meta, fresh_memory_is_nan, order

from ensdistill.kernels.images.augment import normalise_ref
from ensdistill.kernels.images.noise import add_noise
from ensdistill.kernels.philox import STREAM_NOISE, counter_of, philox

CPU = torch.device("cpu")
FLOOR = 3e-8
"""Half a unit of the last place below 1: where x' of the reference happens to be exact."""
NORMAL_FLOOR = 1e-6
"""Error of a normal number: two units of the last place of 5.8, the largest that 23 bits give."""
COUNTERS = [(11, 5, 0), (2**64 - 5, 70_000, 2**31 + 3), (3, 7, 2**32 - 1)]


def noise_in_float64(shape, seed, step, first_row):
    """(B, C, H, W) of standard normal numbers: Box-Muller of the middles of the words' 2**-23 wide bins, by hand."""
    D = math.prod(shape[1:])
    rows = []
    for i in range(shape[0]):
        words = philox(seed, (first_row + i) % 2**32, step, STREAM_NOISE, torch.arange(-(-D // 4)))
        u = [((word >> 9).double() + 0.5) / 2**23 for word in words]
        z = []
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            radius = (-2 * a.log()).sqrt()
            z += [radius * (2 * math.pi * b).cos(), radius * (2 * math.pi * b).sin()]
        rows.append(torch.stack(z, dim=1).flatten()[:D])
    return torch.stack(rows).view(shape)


def images(shape, layout):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


SHAPES = [
    ((1, 3, 7, 9), "channels_last"),
    ((5, 3, 8, 8), "channels_last"),
    ((37, 1, 5, 5), "contiguous"),
    ((3, 2, 5, 1), "contiguous"),
    ((2, 3, 75, 76), "channels_last"),  # past one tile
    pytest.param((128, 3, 32, 32), "channels_last", marks=pytest.mark.gpu),
    pytest.param((33, 3, 65, 63), "contiguous", marks=pytest.mark.gpu),
    pytest.param((65, 3, 224, 224), "channels_last", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("shape", "layout"), SHAPES)
@pytest.mark.parametrize(("seed", "step", "first_row"), COUNTERS)
def test_kernel_is_as_accurate_as_the_reference(shape, layout, seed, step, first_row, device):
    x = images(shape, layout)
    truth = (x.double() + noise_in_float64(shape, seed, step, first_row) / 255).clamp(0, 1)
    with fresh_memory_is_nan():
        got, _ = add_noise(x.to(device), counter_of(seed, step, first_row, device), kernel=True)
    assert order(got) == order(x)
    assert_accurate(got, add_noise(x, counter_of(seed, step, first_row, CPU))[0], truth, FLOOR)


def test_its_numbers_are_normal_to_six_digits(device):
    """Images of 0 show the positive numbers to their last bit, of 1/32 all of them to a part of it."""
    shape, (seed, step, first_row) = (64, 3, 32, 32), COUNTERS[1]
    counter, n = counter_of(seed, step, first_row, device), noise_in_float64(shape, seed, step, first_row)
    n_positive = n.clamp_min(0)
    for background, truth in ((0.0, n_positive), (1 / 32, n)):
        x = torch.full(shape, background)
        got, reference = (
            (add_noise(x.to(where), counter.to(where), kernel=kernel)[0].cpu().double() - background) * 255
            for where, kernel in ((device, True), (CPU, False))
        )
        error, allowed = ((value - truth).abs().max().item() for value in (got, reference))
        assert error <= allowed + NORMAL_FLOOR, (background, error, allowed)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_pixel_s_noise_depends_neither_on_the_batch_nor_on_the_memory(kernel, device):
    x = images((6, 3, 7, 5), "channels_last").to(device)

    def noisy(x, *counter):
        return add_noise(x, counter_of(*counter, device), kernel=kernel)[0]

    y = noisy(x, 1, 2, 10)
    assert torch.equal(torch.cat([noisy(x[i : i + 3], 1, 2, 10 + i) for i in (0, 3)]), y)
    assert torch.equal(noisy(x.contiguous(), 1, 2, 10), y)
    assert not torch.equal(noisy(x, 1, 3, 10), y)
    assert not torch.equal(noisy(x, 2, 2, 10), y)


@pytest.mark.parametrize("kernel", [False, True])
def test_clips_to_the_box_and_lets_a_nan_through(kernel, device):
    x = torch.zeros(3, 1, 6, 6, device=device)
    x[1] = 1
    x[2, 0, 3, 4] = math.nan
    y, _ = add_noise(x, counter_of(1, 2, 3, device), kernel=kernel)
    assert y[0].amin() == 0 < y[0].amax() < 0.03 and 0.97 < y[1].amin() < y[1].amax() == 1
    assert y.isnan().sum() == 1 and y[2, 0, 3, 4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (3, 2, 75, 111), (5, 1, 7, 5), (3, 4, 1, 1)])
def test_normalises_in_the_same_pass(shape, dtype, device):
    x, counter = images(shape, "channels_last"), counter_of(1, 2, 3, device)
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.rand(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.2
    with fresh_memory_is_nan():
        how = {"normalise": (mean.to(device), std.to(device)), "dtype": dtype}
        y, z = add_noise(x.to(device), counter, kernel=True, **how)
        plain_y, plain_z = add_noise(x.to(device), counter, kernel=False, **how)
    assert z.dtype == plain_z.dtype == dtype and order(y) == order(z) == order(x) == order(plain_z)
    assert torch.equal(y, add_noise(x.to(device), counter, kernel=True)[0])
    for shown, normalised in ((y, z), (plain_y, plain_z)):
        expected = normalise_ref(shown.permute(0, 2, 3, 1).cpu(), mean, std, dtype)
        assert torch.equal(normalised.permute(0, 2, 3, 1).cpu(), expected)


def test_kernel_takes_strides_that_it_does_not_know(device):
    x, counter = torch.rand(3, 8, 7, 5)[..., 1:4].to(device), counter_of(1, 2, 3, device)
    assert torch.equal(add_noise(x, counter, kernel=True)[0], add_noise(x.contiguous(), counter, kernel=True)[0])


def test_bad_arguments():
    x, counter = torch.rand(2, 3, 4, 4), counter_of(1, 2, 3, CPU)
    with pytest.raises(ValueError, match=r"x_BCHW: expected images \(B, C, H, W\)"):
        add_noise(x[0], counter)
    with pytest.raises(ValueError, match=r"counter: expected an int64 tensor \(3,\)"):
        add_noise(x, counter.int())
    with pytest.raises(ValueError, match="x_BCHW: expected 3 channels that lie together"):
        add_noise(x, counter, normalise=(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match=r"std: expected a float32 tensor \(3,\)"):
        add_noise(x, counter, normalise=(torch.ones(3), torch.ones(1)))
    with pytest.raises(ValueError, match="kernel: expected float32 or bfloat16"):
        add_noise(x.double(), counter, kernel=True)
    with pytest.raises(ValueError, match="x_BCHW: expected float32 images for the kernel"):
        add_noise(x.bfloat16(), counter, kernel=True)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_on_meta(normalise, layout, device):
    x, counter = images((2, 3, 5, 7), layout).to(device), counter_of(1, 2, 3, device)
    vectors = (torch.rand(3, device=device), torch.rand(3, device=device) + 1) if normalise else None
    if normalise and layout == "contiguous":
        x = x[:, :, :1, :1].contiguous()  # one pixel: its channels lie together in either order
    assert_launches_alike_on_meta(add_noise, x, counter, normalise=vectors, kernel=True)


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_in_each_replay(device):
    x, counter = images((37, 3, 32, 32), "channels_last").to(device), counter_of(1, 0, 0, device)
    add_noise(x, counter)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = add_noise(x, counter)
    for step in (3, 4):
        counter.copy_(counter_of(2**64 - 1, step, 5, device))
        graph.replay()
        assert torch.equal(y, add_noise(x, counter_of(2**64 - 1, step, 5, device))[0])

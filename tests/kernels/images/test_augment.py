"""Zero-padded crops and flips against NumPy, image by image; the kernel against the reference, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accuracy import assert_launches_alike_on_meta, fresh_memory_is_nan

from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.philox import STREAM_CROP_FLIP, below, counter_of, draw_pair, draw_pair_on_device, philox


def drawn(x, seed, step, first_row=0, **how):
    """Augment images by the counter (seed, step, first_row)."""
    y, z = augment(x, counter_of(seed, step, first_row, x.device), **how)
    assert z is None
    return y


def by_hand(image_HWC: np.ndarray, row: int, *, seed: int, step: int, pad: int, flip: bool) -> np.ndarray:
    H, W, _ = image_HWC.shape
    y, x, f, _ = philox(seed, row, step, STREAM_CROP_FLIP)
    top, left = below(y, 2 * pad + 1), below(x, 2 * pad + 1)
    crop = np.pad(image_HWC, ((pad, pad), (pad, pad), (0, 0)))[top : top + H, left : left + W]
    return (crop[:, ::-1] if flip and f >> 31 else crop).astype(np.float32) / np.float32(255)


@pytest.mark.parametrize(
    ("shape", "pad", "flip"), [((17, 7, 5, 3), 2, True), ((9, 8, 8, 1), 1, False), ((6, 5, 5, 3), 0, True)]
)
def test_matches_padding_and_cropping_by_hand(shape, pad, flip):
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    y = drawn(x, 11, 5, 100, pad=pad, flip=flip)
    for i in range(len(x)):
        np.testing.assert_array_equal(y[i].numpy(), by_hand(x[i].numpy(), 100 + i, seed=11, step=5, pad=pad, flip=flip))


def test_every_shift_and_both_flips_occur():
    x = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5, 1).repeat(600, 1, 1, 1)
    seen = {tuple(image.flatten().tolist()) for image in drawn(x, 0, 0, pad=1)}
    assert len(seen) == 3 * 3 * 2


def test_depends_on_the_global_row_not_on_the_batch():
    x = torch.randint(0, 256, (12, 6, 6, 3), dtype=torch.uint8)
    whole = drawn(x, 1, 2, pad=2)
    halves = torch.cat([drawn(x[:6], 1, 2, pad=2), drawn(x[6:], 1, 2, 6, pad=2)])
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, drawn(x, 1, 3, pad=2))


def test_without_pad_or_flip_it_only_converts():
    x = torch.randint(0, 256, (3, 4, 4, 1), dtype=torch.uint8)
    assert torch.equal(drawn(x, 1, 2, pad=0, flip=False), x / 255)


def test_bad_arguments():
    x, counter = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="x_BHWC: expected a uint8 tensor"):
        augment(x.float(), counter)
    with pytest.raises(ValueError, match="pad: expected 0 ≤ pad < 4"):
        augment(x, counter, pad=4)
    with pytest.raises(ValueError, match=r"counter: expected an int64 tensor \(3,\)"):
        augment(x, counter[:2], pad=1)
    with pytest.raises(ValueError, match=r"std: expected a float32 tensor \(3,\)"):
        augment(x, counter, pad=1, normalise=(torch.ones(3), torch.ones(1)))
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16"):
        augment(x, counter, pad=1, normalise=(torch.ones(3), torch.ones(3)), dtype=torch.float64)


def images(shape, device):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2)).to(device)


def mean_and_std(C, device):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(C, generator=generator).to(device), (torch.rand(C, generator=generator) + 0.2).to(device)


@pytest.mark.parametrize(
    ("shape", "pad", "flip"),
    [
        ((1, 7, 5, 3), 2, True),
        ((37, 8, 8, 1), 1, False),
        ((6, 5, 9, 2), 0, True),
        ((3, 33, 31, 3), 4, True),
        ((5, 6, 6, 3), 0, False),
        pytest.param((128, 32, 32, 3), 4, True, marks=pytest.mark.gpu),
        pytest.param((33, 224, 224, 3), 0, True, marks=pytest.mark.gpu),
        pytest.param((1, 227, 225, 3), 28, True, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("seed", "step", "first_row"), [(11, 5, 0), (2**64 - 5, 70_000, 2**31 + 3)])
def test_kernel_gives_the_reference_s_bits(shape, pad, flip, seed, step, first_row, device):
    x, (mean, std) = images(shape, "cpu"), mean_and_std(shape[3], "cpu")
    how = {"pad": pad, "flip": flip}
    of_host = counter_of(seed, step, first_row, torch.device("cpu"))
    y, z = augment(x, of_host, normalise=(mean, std), dtype=torch.bfloat16, **how)
    counter, vectors = counter_of(seed, step, first_row, device), (mean.to(device), std.to(device))
    with fresh_memory_is_nan():
        both = augment(x.to(device), counter, normalise=vectors, dtype=torch.bfloat16, kernel=True, **how)
        alone = augment(x.to(device), counter, kernel=True, **how)
    assert z.dtype == torch.bfloat16 and torch.equal(both[0].cpu(), y) and torch.equal(both[1].cpu(), z)
    assert torch.equal(alone[0].cpu(), y) and alone[1] is None
    assert torch.equal(augment(x.to(device), counter, kernel=False, **how)[0].cpu(), y)


def test_every_byte_is_divided_alike_and_normalised_in_float32(device):
    x, (mean, std) = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1), mean_and_std(1, device)
    how = {"pad": 0, "flip": False, "kernel": True}
    y, z = augment(x.to(device), counter_of(0, 0, 0, device), normalise=(mean, std), dtype=torch.float32, **how)
    assert torch.equal(y.cpu(), torch.from_numpy(x.numpy().astype(np.float32) / np.float32(255)))
    assert torch.equal(z.cpu(), (y.cpu() - mean.cpu()) / std.cpu())


def test_strided_images_are_taken(device):
    x = images((3, 3, 7, 5), device).permute(0, 2, 3, 1)
    assert torch.equal(drawn(x, 1, 2, pad=1, kernel=True).cpu(), drawn(x.cpu(), 1, 2, pad=1))


@pytest.mark.parametrize("normalise", [True, False])
def test_on_meta(normalise, device):
    x, (mean, std) = images((3, 6, 5, 3), device), mean_and_std(3, device)
    counter = counter_of(1, 2, 3, device)
    vectors = (mean, std) if normalise else None
    assert_launches_alike_on_meta(augment, x, counter, pad=2, normalise=vectors, kernel=True)


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_in_each_replay(device):
    x, counter = images((37, 32, 32, 3), device), counter_of(1, 0, 0, device)
    augment(x, counter)
    draw_pair_on_device(counter, 4)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (y, _), pair = augment(x, counter), draw_pair_on_device(counter, 4)
    for step in (3, 4):
        counter.copy_(counter_of(2**64 - 1, step, 5, device))
        graph.replay()
        assert torch.equal(y.cpu(), drawn(x.cpu(), 2**64 - 1, step, 5))
        assert tuple(pair.tolist()) == draw_pair(2**64 - 1, step, 4)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device):
    x = images((37, 32, 32, 3), device)
    drawn(x, 1, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn(x, 1, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")

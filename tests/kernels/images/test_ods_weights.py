"""The weights of ODS against words that are drawn one by one, and the kernel against the reference, bit by bit."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_launches_alike_on_meta, fresh_memory_is_nan

from ensdistill.kernels.images.ods_weights import ods_weights
from ensdistill.kernels.philox import STREAM_ODS, counter_of, philox

CPU = torch.device("cpu")
COUNTERS = [(11, 5, 0), (2**64 - 5, 70_000, 2**31 + 3), (3, 7, 2**32 - 1)]


@pytest.mark.parametrize(("seed", "step", "first_row"), COUNTERS)
def test_a_weight_is_a_word_of_its_image(seed, step, first_row):
    w = ods_weights(counter_of(seed, step, first_row, CPU), 3, 7)
    assert w.dtype == torch.float32 and w.shape == (3, 7)
    for i in range(3):
        words = [w for block in (0, 1) for w in philox(seed, (first_row + i) % 2**32, step, STREAM_ODS, block)]
        assert w[i].tolist() == [2 * ((word >> 9) + 0.5) / 2**23 - 1 for word in words[:7]]


def test_they_are_uniform_and_open():
    w = ods_weights(counter_of(1, 2, 3, CPU), 100, 1001).double()
    assert w.abs().max() < 1
    # uniform on [-1, 1]: mean 0, variance 1/3, 100,100 numbers
    assert abs(w.mean()) < 0.01 and abs((w**2).mean() - 1 / 3) < 0.01 and w.min() < -0.999 and w.max() > 0.999


@pytest.mark.parametrize(
    ("B", "K"),
    [
        (5, 10),
        (1, 3),
        (37, 100),
        (3, 1001),
        (129, 1),
        (2, 20_001),
        pytest.param(128, 200, marks=pytest.mark.gpu),
        pytest.param(255, 21_841, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("seed", "step", "first_row"), COUNTERS)
def test_kernel_gives_the_reference_s_bits(B, K, seed, step, first_row, device):
    with fresh_memory_is_nan():
        got = ods_weights(counter_of(seed, step, first_row, device), B, K, kernel=True)
    right = ods_weights(counter_of(seed, step, first_row, CPU), B, K)
    assert got.device.type == device.type and got.dtype == right.dtype and torch.equal(got.cpu(), right)
    assert torch.equal(ods_weights(counter_of(seed, step, first_row, device), B, K, kernel=False).cpu(), right)


def test_bad_arguments():
    counter = counter_of(1, 2, 3, CPU)
    with pytest.raises(ValueError, match=r"counter: expected an int64 tensor \(3,\)"):
        ods_weights(counter[:2], 4, 10)
    with pytest.raises(ValueError, match=r"B, K: expected at least 1 image and 1 class, got \(4, 0\)"):
        ods_weights(counter, 4, 0)


def test_on_meta(device):
    assert_launches_alike_on_meta(ods_weights, counter_of(1, 2, 3, device), 5, 10, kernel=True)


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_in_each_replay(device):
    counter = counter_of(1, 0, 0, device)
    ods_weights(counter, 37, 100)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w = ods_weights(counter, 37, 100)
    for step in (3, 4):
        counter.copy_(counter_of(2**64 - 1, step, 5, device))
        graph.replay()
        assert torch.equal(w.cpu(), ods_weights(counter_of(2**64 - 1, step, 5, CPU), 37, 100))

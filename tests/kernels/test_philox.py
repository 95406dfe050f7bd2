"""Counter-based random numbers against published vectors, and what is drawn from them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accuracy import assert_launches_alike_on_meta

from ensdistill.kernels.philox import (
    below,
    counter_of,
    draw_pair,
    draw_pair_on_device,
    draw_teacher,
    draw_teacher_on_device,
    epoch_order,
    normal,
    philox,
    uniform,
)

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("seed", "row", "step", "stream", "block", "words"),
    [  # Random123's known answers for philox4x32-10; counter (row, step, stream, block)
        (0, 0, 0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES << 32) | ONES, ONES, ONES, ONES, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            0x243F6A88,
            0x85A308D3,
            0x13198A2E,
            0x03707344,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(seed, row, step, stream, block, words):
    assert philox(seed, row, step, stream, block) == words
    assert tuple(int(w) for w in philox(seed, torch.tensor([row]), step, stream, block)) == words
    assert tuple(int(w[0]) for w in philox(seed, np.array([row]), step, stream, block)) == words


def test_uniform_is_open():
    u = uniform(torch.tensor([0, ONES]))
    assert u.dtype == torch.float32 and 0 < u[0] < 1e-6 and 1 - 1e-6 < u[1] < 1


def test_below_covers_the_range():
    assert below(0, 7) == 0 and below(ONES, 7) == 6


def test_normal_has_the_moments_of_a_normal_and_depends_on_the_row_alone():
    z = normal(3, torch.arange(50), 7, 3, 1001)
    assert z.shape == (50, 1001)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.15
    assert torch.equal(normal(3, torch.arange(20, 30), 7, 3, 1001), z[20:30])
    assert torch.equal(normal(3, torch.arange(50), 7, 3, 10), z[:, :10])
    assert not torch.equal(normal(3, torch.arange(50), 8, 3, 1001), z)


def test_pairs_are_uniform_over_ordered_pairs():
    counts = Counter(draw_pair(5, step, 4) for step in range(12_000))
    assert len(counts) == 12 and all(a != b for a, b in counts)
    # 1,000 expected of each, standard deviation 30
    assert all(850 < count < 1150 for count in counts.values())
    assert draw_pair(5, 77, 4) == draw_pair(5, 77, 4)
    assert {draw_pair(5, step, 2) for step in range(50)} == {(0, 1), (1, 0)}


def test_epoch_order_is_a_permutation_of_its_own_each_epoch():
    first, second = epoch_order(1001, 1, 0), epoch_order(1001, 1, 1)
    assert sorted(first.tolist()) == list(range(1001))
    assert not np.array_equal(first, second) and not np.array_equal(first, epoch_order(1001, 2, 0))
    assert np.array_equal(first, epoch_order(1001, 1, 0))


@pytest.mark.parametrize("seed", [0, 5, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 99_999, ONES])
def test_the_device_draws_the_host_s_pair(seed, step, device):
    counter = counter_of(seed, step, 3, device)
    for E in (2, 3, 4, 7):
        pair = draw_pair_on_device(counter, E)
        assert pair.dtype == torch.int64 and pair.device.type == device.type
        assert tuple(pair.tolist()) == draw_pair(seed, step, E)
    a, b = draw_pair(seed, step, 4)
    for kernel in (False, True):
        pair_4 = draw_pair_on_device(counter, 4, beside=5, kernel=kernel)
        assert pair_4.dtype == torch.int64 and pair_4.tolist() == [a, a + 5, b, b + 5]


@pytest.mark.parametrize("seed", [0, 5, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 99_999, ONES])
@pytest.mark.parametrize("kernel", [False, True])
def test_the_device_draws_the_host_s_teacher(seed, step, kernel, device):
    counter = counter_of(seed, step, 3, device)
    for E in (1, 2, 3, 4, 7):
        teacher = draw_teacher_on_device(counter, E, kernel=kernel)
        assert teacher.dtype == torch.int64 and teacher.device.type == device.type
        assert teacher.tolist() == [draw_teacher(seed, step, E)]


def test_a_counter_carries_the_seed_s_bits():
    counter = counter_of(2**64 - 1, 7, 9, torch.device("cpu"))
    assert counter.tolist() == [-1, 7, 9]
    drawn = philox(counter[0], torch.tensor([4]), counter[1], 1)
    assert tuple(int(word) for word in drawn) == philox(2**64 - 1, 4, 7, 1)


def test_drawing_on_the_device_checks_and_runs_on_meta(device):
    counter = counter_of(1, 2, 3, device)
    for beside in (0, 5):
        assert_launches_alike_on_meta(draw_pair_on_device, counter, 4, beside=beside, kernel=True)
    assert_launches_alike_on_meta(draw_teacher_on_device, counter, 4, kernel=True)
    with pytest.raises(ValueError, match="E: expected at least 2 members, got 1"):
        draw_pair_on_device(counter, 1)
    with pytest.raises(ValueError, match="counter: expected an int64 tensor"):
        draw_pair_on_device(counter[:2], 4)
    with pytest.raises(ValueError, match="E: expected at least 1 teacher, got 0"):
        draw_teacher_on_device(counter, 0)
    with pytest.raises(ValueError, match="counter: expected an int64 tensor"):
        draw_teacher_on_device(counter[:2], 4)

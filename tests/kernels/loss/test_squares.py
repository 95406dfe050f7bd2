"""The loss that weight decay is the gradient of: every tensor, every value, each with its scale, in one launch."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate, fresh_memory_is_nan

from ensdistill.kernels.loss.squares import CHUNK, HalfSquares, half_squares_ref

FLOOR = 2e-7  # measured: 1.5e-7 at most; the reference takes a square root and squares it again


def tensors(device):
    """Sizes around a chunk's, channels-last weights, a bias of one, views that start anywhere."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    weight = normal(24, 17, 3, 3).contiguous(memory_format=torch.channels_last)
    return [normal(1), normal(CHUNK), weight, normal(CHUNK + 1), normal(3, CHUNK), normal(30)[5:], normal(100, 7)]


@pytest.mark.parametrize("scales", [[1.0] * 7, [1.0] * 4 + [0.25] * 3, [0.5, 1.0, 2.0, 0.25, 3.0, 0.0, 1.0]])
def test_it_is_the_sum_of_all_squares(scales, device):
    given = tensors(device)
    with fresh_memory_is_nan():
        got = HalfSquares(given, scales)()
    truth = sum(scale * x.cpu().double().square().sum() for x, scale in zip(given, scales, strict=True)) / 2
    # in parts of the sum itself, which is some thousands
    assert_accurate(
        got.cpu() / truth, half_squares_ref(given, scales).cpu() / truth, torch.ones((), dtype=torch.float64), FLOOR
    )


def test_it_follows_the_values(device):
    given = tensors(device)
    squares = HalfSquares(given, [1.0] * 7)
    before = float(squares())
    for x in given:
        x.mul_(2)
    assert float(squares()) == pytest.approx(4 * before, rel=1e-6)
    assert not squares.has_moved()


def test_it_notices_tensors_that_were_replaced(device):
    parameters = [torch.nn.Parameter(x) for x in tensors(device)]
    squares = HalfSquares([p.detach() for p in parameters], [1.0] * 7)
    moved = HalfSquares(parameters, [1.0] * 7)
    parameters[3].data = parameters[3].data.clone()
    assert moved.has_moved() and not squares.has_moved()


def test_tensors_that_it_cannot_read_are_refused(device):
    with pytest.raises(ValueError, match="tensors: expected dense fp32"):
        HalfSquares([torch.zeros(3, device=device), torch.zeros(3, dtype=torch.float64, device=device)], [1.0, 1.0])
    with pytest.raises(ValueError, match="tensors: expected dense fp32"):
        HalfSquares([torch.zeros(4, 4, device=device).t()[1:]], [1.0])

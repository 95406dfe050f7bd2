"""How a layer's weight lies in memory, for the kernels that read or write it tile by tile.

W (CO, CI, k, k), or a linear layer's (CO, CI), holds k·k·CI contiguous values for each output channel: the rows of its
tiles, in the order (ci, kh, kw), or (kh, kw, ci) where the memory format is channels-last. The members' weights
(E, k, k, CI, CO) have CO contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import INTERPRETED, MAX_INTERPRETED_PROGRAMS, MAX_TILE, cdiv, check, power_of_2


@triton.jit
def rows_of(i_row, CI, TAPS: tl.constexpr, TAPS_INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of W in its own memory order, (kh, kw, ci) or (ci, kh, kw): offset in W, input channel, row of w."""
    o_row = i_row + tl.arange(0, BLOCK)
    if TAPS_INNER:
        o_ci = o_row // TAPS
        o_tap_ci = o_row % TAPS * CI + o_ci
    else:
        o_ci = o_row % CI
        o_tap_ci = o_row
    return o_row, o_ci, o_tap_ci


def as_conv(weight: Tensor) -> Tensor:
    """A linear layer's weight is a 1×1 convolution's."""
    return weight[:, :, None, None] if weight.dim() == 2 else weight


def dense(weight: Tensor) -> tuple[Tensor, bool]:
    """`weight` as (CO, CI, k, k), copied if neither contiguous nor channels-last; whether its taps are innermost."""
    weight = as_conv(weight)
    if weight.is_contiguous():  # a 1×1 weight is both: take it as the second, whose rows are w's
        return weight, weight.shape[2] * weight.shape[3] > 1
    if weight.permute(0, 2, 3, 1).is_contiguous():
        return weight, False
    return weight.contiguous(), weight.shape[2] * weight.shape[3] > 1


def blocks(rows: int, CO: int) -> tuple[int, int]:
    BLOCK_R, BLOCK_O = min(32, power_of_2(rows)), min(64, power_of_2(CO))
    if CO % 16:  # narrow accesses: their addresses take the registers that a larger tile needs
        BLOCK_R = min(16, BLOCK_R)
    if INTERPRETED:
        BLOCK_O = min(power_of_2(CO), 512)
        while cdiv(rows, BLOCK_R) * cdiv(CO, BLOCK_O) > MAX_INTERPRETED_PROGRAMS and BLOCK_R * BLOCK_O < MAX_TILE:
            BLOCK_R *= 2
    return BLOCK_R, BLOCK_O


def check_factors(weight: Tensor, r_E_CI: Tensor | None, s_E_CO: Tensor | None, E: int) -> None:
    square = weight.dim() == 2 or (weight.dim() == 4 and weight.shape[2] == weight.shape[3])
    check(square and weight.dtype == torch.float32, "weight", "fp32 (CO, CI, k, k) or (CO, CI)", weight)
    check(weight.numel() > 0 and E > 0, "weight", "at least one member and one element", weight)
    for name, factor, channels in (("r", r_E_CI, weight.shape[1]), ("s", s_E_CO, weight.shape[0])):
        if factor is not None:
            fits = factor.shape == (E, channels) and factor.is_contiguous() and factor.dtype == torch.float32
            check(fits and factor.device == weight.device, name, f"contiguous fp32 ({E}, {channels}) beside W", factor)

"""Shared by the operations with one number a channel: tiles of (rows, C), loads, sums of partial sums.

A tensor (M, …, C) is M members of `rows` pixels with the channels fastest; a tile is BLOCK_N pixels of BLOCK_C
channels. Per-channel vectors are (1, C), shared by the members, or (M, C).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch as launching
from ensdistill.kernels.launch import MAX_TILE, cdiv, check, power_of_2

ELEMENTS = 4096
"""Elements of a tile of four warps: 32 a thread, four 16-byte loads of bf16 in flight for each tensor that is read."""


class ChannelTile(NamedTuple):
    """BLOCK_N rows × BLOCK_C channels a step, `steps` steps a program."""

    BLOCK_N: int
    BLOCK_C: int
    steps: int

    def programs(self, rows: int) -> int:
        """Row tiles of one member."""
        return cdiv(rows, self.BLOCK_N * self.steps)

    def blocks(self, C: int) -> int:
        """Channel tiles."""
        return cdiv(C, self.BLOCK_C)


def channel_block(C: int, largest: int = 64) -> int:
    """Channels of a tile, a power of 2 in [8, largest]: one that divides C if 16 or more does, else one with masks.

    64 channels of bf16 are one line of 128 bytes; with more, a tile's vectors would go through shared memory.
    """
    divisor = C & -C
    return min(divisor if divisor >= 16 else max(8, power_of_2(C)), 256 if launching.INTERPRETED else largest)


def channel_tile(members: int, rows: int, C: int, *, steps: int = 1) -> ChannelTile:
    """The tile for (members, rows, C); interpreted, one so large that a launch has few programs."""
    BLOCK_C = channel_block(C)
    BLOCK_N = max(1, min(ELEMENTS // BLOCK_C, power_of_2(cdiv(rows, steps))))
    if launching.INTERPRETED:
        most = launching.MAX_INTERPRETED_PROGRAMS // max(1, members * cdiv(C, BLOCK_C))
        while cdiv(rows, BLOCK_N * steps) > max(1, most) and BLOCK_N * BLOCK_C < MAX_TILE:
            BLOCK_N *= 2
    return ChannelTile(BLOCK_N, BLOCK_C, steps)


def sums_options(rows: int, C: int) -> dict[str, int]:
    """BLOCK_T, BLOCK_C and num_warps for `sum_partials` over `rows` partial sums.

    A program takes eight channels, one sector of 32 bytes, so that many share the work; 1024 rows of both sums are
    64 KB in flight, about what one multiprocessor needs to draw its share of the L2's rate.
    """
    BLOCK_C = channel_block(C, 8)
    BLOCK_T = min(power_of_2(rows), (MAX_TILE if launching.INTERPRETED else 8192) // BLOCK_C)
    return {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": min(16, max(1, BLOCK_T * BLOCK_C // 512))}


def over_pixels(v: Tensor, x: Tensor) -> Tensor:
    """A vector (G, C), shaped to broadcast against x (M, …, C)."""
    return v.view(-1, *[1] * (x.ndim - 2), x.shape[-1])


def check_activations(x: Tensor, name: str, shape: torch.Size | None = None) -> None:
    """ValueError unless `x` is contiguous bf16 or fp32, (M, …, C) or of `shape`."""
    shown = "(M, …, C)" if shape is None else str(tuple(shape))
    fits = x.ndim >= 2 if shape is None else x.shape == shape
    right = fits and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()
    check(right, name, f"a contiguous float32 or bfloat16 tensor {shown}", x)


def check_vectors(v: Tensor, name: str, members: int, C: int) -> None:
    """ValueError unless `v` is contiguous fp32 (1, C) or (members, C)."""
    right = v.shape in ((1, C), (members, C)) and v.dtype == torch.float32 and v.is_contiguous()
    check(right, name, f"contiguous float32 (1, {C}) or ({members}, {C})", v)


def check_gamma(v: Tensor, name: str, members: int, C: int, per_member: bool) -> None:
    """ValueError unless `v` is contiguous fp32 (C,), or with `per_member` (members, C)."""
    right = v.shape == (C,) or (per_member and v.shape == (members, C))
    expected = f"contiguous float32 ({C},)" + (f" or ({members}, {C})" if per_member else "")
    check(right and v.dtype == torch.float32 and v.is_contiguous(), name, expected, v)


def check_sums(sums_MT2C: Tensor, count: int) -> None:
    """ValueError unless `sums_MT2C` are contiguous fp32 partial sums and `count` is positive."""
    right = sums_MT2C.ndim == 4 and sums_MT2C.shape[2] == 2 and sums_MT2C.dtype == torch.float32
    check(right and sums_MT2C.is_contiguous(), "sums_MT2C", "contiguous float32 partial sums (M, T, 2, C)", sums_MT2C)
    check(0 not in sums_MT2C.shape, "sums_MT2C", "at least one partial sum", sums_MT2C)
    check(count > 0, "count", "a positive number of values", count)


@triton.jit
def load_f32(p, m, MASKED: tl.constexpr):
    """Load as fp32; without a mask where there is nothing to mask, which keeps the loads wide."""
    b = tl.load(p, mask=m, other=0.0) if MASKED else tl.load(p)
    return b.to(tl.float32)


@triton.jit
def store(p, b, m, MASKED: tl.constexpr):
    """Store in the pointer's type."""
    if MASKED:
        tl.store(p, b.to(p.dtype.element_ty), mask=m)
    else:
        tl.store(p, b.to(p.dtype.element_ty))


@triton.jit
def sum_partials(p_sums, rows, o_c, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ over `rows` of (rows, 2, C) at channels `o_c`, in fp64 and in an order of its own: two vectors (BLOCK_C,)."""
    b_0 = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    b_1 = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for i_t in range(0, rows, BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T)
        m = (o_t < rows)[:, None] & (o_c < C)[None, :]
        p = p_sums + o_t[:, None] * (2 * C) + o_c[None, :]
        b_0 += tl.load(p, mask=m, other=0.0).to(tl.float64)
        b_1 += tl.load(p + C, mask=m, other=0.0).to(tl.float64)
    return tl.sum(b_0, axis=0), tl.sum(b_1, axis=0)

"""Helpers for operations with one number a channel: tiles of (rows, C), loads, sums of partial sums.

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

NO_SUMS = {"OWN_GAMMA": False, "SHARES": 1, "BLOCKS": 1, "BLOCK_T": 1, "BLOCK_S": 1}
"""Constants of a pass that finishes no sums."""
ELEMENTS = 4096
"""Elements of a tile of four warps: 32 a thread, four 16-byte loads of bf16 in flight for each tensor that is read."""

LINE = 32
"""Counters of a cache line of 128 bytes: what is asked for often has one of its own."""
CLAIMED = tl.constexpr(0)
"""Place of the counter of shares that a program has taken."""
DONE = tl.constexpr(LINE)
"""Place of the counter of blocks of channels whose vectors are written."""
ARRIVED = tl.constexpr(2 * LINE)
"""Place of the counters, one a block of channels, of shares that are summed."""


class ChannelTile(NamedTuple):
    """Tile of BLOCK_N rows × BLOCK_C channels a step, `steps` steps a program."""

    BLOCK_N: int
    BLOCK_C: int
    steps: int

    def programs(self, rows: int) -> int:
        """Count the row tiles of one member."""
        return cdiv(rows, self.BLOCK_N * self.steps)

    def blocks(self, C: int) -> int:
        """Count the tiles over C channels."""
        return cdiv(C, self.BLOCK_C)


def channel_block(C: int, largest: int = 64) -> int:
    """Choose a tile's channels, a power of 2 in [8, largest]: one that divides C if 16 or more does, else with masks.

    64 channels of bf16 are one line of 128 bytes; with more, a tile's vectors would go through shared memory.
    """
    divisor = C & -C
    return min(divisor if divisor >= 16 else max(8, power_of_2(C)), 256 if launching.INTERPRETED else largest)


def channel_tile(members: int, rows: int, C: int, *, steps: int = 1) -> ChannelTile:
    """Choose the tile for (members, rows, C); interpreted, one so large that a launch has few programs."""
    BLOCK_C = channel_block(C)
    BLOCK_N = max(1, min(ELEMENTS // BLOCK_C, power_of_2(cdiv(rows, steps))))
    if launching.INTERPRETED:
        most = launching.MAX_INTERPRETED_PROGRAMS // max(1, members * cdiv(C, BLOCK_C))
        while cdiv(rows, BLOCK_N * steps) > max(1, most) and BLOCK_N * BLOCK_C < MAX_TILE:
            BLOCK_N *= 2
    return ChannelTile(BLOCK_N, BLOCK_C, steps)


def sums_options(rows: int, C: int) -> dict[str, int]:
    """Choose BLOCK_T, BLOCK_C and num_warps for `sum_partials` over `rows` sums, by one program a block of channels.

    A program takes eight channels, one sector of 32 bytes, so that many share the work; 1024 rows of both sums are
    64 KB in flight, about what one multiprocessor needs to draw its share of the L2's rate.
    """
    BLOCK_C = channel_block(C, 8)
    BLOCK_T = min(power_of_2(rows), (MAX_TILE if launching.INTERPRETED else 8192) // BLOCK_C)
    return {"BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C, "num_warps": min(16, max(1, BLOCK_T * BLOCK_C // 512))}


def sums_shared_options(rows: int, C: int, groups: int) -> dict[str, int]:
    """Choose SHARES, BLOCKS, BLOCK_T and BLOCK_C for `sum_share`: `rows` partial sums of each group in SHARES shares.

    A share is some 128 rows of eight channels, read in one go: with 4096 rows of 64 channels, 256 programs sum them in
    the time of two reads of the L2, where eight programs would take dozens of reads in a row.
    """
    BLOCK_C = channel_block(C, 8)
    SHARES = min(2 if launching.INTERPRETED else 32, power_of_2(cdiv(rows, 128)))
    largest = MAX_TILE // BLOCK_C if launching.INTERPRETED else 128
    # never 32 rows: ptxas then reckons with 96 registers for the pass around it, and spills two
    BLOCK_T = min(largest, max(64, power_of_2(cdiv(rows, SHARES))))
    return {"SHARES": SHARES, "BLOCKS": groups * cdiv(C, BLOCK_C), "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C}


def num_counters(C: int, groups: int = 1) -> int:
    """Length of the int32 counters of one launch that finishes sums over `C` channels: `CLAIMED`, `DONE`, `ARRIVED`."""
    return ARRIVED.value + LINE * cdiv(groups * cdiv(C, 8), LINE)


def over_pixels(v: Tensor, x: Tensor) -> Tensor:
    """Shape a vector (G, C) to broadcast against x (M, …, C)."""
    return v.view(-1, *[1] * (x.ndim - 2), x.shape[-1])


def check_activations(x: Tensor, name: str, shape: torch.Size | None = None) -> None:
    """Raise ValueError unless `x` is contiguous bf16 or fp32, (M, …, C) or of `shape`."""
    shown = "(M, …, C)" if shape is None else str(tuple(shape))
    fits = x.ndim >= 2 if shape is None else x.shape == shape
    right = fits and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()
    check(right, name, f"a contiguous float32 or bfloat16 tensor {shown}", x)


def check_vectors(v: Tensor, name: str, members: int, C: int) -> None:
    """Raise ValueError unless `v` is contiguous fp32 (1, C) or (members, C)."""
    right = v.shape in ((1, C), (members, C)) and v.dtype == torch.float32 and v.is_contiguous()
    check(right, name, f"contiguous float32 (1, {C}) or ({members}, {C})", v)


def check_gamma(v: Tensor, name: str, members: int, C: int, per_member: bool) -> None:
    """Raise ValueError unless `v` is contiguous fp32 (C,), or with `per_member` (members, C)."""
    right = v.shape == (C,) or (per_member and v.shape == (members, C))
    expected = f"contiguous float32 ({C},)" + (f" or ({members}, {C})" if per_member else "")
    check(right and v.dtype == torch.float32 and v.is_contiguous(), name, expected, v)


def check_sums(sums_MT2C: Tensor, count: int) -> None:
    """Raise ValueError unless `sums_MT2C` are contiguous fp32 partial sums and `count` is positive."""
    right = sums_MT2C.ndim == 4 and sums_MT2C.shape[2] == 2 and sums_MT2C.dtype == torch.float32
    check(right and sums_MT2C.is_contiguous(), "sums_MT2C", "contiguous float32 partial sums (M, T, 2, C)", sums_MT2C)
    check(0 not in sums_MT2C.shape, "sums_MT2C", "at least one partial sum", sums_MT2C)
    check(count > 0, "count", "a positive number of values", count)


def check_counters(counters: Tensor | None, C: int, groups: int, like: Tensor) -> None:
    """Raise ValueError unless `counters` is None or int32 of `num_counters(C, groups)` or more, beside `like`."""
    if counters is not None:
        right = counters.dtype == torch.int32 and counters.ndim == 1 and counters.is_contiguous()
        right = right and len(counters) >= num_counters(C, groups) and counters.device == like.device
        check(right, "counters", f"contiguous int32 ({num_counters(C, groups)},) on {like.device}", counters)


@triton.jit
def load_f32(p, m, MASKED: tl.constexpr):
    """Load as fp32; without a mask where there is nothing to mask, which keeps the loads wide."""
    return load(p, m, MASKED).to(tl.float32)


@triton.jit
def load(p, m, MASKED: tl.constexpr):
    """Load in the type that is stored."""
    return tl.load(p, mask=m, other=0.0) if MASKED else tl.load(p)


@triton.jit
def load_vector(p, m, MASKED: tl.constexpr):
    """Load what another program of this launch may have written: see `publish`."""
    return tl.load(p, mask=m, other=0.0, cache_modifier=".cg") if MASKED else tl.load(p, cache_modifier=".cg")


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


@triton.jit
def sum_share(
    p_sums,
    p_shares,  # (BLOCKS, SHARES, 2, BLOCK_C) fp64
    p_counters,
    i_share,  # of BLOCKS · SHARES
    rows,
    C,
    SHARES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum one share of a group's partial sums (G, rows, 2, C); whoever sums the last of a block adds up its shares.

    Returns: whether that was it, group and channels of the block, and then both sums, vectors (BLOCK_C,) in fp64. The
    order of all additions depends on rows and C alone. No program waits for another here.
    """
    BLOCKS_C = tl.cdiv(C, BLOCK_C)
    i_block = i_share // SHARES
    i_g = i_block // BLOCKS_C
    o_c = i_block % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    length = tl.cdiv(rows, SHARES)
    i_first = i_share % SHARES * length
    p_first = p_sums + (i_g.to(tl.int64) * rows + i_first) * (2 * C)
    b_0, b_1 = sum_partials(p_first, tl.minimum(length, rows - i_first), o_c, C, BLOCK_T, BLOCK_C)
    is_last = True
    if SHARES > 1:
        o_block = tl.arange(0, BLOCK_C)
        tl.store(p_shares + i_share * (2 * BLOCK_C) + o_block, b_0)
        tl.store(p_shares + i_share * (2 * BLOCK_C) + BLOCK_C + o_block, b_1)
        is_last = publish(p_counters + ARRIVED + i_block) == SHARES - 1
        if is_last:
            o_shares = (i_block * SHARES + tl.arange(0, SHARES))[:, None] * (2 * BLOCK_C) + o_block[None, :]
            b_0 = tl.sum(tl.load(p_shares + o_shares, cache_modifier=".cg"), axis=0)
            b_1 = tl.sum(tl.load(p_shares + o_shares + BLOCK_C, cache_modifier=".cg"), axis=0)
    return is_last, i_g, o_c, b_0, b_1


# Handing memory from program to program, as in the PTX ISA, "Memory Consistency Model" (sections on release and acquire
# patterns, synchronisation, causality order): what all threads of a program stored before bar.sync (debug_barrier)
# precedes the atomic that its first thread does after it. That is a release at gpu scope; an acquire at gpu scope that
# reads its value, or one that further atomics made of it, synchronises with it, and precedes what any thread of its
# program loads after the bar.sync that follows. Causality order is transitive, hence stores precede loads. Triton's
# own barriers only guard shared memory, so both are written here. It runs a scalar atomic in one thread and hands the
# result to all, so that no loop on it can part the threads of a program. Loads are marked .cg, which never looks into
# a multiprocessor's own cache, which is not coherent.


@triton.jit
def publish(p_counter):
    """Count one at `p_counter`, before which all threads' stores are; what others counted before is seen after it."""
    tl.debug_barrier()
    count = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return count


@triton.jit
def claim(p_counters):
    """Take the next share that nobody has; the number of shares, or more, where all are taken."""
    return tl.atomic_add(p_counters + CLAIMED, 1, sem="relaxed", scope="gpu")


@triton.jit
def is_done(p_counters, BLOCKS: tl.constexpr):
    """Tell whether all BLOCKS of channels are done; if so, their vectors are seen after it."""
    count = tl.atomic_add(p_counters + DONE, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return count == BLOCKS


@triton.jit
def await_done(p_counters, BLOCKS: tl.constexpr):
    """Wait until all BLOCKS of channels are done, whose vectors are seen after it.

    Only to be called where every share has been claimed: by programs that are running, then, and that wait for nobody.
    So this ends however few programs run at a time and in whatever order they start, one after another included.
    """
    while not is_done(p_counters, BLOCKS):
        pass

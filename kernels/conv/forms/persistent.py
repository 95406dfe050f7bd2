"""Member-batched convolution of stride 1 by programs that stay: a warp fetches, warpgroups multiply, tile after tile.

    acc[m, n] = Σ over taps (kh, kw), channels c of x[h(m) + kh − P, w(m) + kw − P, b(m), c] · w[e, kh, kw, c, n]

and, TRANSPOSED, the input gradient: the same with w[e, k − 1 − kh, k − 1 − kw, n, c]. x (M, B, H, W, READ), shared by
all members or not, 0 outside the image; everything bf16, sums in fp32. A tile is TW pixels of a row of 64 images each
by BLOCK_N columns, and each multiplying warpgroup has two of those pixels, a wgmma of 64 rows each.

The producer loads a row of taps at a time: TW + K − 1 boxes of one pixel, 64 images and 64 channels each, from which
the K taps of that row take TW each, so that no pixel is fetched K times; and beside it K tiles of weights, each in a
ring of its own. It runs ahead through the end of a tile into the next, which an ordinary program cannot: the epilogue
of one tile passes while the next one's first boxes arrive.

    bytes a row of taps     8192 · (TW + K − 1) + 2 · K · 64 · BLOCK_N        from L2 mostly
    FLOP a row of taps      2 · 64 · TW · K · 64 · BLOCK_N

With 256 × 128 (TW 4) and K 3 that is 128 FLOP a byte, where boxes of 256 × 128 fetched a tap at a time have 85 and of
128 × 128 have 64; with 128 × 128, of which two programs share a multiprocessor, 77. What is read and written of memory
is that of `member_conv` and its input gradient, whose epilogues these are.

As compiled for sm_90 by Triton 3.6 and 3.8, with everything the epilogues can do: no spill; 168 registers a thread (128
where two programs share a multiprocessor), of which the producer hands over all but PRODUCER_REGISTERS; shared memory
201,864 bytes for 256 × 128 with 2 stages, 218,240 with 3, 101,444 for 128 × 128; eight HGMMA m64 n128 k16 a tap and
warpgroup, in flight while the next tap's tiles are waited for, and two or three barriers of its four warps.

Only a GPU can tell whether the numbers are right in every order in which warps can meet, and whether it is faster. So
it is a candidate that the tuner takes where it has measured both, never a default. It knows no prologue.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ensdistill.kernels.conv.forms.descriptors import epilogue_arguments
from ensdistill.kernels.conv.tiles import (
    PERSISTENT_IMAGES,
    Tile,
    multiprocessors,
    persistent_programs,
    persistent_rings,
)
from ensdistill.kernels.epilogue import Epilogue
from ensdistill.kernels.launch import cdiv, check, launch

PRODUCER_REGISTERS = gl.constexpr(40)
"""Registers a thread of the producer warp."""
CONSUMER_REGISTERS = gl.constexpr(232)
"""Registers a thread of the second multiplying warpgroup; the first has what is left, which is as many."""
PART = gl.constexpr(32)
"""Columns that the epilogue takes at a time: what it loads takes registers beside the whole accumulator."""
LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [64, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[128, 32],
    )
)
"""Layout of the epilogue's tile (2 pixels · 64 images, PART): a warp keeps the rows that wgmma gave it, a thread has
eight channels side by side."""
BITS_LAYOUT = gl.constexpr(
    gl.SliceLayout(
        2,
        gl.DistributedLinearLayout(
            reg_bases=[[0, 0, 1], [0, 0, 2], [0, 0, 4], [8, 0, 0], [64, 0, 0]],
            lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
            warp_bases=[[16, 0, 0], [32, 0, 0]],
            block_bases=[],
            shape=[128, 4, 8],
        ),
    )
)
"""Layout of the packed bits (128, PART / 8): a byte is where its eight channels are."""

# of one thing, the names in Triton 3.6 and in 3.8
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
fence_async_shared = hopper.fence_async_shared
warpgroup_mma = hopper.warpgroup_mma
warpgroup_mma_wait = hopper.warpgroup_mma_wait
# the others, which a Triton that lacks them should be found out by here, not by its compiler
_NEEDED = (
    *(gl.warp_specialize, gl.allocate_shared_memory, gl.convert_layout, gl.join, gl.split, gl.permute, gl.reshape),
    *(mbarrier.init, mbarrier.wait, mbarrier.expect, mbarrier.arrive, mbarrier.MBarrierLayout),
    *(gl.shared_memory_descriptor.index, gl.shared_memory_descriptor.reshape, gl.shared_memory_descriptor.permute),
)


@gluon.jit
def place(i, tiles_b, H: gl.constexpr, TILES_W: gl.constexpr, TILES_N: gl.constexpr):
    """Tile `i` -> (member, box of images, row, box of columns, block of channels); neighbours share pixels in L2."""
    i_tile = i // TILES_N
    return (
        i_tile // (TILES_W * H) // tiles_b,
        i_tile // (TILES_W * H) % tiles_b,
        i_tile // TILES_W % H,
        i_tile % TILES_W,
        i % TILES_N,
    )


@gluon.jit
def produce(
    x_ring,
    w_ring,
    x_full,
    x_empty,
    w_full,
    w_empty,
    tiles,
    tiles_b,
    x_MHWBC,
    w_descriptor,
    p_members,
    H: gl.constexpr,
    TILES_W: gl.constexpr,
    TILES_N: gl.constexpr,
    K: gl.constexpr,
    K_BLOCKS: gl.constexpr,
    SHARED: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    TW: gl.constexpr,
    IMAGES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    X_STAGES: gl.constexpr,
    W_STAGES: gl.constexpr,
):
    """The producer: fill the rings, a row of taps and a block of channels at a time; counted over all tiles."""
    PIXELS: gl.constexpr = TW + K - 1
    i_step = 0
    for i in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_member, i_b, i_h, i_w, i_n = place(i, tiles_b, H, TILES_W, TILES_N)
        i_weight = i_member
        if p_members is not None:
            i_weight = gl.load(p_members + i_member).to(gl.int32)
        i_read = i_member
        if SHARED:
            i_read = 0
        for i_row in range(K * K_BLOCKS):
            i_kh, i_k = i_row // K_BLOCKS, i_row % K_BLOCKS * BLOCK_K
            i_slot = i_step % X_STAGES
            # a ring's first round waits for the phase before the first, which counts as over
            mbarrier.wait(x_empty.index(i_slot), (i_step // X_STAGES & 1) ^ 1)
            mbarrier.expect(x_full.index(i_slot), 2 * PIXELS * IMAGES * BLOCK_K)
            for i_pixel in gl.static_range(PIXELS):
                async_load(
                    x_MHWBC,
                    [i_read, i_h + i_kh - K // 2, i_w * TW + i_pixel - K // 2, i_b * IMAGES, i_k],
                    x_full.index(i_slot),
                    x_ring.index(i_slot * PIXELS + i_pixel),
                )
            for i_kw in gl.static_range(K):
                i_load = i_step * K + i_kw
                i_slot = i_load % W_STAGES
                mbarrier.wait(w_empty.index(i_slot), (i_load // W_STAGES & 1) ^ 1)
                mbarrier.expect(w_full.index(i_slot), 2 * BLOCK_N * BLOCK_K)
                i_tap = i_kh * K + i_kw
                if TRANSPOSED:
                    corner = [i_weight * (K * K) + K * K - 1 - i_tap, i_n * BLOCK_N, i_k]
                else:
                    corner = [i_weight * (K * K) + i_tap, i_k, i_n * BLOCK_N]
                async_load(w_descriptor, corner, w_full.index(i_slot), w_ring.index(i_slot))
            i_step += 1


@gluon.jit
def halve(b):
    """The left and the right half of a tile's columns, in the registers where they are."""
    ROWS: gl.constexpr = b.shape[0]
    HALF: gl.constexpr = b.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(b, (ROWS, 2, HALF)), (0, 2, 1)))


@gluon.jit
def one_below_the_other(b_upper, b_lower):
    """Two tiles (64, PART) as one (128, PART), neighbouring channels in one thread."""
    ROWS: gl.constexpr = 2 * b_upper.shape[0]
    COLUMNS: gl.constexpr = b_upper.shape[1]
    b = gl.reshape(gl.permute(gl.join(b_upper, b_lower), (2, 0, 1)), (ROWS, COLUMNS))
    return gl.convert_layout(b, LAYOUT)


@gluon.jit
def load_channels(p, i_weight, o_n, C: gl.constexpr, ROW: gl.constexpr, MASK_N: gl.constexpr):
    """Load a vector of channels as a row (1, N), as `epilogue.load_vector` does in Triton."""
    if MASK_N:
        return gl.load(p + i_weight * ROW + o_n, mask=o_n < C, other=0.0)[None, :]
    else:
        return gl.load(p + i_weight * ROW + o_n)[None, :]


@gluon.jit
def store_sums(
    p_sums, b_first, b_second, m_tile, i_entry, o_n, C: gl.constexpr, MASK_M: gl.constexpr, MASK_N: gl.constexpr
):
    """Store Σ first and Σ second of a tile, as `epilogue.store_sums` does in Triton."""
    if MASK_M:
        b_first = gl.where(m_tile, b_first, 0.0)
        b_second = gl.where(m_tile, b_second, 0.0)
    p_sums += i_entry * (2 * C) + o_n
    if MASK_N:
        gl.store(p_sums, gl.sum(b_first, axis=0), mask=o_n < C)
        gl.store(p_sums + C, gl.sum(b_second, axis=0), mask=o_n < C)
    else:
        gl.store(p_sums, gl.sum(b_first, axis=0))
        gl.store(p_sums + C, gl.sum(b_second, axis=0))


@gluon.jit
def tile_mask(m_pixel, o_n, C: gl.constexpr, MASK_M: gl.constexpr, MASK_N: gl.constexpr, OF: gl.constexpr):
    """`epilogue.tile_mask` of a tile with layout OF."""
    m_tile = gl.full((m_pixel.shape[0], o_n.shape[0]), True, gl.int1, layout=OF)
    if MASK_M:
        m_tile &= m_pixel[:, None]
    if MASK_N:
        m_tile &= (o_n < C)[None, :]
    return m_tile


@gluon.jit
def forward_part(
    b_acc, i_member, i_weight, o_pixel, m_pixel, o_bits_pixel, m_bits_pixel, i_first, pixels, i_entry,
    p_y, p_z, p_sums, p_bits, p_bias, p_residual, p_a, p_b,
    CO: gl.constexpr, RELU: gl.constexpr, BITS: gl.constexpr, BIAS_ROW: gl.constexpr, SECOND_ROW: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """`epilogue.forward_epilogue` of PART columns from `i_first` on."""
    ROWS: gl.constexpr = b_acc.shape[0]
    COLUMNS: gl.constexpr = b_acc.shape[1]
    o_n = i_first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    o_y = o_pixel[:, None] * CO + o_n[None, :]
    m_y = tile_mask(m_pixel, o_n, CO, MASK_M, MASK_N, LAYOUT)
    i_start = i_member * pixels * CO
    if p_bias is not None:
        b_acc += load_channels(p_bias, i_weight, o_n, CO, BIAS_ROW, MASK_N)
    if p_residual is not None:
        b_acc += gl.load(p_residual + i_start + o_y, mask=m_y).to(gl.float32)
    if RELU:
        b_acc = gl.where(b_acc < 0.0, 0.0, b_acc)  # NaN stays
    if p_y is not None:
        b_y = b_acc.to(p_y.dtype.element_ty)
        gl.store(p_y + i_start + o_y, b_y, mask=m_y)
    else:
        b_y = b_acc.to(p_z.dtype.element_ty)
    if p_z is not None or p_sums is not None or BITS > 0:
        b_acc = b_y.to(gl.float32)
    if p_sums is not None:
        store_sums(p_sums, b_acc, b_acc * b_acc, m_y, i_entry, o_n, CO, MASK_M, MASK_N)
    if p_z is not None:
        b_acc *= load_channels(p_a, i_weight, o_n, CO, SECOND_ROW, MASK_N)
        b_acc += load_channels(p_b, i_weight, o_n, CO, SECOND_ROW, MASK_N)
        b_acc = gl.where(b_acc < 0.0, 0.0, b_acc)
        b_z = b_acc.to(p_z.dtype.element_ty)
        gl.store(p_z + i_start + o_y, b_z, mask=m_y)
        b_acc = b_z.to(gl.float32)
    if BITS > 0:  # noqa: SIM102 (the one is compile time, the other is not)
        if i_member < BITS:
            if MASK_N:
                b_acc = gl.where((o_n < CO)[None, :], b_acc, 0.0)
            BYTES: gl.constexpr = (CO + 7) // 8
            b_bits = gl.reshape((b_acc > 0.0).to(gl.int32), (ROWS, COLUMNS // 8, 8))
            b_bits = gl.sum(b_bits << gl.arange(0, 8)[None, None, :], axis=2).to(gl.uint8)
            o_byte = i_first // 8 + gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, BITS_LAYOUT))
            gl.store(
                p_bits + i_member * pixels * BYTES + o_bits_pixel[:, None] * BYTES + o_byte[None, :],
                gl.convert_layout(b_bits, BITS_LAYOUT),
                mask=tile_mask(m_bits_pixel, o_byte, BYTES, MASK_M, MASK_N, BITS_LAYOUT),
            )


@gluon.jit
def input_gradient_part(
    b_acc, i_member, i_weight, o_pixel, m_pixel, o_bits_pixel, m_bits_pixel, i_first, pixels, i_entry,
    p_dx, p_sums, p_before, p_bits, p_x, p_a, p_b, p_scale, p_after,
    CI: gl.constexpr, NORM_ROW: gl.constexpr, SCALE_ROW: gl.constexpr,
    MASK_M: gl.constexpr, MASK_N: gl.constexpr,
):  # fmt: skip
    """`epilogue.input_gradient_epilogue` of PART columns from `i_first` on."""
    ROWS: gl.constexpr = b_acc.shape[0]
    COLUMNS: gl.constexpr = b_acc.shape[1]
    o_n = i_first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    o_x = o_pixel[:, None] * CI + o_n[None, :]
    m_x = tile_mask(m_pixel, o_n, CI, MASK_M, MASK_N, LAYOUT)
    i_start = i_member * pixels * CI
    if p_before is not None:
        b_acc += gl.load(p_before + i_start + o_x, mask=m_x).to(gl.float32)
    if p_bits is not None:
        BYTES: gl.constexpr = (CI + 7) // 8
        o_byte = i_first // 8 + gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, BITS_LAYOUT))
        b_bits = gl.load(
            p_bits + i_member * pixels * BYTES + o_bits_pixel[:, None] * BYTES + o_byte[None, :],
            mask=tile_mask(m_bits_pixel, o_byte, BYTES, MASK_M, MASK_N, BITS_LAYOUT),
        ).to(gl.int32)
        b_keep = gl.reshape((b_bits[:, :, None] >> gl.arange(0, 8)[None, None, :]) & 1, (ROWS, COLUMNS))
        b_acc = gl.where(gl.convert_layout(b_keep, LAYOUT) != 0, b_acc, 0.0)
    if p_x is not None:
        b_x = gl.load(p_x + i_start + o_x, mask=m_x).to(gl.float32)
        if p_bits is None:
            b_a = load_channels(p_a, i_weight, o_n, CI, NORM_ROW, MASK_N)
            b_b = load_channels(p_b, i_weight, o_n, CI, NORM_ROW, MASK_N)
            b_acc = gl.where(b_a * b_x + b_b > 0.0, b_acc, 0.0)
        if p_scale is None and p_after is None:  # of what is stored
            b_acc = b_acc.to(p_dx.dtype.element_ty).to(gl.float32)
        store_sums(p_sums, b_acc, b_acc * b_x, m_x, i_entry, o_n, CI, MASK_M, MASK_N)
    if p_scale is not None:
        b_acc *= load_channels(p_scale, i_weight, o_n, CI, SCALE_ROW, MASK_N)
    if p_after is not None:
        b_acc += gl.load(p_after + i_start + o_x, mask=m_x).to(gl.float32)
    gl.store(p_dx + i_start + o_x, b_acc.to(p_dx.dtype.element_ty), mask=m_x)


@gluon.jit
def consume(
    x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, tiles_b, B, p_members,
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
    H: gl.constexpr, W: gl.constexpr, COLUMNS: gl.constexpr, TILES_W: gl.constexpr, TILES_N: gl.constexpr,
    K: gl.constexpr, K_BLOCKS: gl.constexpr, TRANSPOSED: gl.constexpr, RELU: gl.constexpr, BITS: gl.constexpr,
    BIAS_ROW: gl.constexpr, SECOND_ROW: gl.constexpr, NORM_ROW: gl.constexpr, SCALE_ROW: gl.constexpr,
    MASK_M: gl.constexpr, TW: gl.constexpr, IMAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, CONSUMERS: gl.constexpr, I_CONSUMER: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: pixels 2·I_CONSUMER and the next of every tile, in step with the producer's counts."""
    PIXELS: gl.constexpr = TW + K - 1
    PARTS: gl.constexpr = BLOCK_N // PART
    ACCUMULATOR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    MASK_N: gl.constexpr = COLUMNS % BLOCK_N != 0
    o_m = gl.arange(0, 2 * IMAGES, layout=gl.SliceLayout(1, LAYOUT))
    o_bits = gl.arange(0, 2 * IMAGES, layout=gl.SliceLayout(1, BITS_LAYOUT))
    i_step = 0
    for i in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_member, i_b, i_h, i_w, i_n = place(i, tiles_b, H, TILES_W, TILES_N)
        b_first = gl.zeros((IMAGES, BLOCK_N), gl.float32, layout=ACCUMULATOR)
        b_second = gl.zeros((IMAGES, BLOCK_N), gl.float32, layout=ACCUMULATOR)
        for i_row in range(K * K_BLOCKS):
            i_slot = i_step % X_STAGES
            mbarrier.wait(x_full.index(i_slot), i_step // X_STAGES & 1)
            for i_kw in gl.static_range(K):
                i_load = i_step * K + i_kw
                mbarrier.wait(w_full.index(i_load % W_STAGES), i_load // W_STAGES & 1)
                i_pixel = i_slot * PIXELS + i_kw + 2 * I_CONSUMER
                b_x = x_ring.index(i_pixel).reshape([IMAGES, BLOCK_K])
                b_next = x_ring.index(i_pixel + 1).reshape([IMAGES, BLOCK_K])
                if TRANSPOSED:
                    b_w = w_ring.index(i_load % W_STAGES).reshape([BLOCK_N, BLOCK_K]).permute([1, 0])
                else:
                    b_w = w_ring.index(i_load % W_STAGES).reshape([BLOCK_K, BLOCK_N])
                b_first = warpgroup_mma(b_x, b_w, b_first, is_async=True)
                b_second = warpgroup_mma(b_next, b_w, b_second, is_async=True)
                b_first, b_second = warpgroup_mma_wait(num_outstanding=2, deps=[b_first, b_second])
                # the products of the tap before this one have read their tiles, in all four warps
                barrier()
                mbarrier.arrive(w_empty.index((i_load + W_STAGES - 1) % W_STAGES), pred=i_row + i_kw > 0)
                if i_kw == 0:
                    mbarrier.arrive(x_empty.index((i_step + X_STAGES - 1) % X_STAGES), pred=i_row > 0)
            i_step += 1
        b_first, b_second = warpgroup_mma_wait(num_outstanding=0, deps=[b_first, b_second])
        barrier()
        mbarrier.arrive(w_empty.index((i_step * K - 1) % W_STAGES))
        mbarrier.arrive(x_empty.index((i_step - 1) % X_STAGES))

        i_weight = i_member.to(gl.int64)
        if p_members is not None:
            i_weight = gl.load(p_members + i_member)
        i_tile = (i_b * H + i_h) * TILES_W + i_w
        i_entry = (i_member.to(gl.int64) * tiles_b * (H * TILES_W) + i_tile) * CONSUMERS + I_CONSUMER
        i_column = i_w * TW + 2 * I_CONSUMER
        o_pixel = ((i_b * IMAGES + o_m % IMAGES) * H + i_h) * W + i_column + o_m // IMAGES
        m_pixel = (i_b * IMAGES + o_m % IMAGES < B) & (i_column + o_m // IMAGES < W)
        o_bits_pixel = ((i_b * IMAGES + o_bits % IMAGES) * H + i_h) * W + i_column + o_bits // IMAGES
        m_bits_pixel = (i_b * IMAGES + o_bits % IMAGES < B) & (i_column + o_bits // IMAGES < W)
        for i_part in gl.static_range(PARTS):
            b_upper, b_lower = b_first, b_second
            if PARTS == 2:
                b_upper, b_lower = halve(b_upper)[i_part], halve(b_lower)[i_part]
            if PARTS == 4:
                b_upper = halve(halve(b_upper)[i_part // 2])[i_part % 2]
                b_lower = halve(halve(b_lower)[i_part // 2])[i_part % 2]
            b_acc = one_below_the_other(b_upper, b_lower)
            if TRANSPOSED:
                input_gradient_part(
                    b_acc, i_member.to(gl.int64), i_weight, o_pixel, m_pixel, o_bits_pixel, m_bits_pixel,
                    i_n * BLOCK_N + i_part * PART, B * (H * W), i_entry, p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
                    COLUMNS, NORM_ROW, SCALE_ROW, MASK_M, MASK_N,
                )  # fmt: skip
            else:
                forward_part(
                    b_acc, i_member.to(gl.int64), i_weight, o_pixel, m_pixel, o_bits_pixel, m_bits_pixel,
                    i_n * BLOCK_N + i_part * PART, B * (H * W), i_entry, p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7,
                    COLUMNS, RELU, BITS, BIAS_ROW, SECOND_ROW, MASK_M, MASK_N,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["tiles"])
def member_conv_persistent_kernel(
    x_MHWBC,  # descriptor, boxes (1, 1, 1, IMAGES, BLOCK_K)
    w_descriptor,  # (E·K·K, READ, COLUMNS) in boxes (1, BLOCK_K, BLOCK_N), TRANSPOSED (E·K·K, COLUMNS, READ)
    p_members,
    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
    B,
    tiles,  # of all members
    H: gl.constexpr, W: gl.constexpr, READ: gl.constexpr, COLUMNS: gl.constexpr, K: gl.constexpr,
    SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, RELU: gl.constexpr, BITS: gl.constexpr, BIAS_ROW: gl.constexpr,
    SECOND_ROW: gl.constexpr, NORM_ROW: gl.constexpr, SCALE_ROW: gl.constexpr, MASK_M: gl.constexpr,
    TW: gl.constexpr, IMAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr,
):  # fmt: skip
    CONSUMERS: gl.constexpr = TW // 2
    K_BLOCKS: gl.constexpr = (READ + BLOCK_K - 1) // BLOCK_K
    TILES_W: gl.constexpr = (W + TW - 1) // TW
    TILES_N: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [X_STAGES * (TW + K - 1), 1, 1, 1, IMAGES, BLOCK_K], x_MHWBC.layout)
    if TRANSPOSED:
        w_ring = gl.allocate_shared_memory(gl.bfloat16, [W_STAGES, 1, BLOCK_N, BLOCK_K], w_descriptor.layout)
    else:
        w_ring = gl.allocate_shared_memory(gl.bfloat16, [W_STAGES, 1, BLOCK_K, BLOCK_N], w_descriptor.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    tiles_b = (B + IMAGES - 1) // IMAGES
    # a name or a sum of tuples would make variables of the constants: all of them stand here
    gl.warp_specialize(
        [
            (
                consume,
                (
                    x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, tiles_b, B, p_members,
                    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
                    H, W, COLUMNS, TILES_W, TILES_N, K, K_BLOCKS, TRANSPOSED, RELU, BITS, BIAS_ROW, SECOND_ROW,
                    NORM_ROW, SCALE_ROW, MASK_M, TW, IMAGES, BLOCK_N, BLOCK_K, X_STAGES, W_STAGES, CONSUMERS,
                    CONSUMERS - 1,
                ),
            ),
            (
                consume,
                (
                    x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, tiles_b, B, p_members,
                    p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
                    H, W, COLUMNS, TILES_W, TILES_N, K, K_BLOCKS, TRANSPOSED, RELU, BITS, BIAS_ROW, SECOND_ROW,
                    NORM_ROW, SCALE_ROW, MASK_M, TW, IMAGES, BLOCK_N, BLOCK_K, X_STAGES, W_STAGES, CONSUMERS,
                    0,
                ),
            ),
            (
                produce,
                (
                    x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, tiles_b, x_MHWBC, w_descriptor, p_members,
                    H, TILES_W, TILES_N, K, K_BLOCKS, SHARED, TRANSPOSED, TW, IMAGES, BLOCK_N, BLOCK_K, X_STAGES,
                    W_STAGES,
                ),
            ),
        ][2 - CONSUMERS :],
        [4, 1][2 - CONSUMERS :],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS][2 - CONSUMERS :],
    )  # fmt: skip


def launch_persistent(
    x: Tensor,
    w_EKKIO: Tensor,
    members: Tensor | None,
    epilogue: Epilogue,
    *,
    M: int,
    transposed: bool,
    tile: Tile,
) -> None:
    """Convolve x with w, or `transposed` dy with w flipped, into the epilogue's outputs; bf16, stride 1."""
    E, K, _, CI, CO = w_EKKIO.shape
    B, H, W, READ = x.shape[-4:]
    COLUMNS = CI if transposed else CO
    check(x.dtype == torch.bfloat16, "tile", "another form for a type other than bfloat16", x)
    right = READ % 8 == 0 and CO % 8 == 0 and x.data_ptr() % 16 == 0
    check(right, "tile", "the POINTERS form for channels or a tensor that are no whole 16 bytes", x)
    x_stages, w_stages = persistent_rings(tile, K)
    TW = tile.BLOCK_M // PERSISTENT_IMAGES
    total = M * cdiv(B, PERSISTENT_IMAGES) * H * cdiv(W, TW) * cdiv(COLUMNS, tile.BLOCK_N)
    programs = persistent_programs(tile)
    pointers, flags = epilogue_arguments(epilogue, None)
    del flags["PROLOGUE_ROW"]
    x_MHWBC = (x if x.ndim == 5 else x[None]).permute(0, 2, 3, 1, 4)
    launch(
        member_conv_persistent_kernel,
        (min(total, programs * multiprocessors(x.device)),),
        _descriptor(x_MHWBC, [1, 1, 1, PERSISTENT_IMAGES, tile.BLOCK_K]),
        _descriptor(
            w_EKKIO.view(E * K * K, CI, CO),
            [1, tile.BLOCK_N, tile.BLOCK_K] if transposed else [1, tile.BLOCK_K, tile.BLOCK_N],
        ),
        members,
        *pointers,
        B,
        total,
        H=H,
        W=W,
        READ=READ,
        COLUMNS=COLUMNS,
        K=K,
        SHARED=x.ndim == 4,
        TRANSPOSED=transposed,
        MASK_M=B % PERSISTENT_IMAGES != 0 or W % TW != 0,
        **flags,
        TW=TW,
        IMAGES=PERSISTENT_IMAGES,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        X_STAGES=x_stages,
        W_STAGES=w_stages,
        num_warps=4,
        maxnreg=65536 // (32 * (tile.num_warps + 4) * programs) // 8 * 8,
    )


def _descriptor(tensor: Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(box))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)

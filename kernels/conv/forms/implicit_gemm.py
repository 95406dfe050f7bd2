"""The loop that every convolution by pointers runs: a tile of pixels × channels, summed over taps and channels read.

    acc[m, n] += Σ over taps t, channels c of x'[pixel(m) + offset(t), c] · w[tap(t), c, n]

x' is x, or with a prologue relu(a·x + b) rounded to x's type; 0 outside the image, prologue or not. The forward, the
input gradient of stride 1 (taps from last to first, w transposed) and of stride 2 (the taps that meet a parity of
(h, w), pixels walked backwards) are this loop with other numbers. x is read once a tap, from L2 mostly; w once a tile
of pixels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def implicit_gemm(
    b_acc,  # (BLOCK_M, BLOCK_N) fp32
    p_x,  # the member's pixels, (…, HEIGHT, WIDTH, READ)
    p_w,  # the member's weights, (taps, READ, COLUMNS), or TRANSPOSED (taps, COLUMNS, READ)
    p_a,
    p_b,  # the member's prologue or None, (READ,)
    o_pixel,
    o_h,
    o_w,  # (BLOCK_M,) int32: number, row and column of the pixel under the first tap; may lie outside
    m_pixel,  # (BLOCK_M,) bool
    o_n,  # (BLOCK_N,) int32: columns
    i_first,  # weights of the first tap
    taps_h,
    taps_w,
    step_h,
    step_w,  # weights from one tap to the next
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    READ: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIRECTION: tl.constexpr,  # pixels from one tap to the next, 1 or -1
    TRANSPOSED: tl.constexpr,
    INSIDE: tl.constexpr,  # no tap of an existing pixel lies outside
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K_BLOCKS: tl.constexpr = (READ + BLOCK_K - 1) // BLOCK_K
    MASK_K: tl.constexpr = READ % BLOCK_K != 0
    for i_k in range(taps_h * taps_w * K_BLOCKS):
        i_tap = i_k // K_BLOCKS
        i_h = i_tap // taps_w
        i_w = i_tap - i_h * taps_w
        o_k = (i_k % K_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)

        p_tile = p_x + (o_pixel + DIRECTION * (i_h * WIDTH + i_w))[:, None] * READ + o_k[None, :]
        if INSIDE:
            m_row = m_pixel
        else:
            o_row, o_column = o_h + DIRECTION * i_h, o_w + DIRECTION * i_w
            m_row = m_pixel & (o_row >= 0) & (o_row < HEIGHT) & (o_column >= 0) & (o_column < WIDTH)
        if INSIDE and not MASK_M and not MASK_K:
            b_x = tl.load(p_tile)
        else:
            m_x = tl.broadcast_to(m_row[:, None], p_tile.shape)
            if MASK_K:
                m_x &= (o_k < READ)[None, :]
            b_x = tl.load(p_tile, mask=m_x, other=0.0)
        if p_a is not None:
            if MASK_K:
                b_a = tl.load(p_a + o_k, mask=o_k < READ, other=0.0)
                b_b = tl.load(p_b + o_k, mask=o_k < READ, other=0.0)
            else:
                b_a = tl.load(p_a + o_k)
                b_b = tl.load(p_b + o_k)
            b_wide = b_x.to(tl.float32) * b_a[None, :] + b_b[None, :]
            b_wide = tl.maximum(b_wide, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if not INSIDE:  # relu(b) is not 0; of rows that do not exist nothing is stored
                b_wide = tl.where(m_row[:, None], b_wide, 0.0)
            b_x = b_wide.to(p_x.dtype.element_ty)

        i_weight = i_first + i_h * step_h + i_w * step_w
        if TRANSPOSED:
            p_tile = p_w + (i_weight * COLUMNS + o_n)[:, None] * READ + o_k[None, :]
            if MASK_N or MASK_K:
                b_w = tl.load(p_tile, mask=(o_n < COLUMNS)[:, None] & (o_k < READ)[None, :], other=0.0)
            else:
                b_w = tl.load(p_tile)
            b_w = tl.trans(b_w)
        else:
            p_tile = p_w + (i_weight * READ + o_k)[:, None] * COLUMNS + o_n[None, :]
            if MASK_N or MASK_K:
                b_w = tl.load(p_tile, mask=(o_k < READ)[:, None] & (o_n < COLUMNS)[None, :], other=0.0)
            else:
                b_w = tl.load(p_tile)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def flat_gemm(
    b_acc,  # (BLOCK_M, BLOCK_N) fp32
    p_x,
    p_w,
    p_a,
    p_b,
    o_pixel,
    o_h,
    o_w,
    m_pixel,
    o_n,
    K: tl.constexpr,  # side of the kernel
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    READ: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The forward where few channels are read: taps and channels side by side in one product, in steps of BLOCK_K.

    A loop over taps would fill 3 of 16 columns nine times; 7 × 7 taps of 3 channels are 147 columns, five steps of 32.
    Arguments as of `implicit_gemm`.
    """
    if BLOCK_K >= K * K * READ:
        b_acc = _flat_step(
            b_acc, p_x, p_w, p_a, p_b, o_pixel, o_h, o_w, m_pixel, o_n, tl.arange(0, BLOCK_K), K, HEIGHT, WIDTH, READ,
            COLUMNS,
        )  # fmt: skip
    else:
        for i_k in range(0, K * K * READ, BLOCK_K):
            b_acc = _flat_step(
                b_acc, p_x, p_w, p_a, p_b, o_pixel, o_h, o_w, m_pixel, o_n, i_k + tl.arange(0, BLOCK_K), K, HEIGHT,
                WIDTH, READ, COLUMNS,
            )  # fmt: skip
    return b_acc


@triton.jit
def _flat_step(
    b_acc,
    p_x,
    p_w,
    p_a,
    p_b,
    o_pixel,
    o_h,
    o_w,
    m_pixel,
    o_n,
    o_k,  # (BLOCK_K,) int32: flattened (kh, kw, channel)
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    READ: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ROWS: tl.constexpr = K * K * READ
    i_tap = o_k // READ
    i_h, i_w, o_c = i_tap // K, i_tap % K, o_k % READ
    o_row, o_column = o_h[:, None] + i_h[None, :], o_w[:, None] + i_w[None, :]
    m_x = (o_row >= 0) & (o_row < HEIGHT) & (o_column >= 0) & (o_column < WIDTH)
    m_x = m_x & m_pixel[:, None] & (o_k < ROWS)[None, :]
    o_x = (o_pixel[:, None] + (i_h * WIDTH + i_w)[None, :]) * READ + o_c[None, :]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0)
    if p_a is not None:
        b_wide = b_x.to(tl.float32) * tl.load(p_a + o_c)[None, :] + tl.load(p_b + o_c)[None, :]
        b_wide = tl.maximum(b_wide, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_x = tl.where(m_x, b_wide, 0.0).to(p_x.dtype.element_ty)
    m_w = (o_k < ROWS)[:, None] & (o_n < COLUMNS)[None, :]
    b_w = tl.load(p_w + o_k[:, None] * COLUMNS + o_n[None, :], mask=m_w, other=0.0)
    return tl.dot(b_x, b_w, b_acc, input_precision="ieee")

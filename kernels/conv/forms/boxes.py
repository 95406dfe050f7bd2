"""Member-batched convolution of stride 1 whose tiles of x are boxes that the copy engine fetches.

    acc[m, n] = Σ over taps (kh, kw), channels c of x'[h(m) + kh − P, w(m) + kw − P, b(m), c] · w[e, kh, kw, c, n]

and, TRANSPOSED, the input gradient: the same with w[e, k − 1 − kh, k − 1 − kw, n, c]. x' is x (M, B, H, W, READ),
shared by all members or not, or with a prologue relu(a·x + b); 0 outside the image. Loads take no registers, which
leaves them to tiles of 256 × 128. Where the batch allows it a box is one pixel of 128 images: it goes to the tensor
cores straight from shared memory then, and no size of image wastes anything; tiles of 256 are two such pixels.

BOXES load a box, or a PAIR's two, a tap. TAP_ROWS, always pairs, take the three taps of a row in one step: columns
w − 1 … w + 2 are four boxes where a tap at a time loads six, each is part of up to three of the six products, and the
prologue is applied to it once.

Bytes and FLOPs are those of `member_conv` and its input gradient; x and w come from L2 mostly, and its rate is what
binds. What a step brings to shared memory, and what its products read there (source: the shapes; 4,096 FLOP and 128
bytes of shared memory a clock, of which an HGMMA of 64 × n × 16 reads 2 + n/32 KB for n/2 clocks; a sum beyond 128
binds):

    tile                       FLOP a byte of L2    bytes of shared memory a clock at full rate, written + read
    128 × 128                           64          64 + 96     two programs a multiprocessor
    256 × 128, two pixels               85          48 + 96
    128 × 256                           85          48 + 80
    256 × 128, TAP_ROWS                110          37 + 96

So a layer of WRN-28-4 at 128 or 256 channels, 38.7 GFLOP with a floor of 48 µs at 800 TFLOP/s, is predicted, not
measured, to take with an L2 of 5.5 to 7.9 TB/s 77 to 110 µs in tiles of 128 × 128, 58 to 83 µs at 85 FLOP a byte and 48
to 64 µs with TAP_ROWS; one program a multiprocessor adds some 10 to 20 % for an epilogue that overlaps nothing.

In machine code for 9.0 (Triton 3.6) a step of TAP_ROWS has 7 copies and 6 products; four products wait for the one
before, which the other half of the warps fills, where a tap at a time keeps all in flight. It has 64-byte rows (BLOCK_K
32): four stages of 64 channels would be 448 KB, and two leave the copies no time. No option set spills: 154 to 246
registers.

It needs whole 16 bytes: READ a multiple of 8 in bf16, of 4 in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ensdistill.kernels.conv.forms.descriptors import (
    LARGEST_SIDE,
    Box,
    affine_relu,
    choose_box,
    epilogue_arguments,
    finish,
    x_descriptor,
)
from ensdistill.kernels.conv.tiles import TAP_ROWS, Tile
from ensdistill.kernels.epilogue import Epilogue
from ensdistill.kernels.launch import begin, cdiv, check, launch

LARGE_ACCUMULATOR = 64
"""Registers of a thread that a large one takes; whole, one block of 128 × 128 would fit where two should."""


def tile_box(B: int, H: int, W: int, tile: Tile) -> tuple[Box, bool]:
    """(the box of a tile, whether it is a pair of pixels with a product each)."""
    if tile.form != TAP_ROWS:
        box = choose_box(B, H, W, tile.BLOCK_M)
        return box, box.pair
    images = tile.BLOCK_M // 2
    check(images <= LARGEST_SIDE, "tile", f"BLOCK_M of at most {2 * LARGEST_SIDE}", tile)
    return Box(1, 2, images), True


def num_tiles(B: int, H: int, W: int, tile: Tile) -> int:
    """T, the parts that the sums of a member come in."""
    box, pair = tile_box(B, H, W, tile)
    return box.tiles(B, H, W) * (2 if pair else 1)


@triton.jit
def load_affine(p_vector, o_k, READ: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels `o_k` of a vector of the prologue."""
    if READ % BLOCK_K != 0:
        return tl.load(p_vector + o_k, mask=o_k < READ, other=0.0)
    else:
        return tl.load(p_vector + o_k)


@triton.jit
def load_box(x_MHWBC, i_read, i_row, i_column, i_b, i_k, b_a, b_b, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A box of x as (pixels, channels), after the prologue where there is one."""
    b_x = tl.reshape(x_MHWBC.load([i_read, i_row, i_column, i_b, i_k]), (BLOCK_M, BLOCK_K))
    if b_a is not None:
        b_x = affine_relu(b_x, b_a, b_b)
    return b_x


@triton.jit
def member_conv_boxes_kernel(
    x_MHWBC,  # descriptor, boxes (1, TH, TW, BI, BLOCK_K), of a PAIR (1, 1, 1, BI, BLOCK_K)
    w_descriptor,  # (E·K·K, READ, COLUMNS) in boxes (1, BLOCK_K, BLOCK_N), TRANSPOSED (E·K·K, COLUMNS, READ); or None
    p_w,
    p_members,
    p_prologue_a,
    p_prologue_b,
    p_0,
    p_1,
    p_2,
    p_3,
    p_4,
    p_5,
    p_6,
    p_7,
    p_8,
    B,
    H: tl.constexpr,
    W: tl.constexpr,
    READ: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PROLOGUE_ROW: tl.constexpr,
    RELU: tl.constexpr,
    BITS: tl.constexpr,
    BIAS_ROW: tl.constexpr,
    SECOND_ROW: tl.constexpr,
    NORM_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    MASK_M: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BI: tl.constexpr,
    TAPS: tl.constexpr,  # 1, or K: those of a row in one step
    PAIR: tl.constexpr,  # the box is loaded and multiplied a pixel at a time
    HALVES: tl.constexpr,  # the epilogue takes the columns in two parts
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    PIXELS: tl.constexpr = 2 if PAIR else 1  # products
    BLOCK_M: tl.constexpr = BI if PAIR else TH * TW * BI
    K_BLOCKS: tl.constexpr = (READ + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    TILES_H: tl.constexpr = (H + TH - 1) // TH
    TILES_W: tl.constexpr = (W + TW - 1) // TW
    # channels run fastest, then columns and rows: neighbours find each other's pixels in L2
    i_tile, i_n = tl.program_id(0) // TILES_N, tl.program_id(0) % TILES_N
    i_w, i_h, i_b = i_tile % TILES_W * TW, i_tile // TILES_W % TILES_H * TH, i_tile // (TILES_W * TILES_H) * BI
    i_member = tl.program_id(1)
    i_weight = i_member
    if p_members is not None:
        i_weight = tl.load(p_members + i_member).to(tl.int32)
    i_read = i_member
    if SHARED:
        i_read = 0
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if p_prologue_a is not None:
        p_prologue_a += i_weight * PROLOGUE_ROW
        p_prologue_b += i_weight * PROLOGUE_ROW
    b_first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_second = b_first  # of a PAIR
    for i in range(K * K // TAPS * K_BLOCKS):
        i_tap, i_k = i // K_BLOCKS * TAPS, i % K_BLOCKS * BLOCK_K
        i_row, i_column = i_h + i_tap // K - K // 2, i_w + i_tap % K - K // 2
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_a = None
        b_b = None
        if p_prologue_a is not None:
            b_a = load_affine(p_prologue_a, o_k, READ, BLOCK_K)
            b_b = load_affine(p_prologue_b, o_k, READ, BLOCK_K)
        b_x = load_box(x_MHWBC, i_read, i_row, i_column, i_b, i_k, b_a, b_b, BLOCK_M, BLOCK_K)
        for i_next in tl.static_range(TAPS):
            b_next = b_x
            if PAIR:
                b_next = load_box(x_MHWBC, i_read, i_row, i_column + i_next + 1, i_b, i_k, b_a, b_b, BLOCK_M, BLOCK_K)
            if TRANSPOSED:
                i_plane = i_weight * (K * K) + K * K - 1 - i_tap - i_next
                b_w = tl.trans(tl.reshape(w_descriptor.load([i_plane, i_n * BLOCK_N, i_k]), (BLOCK_N, BLOCK_K)))
            elif w_descriptor is not None:
                i_plane = i_weight * (K * K) + i_tap + i_next
                b_w = tl.reshape(w_descriptor.load([i_plane, i_k, i_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                p_tile = p_w + (i_weight.to(tl.int64) * (K * K) + i_tap + i_next) * (READ * COLUMNS)
                m_w = (o_k < READ)[:, None] & (o_n < COLUMNS)[None, :]
                b_w = tl.load(p_tile + o_k[:, None] * COLUMNS + o_n[None, :], mask=m_w, other=0.0)
            b_first = tl.dot(b_x, b_w, b_first, input_precision="ieee")
            if PAIR:
                b_second = tl.dot(b_next, b_w, b_second, input_precision="ieee")
            b_x = b_next

    # the epilogue takes what it loads in registers too: beside a large accumulator it sees half the columns at a time
    o_m = tl.arange(0, BLOCK_M)
    for i_pixel in tl.static_range(PIXELS):
        b_left = b_second if i_pixel else b_first
        b_right = b_left
        if HALVES:
            b_left, b_right = tl.split(tl.permute(tl.reshape(b_left, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        o_b, o_w, o_h = i_b + o_m % BI, i_w + i_pixel + o_m // BI % TW, i_h + o_m // (BI * TW)
        if PAIR:
            o_w, o_h = i_w + i_pixel + tl.zeros_like(o_m), i_h + tl.zeros_like(o_m)
        for i_half in tl.static_range(2 if HALVES else 1):
            finish(
                b_right if i_half else b_left,
                i_member.to(tl.int64),
                i_weight.to(tl.int64),
                (o_b * H + o_h) * W + o_w,
                (o_b < B) & (o_h < H) & (o_w < W),
                i_n * 2 + i_half if HALVES else i_n,
                B * (H * W),
                i_tile * PIXELS + i_pixel,
                (B + BI - 1) // BI * (TILES_W * TILES_H * PIXELS),
                p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
                COLUMNS, TRANSPOSED, RELU, BITS, BIAS_ROW, SECOND_ROW, NORM_ROW, SCALE_ROW, MASK_M,
                COLUMNS % BLOCK_N != 0,
            )  # fmt: skip


def launch_boxes(
    x: Tensor,
    w_EKKIO: Tensor,
    members: Tensor | None,
    prologue: tuple[Tensor, Tensor] | None,
    epilogue: Epilogue,
    *,
    M: int,
    transposed: bool,
    tile: Tile,
) -> None:
    """Convolve x with w, or `transposed` dy with w flipped, into the epilogue's outputs; stride 1."""
    E, K, _, CI, CO = w_EKKIO.shape
    B, H, W, READ = x.shape[-4:]
    box, pair = tile_box(B, H, W, tile)
    w_block = [1, tile.BLOCK_N, tile.BLOCK_K] if transposed else [1, tile.BLOCK_K, tile.BLOCK_N]
    wide = CO * w_EKKIO.element_size() % 16 == 0
    planes = TensorDescriptor.from_tensor(w_EKKIO.view(E * K * K, CI, CO), w_block) if wide else None
    registers = tile.BLOCK_M * tile.BLOCK_N // (2 if pair else 1) // (32 * tile.num_warps)
    pointers, flags = epilogue_arguments(epilogue, prologue)
    launch(
        member_conv_boxes_kernel,
        (box.tiles(B, H, W) * cdiv(CI if transposed else CO, tile.BLOCK_N), M),
        x_descriptor(x, (1, 1, box.BI) if pair else box, tile.BLOCK_K, prologue is not None),
        planes,
        w_EKKIO,
        members,
        *(prologue or (None, None)),
        *pointers,
        B,
        H=H,
        W=W,
        READ=READ,
        COLUMNS=CI if transposed else CO,
        K=K,
        SHARED=x.ndim == 4,
        TRANSPOSED=transposed,
        MASK_M=not box.exact(B, H, W),
        **flags,
        **box._asdict(),
        TAPS=K if tile.form == TAP_ROWS else 1,
        PAIR=pair,
        HALVES=registers >= LARGE_ACCUMULATOR,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

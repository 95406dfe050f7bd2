"""Member-batched 3×3 convolution of stride 1 between few channels: rows stream past weights that stay in shared memory.

    out row r + 1 += X_r · w[0, ·]      out row r += X_r · w[1, ·]      out row r − 1 += X_r · w[2, ·], then done

for every row r of a strip of STRIP rows, TW columns wide, of BI images: X_r are three boxes, one column left, in place
and one column right, and three accumulators take turns. The input gradient, TRANSPOSED, is the same with
w[2 − kh, 2 − kw]ᵀ. All nine weights, 74 kB at 64 × 64 channels, are read once.

So x is read 3 times and not 9: 192 FLOP a byte at 64 channels, where tiles of 128 × 64 with a load a tap do 43 and L2
cannot feed the tensor cores. Bytes and FLOPs otherwise are those of `member_conv` and its input gradient. Rows that a
strip shares with the next are read and multiplied twice, and the row below the image, all zeros, is multiplied to
finish the last: STRIP + 1 or + 2 rows of work for STRIP.

Two programs of 64 pixels and 4 warps are on a multiprocessor, 106,536 bytes each at 64 channels, so that products of
one run during the epilogue of the other and while its product waits for the one before: nine waits a row, each of four
HGMMA of 64 × 64 × 16 or 128 clocks. Predicted, not measured, for 64 → 64 channels at 32 × 32 pixels of WRN-28-4 (38.7
GFLOP, floor 48 µs at 800 TFLOP/s, 90 µs with a residual and a second output): products are 1,152 clocks a row, waits
and epilogue some 1,300 to 2,100, so 55 to 75 µs; 65 to 85 µs with one program of 128 pixels, whose epilogue overlaps
nothing.

Two rows of taps side by side in one product of 128 columns read better: 6 waits a row instead of 9, 24 HGMMA instead of
36, 693 instructions instead of 730, no more registers. But ptxas 12.8 then takes the products of some input gradients
with a norm for zero and removes them, in each of four ways to put the halves together that were tried.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.conv.forms.descriptors import affine_relu, choose_row, epilogue_arguments, finish, x_descriptor
from ensdistill.kernels.conv.tiles import MULTIPROCESSORS, Tile, programs_per_multiprocessor
from ensdistill.kernels.epilogue import Epilogue
from ensdistill.kernels.launch import begin, cdiv, check, launch

SHORTEST_STRIP = 4
"""Rows of a strip at least, unless the image has fewer."""


def choose_strip(programs: int, H: int, tile: Tile, element: int) -> int:
    """Rows of a strip, of `programs` that whole columns of H rows would make: so that they fill the device."""
    slots = MULTIPROCESSORS * programs_per_multiprocessor(tile, element)
    return cdiv(H, max(1, min(slots // programs, H // SHORTEST_STRIP)))


def num_tiles(B: int, H: int, W: int, tile: Tile) -> int:
    """T, the tiles of pixels of a member: each is one row of a box."""
    return choose_row(B, W, tile.BLOCK_M).tiles(B, H, W)


@triton.jit
def load_tap(
    p_w,  # the member's weights
    i_tap,
    READ: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Weights (BLOCK_K, BLOCK_N) of a tap; TRANSPOSED: of the opposite tap, from (COLUMNS, READ)."""
    o_k = tl.arange(0, BLOCK_K)
    o_n = tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        p_tile = p_w + (8 - i_tap) * (READ * COLUMNS) + o_n[:, None] * READ + o_k[None, :]
        if READ != BLOCK_K or COLUMNS != BLOCK_N:
            b_w = tl.load(p_tile, mask=(o_n < COLUMNS)[:, None] & (o_k < READ)[None, :], other=0.0)
        else:
            b_w = tl.load(p_tile)
        return tl.trans(b_w)
    else:
        p_tile = p_w + i_tap * (READ * COLUMNS) + o_k[:, None] * COLUMNS + o_n[None, :]
        if READ != BLOCK_K or COLUMNS != BLOCK_N:
            return tl.load(p_tile, mask=(o_k < READ)[:, None] & (o_n < COLUMNS)[None, :], other=0.0)
        else:
            return tl.load(p_tile)


@triton.jit
def member_conv_rows_kernel(
    x_MHWBC,  # descriptor, boxes (1, 1, TW, BI, BLOCK_K)
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
    STRIP: tl.constexpr,
    TW: tl.constexpr,
    BI: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    BLOCK_M: tl.constexpr = TW * BI
    TILES_W: tl.constexpr = (W + TW - 1) // TW
    STRIPS: tl.constexpr = (H + STRIP - 1) // STRIP
    i_box, i_strip = tl.program_id(0) // STRIPS, tl.program_id(0) % STRIPS
    i_w, i_b = i_box % TILES_W * TW, i_box // TILES_W * BI
    i_member = tl.program_id(1).to(tl.int64)
    i_weight = i_member
    if p_members is not None:
        i_weight = tl.load(p_members + i_member)
    i_read = tl.program_id(1)
    if SHARED:
        i_read = 0
    o_m = tl.arange(0, BLOCK_M)
    o_b, o_w = i_b + o_m % BI, i_w + o_m // BI
    pixels = B * (H * W)
    num_tiles = (B + BI - 1) // BI * (TILES_W * H)

    p_w += i_weight * (9 * READ * COLUMNS)
    b_w00 = load_tap(p_w, 0, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w01 = load_tap(p_w, 1, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w02 = load_tap(p_w, 2, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w10 = load_tap(p_w, 3, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w11 = load_tap(p_w, 4, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w12 = load_tap(p_w, 5, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w20 = load_tap(p_w, 6, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w21 = load_tap(p_w, 7, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    b_w22 = load_tap(p_w, 8, READ, COLUMNS, TRANSPOSED, BLOCK_K, BLOCK_N)
    if p_prologue_a is not None:
        o_k = tl.arange(0, BLOCK_K)
        b_a = tl.load(p_prologue_a + i_weight * PROLOGUE_ROW + o_k, mask=o_k < READ, other=0.0)
        b_b = tl.load(p_prologue_b + i_weight * PROLOGUE_ROW + o_k, mask=o_k < READ, other=0.0)

    i_first = i_strip * STRIP  # row
    i_last = tl.minimum(i_first + STRIP, H)
    b_above = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_here = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i_h in range(tl.maximum(i_first - 1, 0), i_last + 1):
        b_left = tl.reshape(x_MHWBC.load([i_read, i_h, i_w - 1, i_b, 0]), (BLOCK_M, BLOCK_K))
        b_middle = tl.reshape(x_MHWBC.load([i_read, i_h, i_w, i_b, 0]), (BLOCK_M, BLOCK_K))
        b_right = tl.reshape(x_MHWBC.load([i_read, i_h, i_w + 1, i_b, 0]), (BLOCK_M, BLOCK_K))
        if p_prologue_a is not None:
            b_left = affine_relu(b_left, b_a, b_b)
            b_middle = affine_relu(b_middle, b_a, b_b)
            b_right = affine_relu(b_right, b_a, b_b)
        b_above = tl.dot(b_left, b_w20, b_above, input_precision="ieee")
        b_above = tl.dot(b_middle, b_w21, b_above, input_precision="ieee")
        b_above = tl.dot(b_right, b_w22, b_above, input_precision="ieee")
        b_here = tl.dot(b_left, b_w10, b_here, input_precision="ieee")
        b_here = tl.dot(b_middle, b_w11, b_here, input_precision="ieee")
        b_here = tl.dot(b_right, b_w12, b_here, input_precision="ieee")
        b_below = tl.dot(b_left, b_w00, input_precision="ieee")
        b_below = tl.dot(b_middle, b_w01, b_below, input_precision="ieee")
        b_below = tl.dot(b_right, b_w02, b_below, input_precision="ieee")
        # a use outside the `if` makes Triton wait for the products; used only inside, they break its pipeliner (3.6)
        b_above = tl.where(i_h > i_first, b_above, 0.0)
        if i_h > i_first:
            finish(
                b_above,
                i_member,
                i_weight,
                (o_b * H + i_h - 1) * W + o_w,
                (o_b < B) & (o_w < W),
                0,
                pixels,
                i_box * H + i_h - 1,
                num_tiles,
                p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
                COLUMNS, TRANSPOSED, RELU, BITS, BIAS_ROW, SECOND_ROW, NORM_ROW, SCALE_ROW, MASK_M,
                COLUMNS % BLOCK_N != 0,
            )  # fmt: skip
        # not a plain copy: that names registers which products still go to, and ptxas waits after every instruction
        b_above = tl.where(i_h < i_last, b_here, 0.0)
        b_here = tl.where(i_h < i_last, b_below, 0.0)


def launch_rows(
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
    """Convolve x with w, or `transposed` dy with w flipped, into the epilogue's outputs; 3×3, stride 1."""
    _, K, _, CI, CO = w_EKKIO.shape
    B, H, W, READ = x.shape[-4:]
    COLUMNS = CI if transposed else CO
    check(K == 3, "tile", "the POINTERS or BOXES form for weights of one tap", tile)
    check(READ <= tile.BLOCK_K and COLUMNS <= tile.BLOCK_N, "tile", f"room for {READ} and {COLUMNS} channels", tile)
    box = choose_row(B, W, tile.BLOCK_M)
    programs = box.tiles(B, 1, W) * M
    strip = choose_strip(programs, H, tile, x.element_size())
    pointers, flags = epilogue_arguments(epilogue, prologue)
    launch(
        member_conv_rows_kernel,
        (box.tiles(B, 1, W) * cdiv(H, strip), M),
        x_descriptor(x, box, tile.BLOCK_K, prologue is not None),
        w_EKKIO,
        members,
        *(prologue or (None, None)),
        *pointers,
        B,
        H=H,
        W=W,
        READ=READ,
        COLUMNS=COLUMNS,
        SHARED=x.ndim == 4,
        TRANSPOSED=transposed,
        MASK_M=not box.exact(B, 1, W),
        **flags,
        STRIP=strip,
        TW=box.TW,
        BI=box.BI,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

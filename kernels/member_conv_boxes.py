"""Member-batched convolution of stride 1 whose tiles of x are boxes that the copy engine fetches (TMA, sm_90 and later).

    acc[m, n] = Σ over taps (kh, kw), channels c of x'[h(m) + kh − P, w(m) + kw − P, b(m), c] · w[e, kh, kw, c, n]

and, TRANSPOSED, the input gradient: the same with w[e, k − 1 − kh, k − 1 − kw, n, c]. x' is x (M, B, H, W, READ), shared by all
members or not, or with a prologue relu(a·x + b); 0 outside the image. A tile is TH × TW pixels of BI images, one box of the
tensor (M, H, W, B, READ) a tap and BLOCK_K channels: what lies outside comes as zeros, no address is computed and no mask kept,
which leaves the registers for tiles of 256 × 128. Sides of a box are chosen so that fewest pixels of it are wasted; where
BLOCK_M divides the batch a box is one pixel of BLOCK_M images: then it goes to the tensor cores straight from shared memory,
and no size of image wastes anything.

Bytes and FLOPs are those of `member_conv` and its input gradient; x is read once a tap, from L2 mostly: 64 FLOP a byte with tiles of
128 × 128, 85 with 256 × 128. It needs rows of 16 bytes: READ a multiple of 8 in bf16, of 4 in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir as _ir
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from ensdistill.kernels.epilogue import Epilogue, forward_epilogue, input_gradient_epilogue
from ensdistill.kernels.launch import INTERPRETED, cdiv, check, launch, power_of_2
from ensdistill.kernels.tiles import Tile

LARGEST_SIDE = 256
"""Elements of a side of a box at most (a limit of the copy engine's)."""


def repair_nan() -> None:
    """Two things of the interpreter's that `affine_relu` needs as the hardware has them: bf16 boxes padded with NaN, and a
    `tl.maximum` whose result is the operand that is a number."""
    builder: Any = interpreter.InterpreterBuilder
    load = builder.create_descriptor_load

    def create_descriptor_load(self: Any, box: Any, indices: Any, cache: Any, eviction: Any) -> Any:
        if box.padding != _ir.PADDING_OPTION.PAD_NAN or box.base.get_element_ty() != tl.bfloat16:
            return load(self, box, indices, cache, eviction)
        pointers, mask = box.materialize_pointers(indices)
        other = interpreter.TensorHandle(np.full(pointers.data.shape, 0x7FC0, np.uint16), tl.bfloat16)
        return self.create_masked_load(pointers, mask, other, cache, eviction, False)

    builder.create_descriptor_load = create_descriptor_load
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


if INTERPRETED:
    repair_nan()


class Box(NamedTuple):
    """TH × TW pixels of BI images; all powers of 2."""

    TH: int
    TW: int
    BI: int

    def tiles(self, B: int, H: int, W: int) -> int:
        """How many cover B images of H × W pixels."""
        return cdiv(B, self.BI) * cdiv(H, self.TH) * cdiv(W, self.TW)

    def exact(self, B: int, H: int, W: int) -> bool:
        """Whether they cover nothing else."""
        return B % self.BI == 0 and H % self.TH == 0 and W % self.TW == 0


@functools.cache
def choose_box(B: int, H: int, W: int, pixels: int) -> Box:
    """The box of `pixels` that wastes least; of equals the one of most images, then the widest."""
    heights, widths = ([1 << i for i in range(power_of_2(side).bit_length())] for side in (H, W))
    boxes = [Box(h, w, pixels // (h * w)) for h in heights for w in widths if h * w <= pixels]
    boxes = [box for box in boxes if max(box) <= LARGEST_SIDE]
    check(bool(boxes), "tile", f"BLOCK_M that boxes of {H}x{W} images can have", pixels)
    return min(boxes, key=lambda box: (box.tiles(B, H, W), -box.BI, -box.TW))


def num_tiles(B: int, H: int, W: int, tile: Tile) -> int:
    """T, the tiles of pixels of a member."""
    return choose_box(B, H, W, tile.BLOCK_M).tiles(B, H, W)


@triton.jit
def finish(
    b_acc,
    i_member,
    i_weight,
    o_pixel,
    m_pixel,
    i_n,
    pixels,
    i_tile,
    num_tiles,
    p_0,
    p_1,
    p_2,
    p_3,
    p_4,
    p_5,
    p_6,
    p_7,
    p_8,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RELU: tl.constexpr,
    BITS: tl.constexpr,
    BIAS_ROW: tl.constexpr,
    SECOND_ROW: tl.constexpr,
    NORM_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
):
    """The epilogue of the forward, or, TRANSPOSED, of the input gradient."""
    if TRANSPOSED:
        input_gradient_epilogue(
            b_acc, i_member, i_weight, o_pixel, m_pixel, i_n, pixels, i_tile, num_tiles,
            p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
            COLUMNS, NORM_ROW, SCALE_ROW, MASK_M, MASK_N,
        )  # fmt: skip
    else:
        forward_epilogue(
            b_acc, i_member, i_weight, o_pixel, m_pixel, i_n, pixels, i_tile, num_tiles,
            p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7,
            COLUMNS, RELU, BITS, BIAS_ROW, SECOND_ROW, MASK_M, MASK_N,
        )  # fmt: skip


@triton.jit
def affine_relu(b_x, b_a, b_b):
    """relu(a·x + b) of a tile in x's type. NaN, which is what lies outside then, becomes 0, as relu(b) would not.

    A mask would say the same, but what a mask is made of keeps Triton from computing this where the tensor cores read it:
    the tile would go through shared memory once more.
    """
    return tl.maximum(b_x.to(tl.float32) * b_a[None, :] + b_b[None, :], 0.0).to(b_x.dtype)


@triton.jit
def member_conv_boxes_kernel(
    x_MHWBC,  # descriptor, boxes (1, TH, TW, BI, BLOCK_K)
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCK_M: tl.constexpr = TH * TW * BI
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
    o_m = tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_b, o_w, o_h = i_b + o_m % BI, i_w + o_m // BI % TW, i_h + o_m // (BI * TW)
    if p_prologue_a is not None:
        p_prologue_a += i_weight * PROLOGUE_ROW
        p_prologue_b += i_weight * PROLOGUE_ROW
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(K * K * K_BLOCKS):
        i_tap, i_k = i // K_BLOCKS, i % K_BLOCKS * BLOCK_K
        i_kh, i_kw = i_tap // K - K // 2, i_tap % K - K // 2
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_x = tl.reshape(x_MHWBC.load([i_read, i_h + i_kh, i_w + i_kw, i_b, i_k]), (BLOCK_M, BLOCK_K))
        if p_prologue_a is not None:
            if READ % BLOCK_K != 0:
                b_a = tl.load(p_prologue_a + o_k, mask=o_k < READ, other=0.0)
                b_b = tl.load(p_prologue_b + o_k, mask=o_k < READ, other=0.0)
            else:
                b_a = tl.load(p_prologue_a + o_k)
                b_b = tl.load(p_prologue_b + o_k)
            b_x = affine_relu(b_x, b_a, b_b)
        if TRANSPOSED:
            i_plane = i_weight * (K * K) + K * K - 1 - i_tap
            b_w = tl.trans(tl.reshape(w_descriptor.load([i_plane, i_n * BLOCK_N, i_k]), (BLOCK_N, BLOCK_K)))
        elif w_descriptor is not None:
            i_plane = i_weight * (K * K) + i_tap
            b_w = tl.reshape(w_descriptor.load([i_plane, i_k, i_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
        else:
            p_tile = p_w + (i_weight.to(tl.int64) * (K * K) + i_tap) * (READ * COLUMNS)
            m_w = (o_k < READ)[:, None] & (o_n < COLUMNS)[None, :]
            b_w = tl.load(p_tile + o_k[:, None] * COLUMNS + o_n[None, :], mask=m_w, other=0.0)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    finish(
        b_acc,
        i_member.to(tl.int64),
        i_weight.to(tl.int64),
        (o_b * H + o_h) * W + o_w,
        (o_b < B) & (o_h < H) & (o_w < W),
        i_n,
        B * (H * W),
        i_tile,
        (B + BI - 1) // BI * (TILES_W * TILES_H),
        p_0, p_1, p_2, p_3, p_4, p_5, p_6, p_7, p_8,
        COLUMNS, TRANSPOSED, RELU, BITS, BIAS_ROW, SECOND_ROW, NORM_ROW, SCALE_ROW, MASK_M, COLUMNS % BLOCK_N != 0,
    )  # fmt: skip


def x_descriptor(x: Tensor, box: Box, channels: int, prologue: bool) -> TensorDescriptor:
    """x (M, B, H, W, C), or (B, H, W, C) as of one member, as (M, H, W, B, C) in boxes (1, TH, TW, BI, channels).

    Outside are zeros, or what a prologue makes zeros: `affine_relu`.
    """
    view = (x if x.ndim == 5 else x[None]).permute(0, 2, 3, 1, 4)
    right = x.shape[-1] * x.element_size() % 16 == 0
    check(right, "tile", "the POINTERS form for channels that fill no whole 16 bytes", x)
    return TensorDescriptor(view, list(view.shape), list(view.stride()), [1, *box, channels], "nan" if prologue else "zero")


def epilogue_arguments(
    epilogue: Epilogue, prologue: tuple[Tensor, Tensor] | None
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """(the nine p_… of `finish`, its flags and PROLOGUE_ROW), with the numbers of the other direction's epilogue at 0."""
    pointers = (*epilogue.pointers, *[None] * (9 - len(epilogue.pointers)))
    flags: dict[str, Any] = dict.fromkeys(("BITS", "BIAS_ROW", "SECOND_ROW", "NORM_ROW", "SCALE_ROW"), 0)
    flags.update(RELU=False, PROLOGUE_ROW=0 if prologue is None or prologue[0].shape[0] == 1 else prologue[0].shape[1])
    flags.update((name, value) for name, value in epilogue.flags.items() if name not in ("CI", "CO"))
    return pointers, flags


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
    box = choose_box(B, H, W, tile.BLOCK_M)
    w_block = [1, tile.BLOCK_N, tile.BLOCK_K] if transposed else [1, tile.BLOCK_K, tile.BLOCK_N]
    wide = CO * w_EKKIO.element_size() % 16 == 0
    planes = TensorDescriptor.from_tensor(w_EKKIO.view(E * K * K, CI, CO), w_block) if wide else None
    pointers, flags = epilogue_arguments(epilogue, prologue)
    launch(
        member_conv_boxes_kernel,
        (box.tiles(B, H, W) * cdiv(CI if transposed else CO, tile.BLOCK_N), M),
        x_descriptor(x, box, tile.BLOCK_K, prologue is not None),
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
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

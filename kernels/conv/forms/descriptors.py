"""Boxes of activations that the copy engine fetches (TMA, sm_90 and later), and what the two loops over them share.

A box is TH × TW pixels of BI images and a block of channels of x (M, B, H, W, C), fetched from the tensor
(M, H, W, B, C). What of it lies outside comes as zeros: no address is computed, no mask kept. Its sides are powers
of 2, chosen so that fewest pixels are wasted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ensdistill.kernels.epilogue import Epilogue, forward_epilogue, input_gradient_epilogue
from ensdistill.kernels.launch import cdiv, check, power_of_2

LARGEST_SIDE = 256
"""Elements of a side of a box at most (a limit of the copy engine's)."""


class Box(NamedTuple):
    """TH × TW pixels of BI images; all powers of 2."""

    TH: int
    TW: int
    BI: int

    def tiles(self, B: int, H: int, W: int) -> int:
        """Number of boxes that cover B images of H × W pixels."""
        return cdiv(B, self.BI) * cdiv(H, self.TH) * cdiv(W, self.TW)

    def exact(self, B: int, H: int, W: int) -> bool:
        """True where the boxes cover nothing else."""
        return B % self.BI == 0 and H % self.TH == 0 and W % self.TW == 0

    @property
    def pair(self) -> bool:
        """True for two pixels of enough images for a product each."""
        return self.TH == 1 and self.TW == 2 and self.BI >= 64


@functools.cache
def choose_box(B: int, H: int, W: int, pixels: int) -> Box:
    """Choose the box of `pixels` that wastes least; of equals the one of most images, then the widest."""
    heights, widths = ([1 << i for i in range(power_of_2(side).bit_length())] for side in (H, W))
    boxes = [Box(h, w, pixels // (h * w)) for h in heights for w in widths if h * w <= pixels]
    boxes = [box for box in boxes if max(box) <= LARGEST_SIDE]
    check(bool(boxes), "tile", f"BLOCK_M that boxes of {H}x{W} images can have", pixels)
    return min(boxes, key=lambda box: (box.tiles(B, H, W), -box.BI, -box.TW))


@functools.cache
def choose_row(B: int, W: int, pixels: int) -> Box:
    """Choose the box of one row that wastes least, the widest of equals; two columns at least."""
    widths = [1 << i for i in range(1, max(2, power_of_2(W)).bit_length()) if 1 << i <= pixels]
    boxes = [box for box in (Box(1, w, pixels // w) for w in widths) if max(box) <= LARGEST_SIDE]
    check(bool(boxes), "tile", f"BLOCK_M that rows of {W} pixels can have", pixels)
    return min(boxes, key=lambda box: (box.tiles(B, 1, W), -box.TW))


def x_descriptor(x: Tensor, box: tuple[int, int, int], channels: int, prologue: bool) -> TensorDescriptor:
    """x (M, B, H, W, C), or (B, H, W, C) as of one member, as (M, H, W, B, C) in boxes (1, TH, TW, BI, channels).

    Outside are zeros, or NaN for a prologue, which makes zeros of it: `affine_relu`.
    """
    view = (x if x.ndim == 5 else x[None]).permute(0, 2, 3, 1, 4)
    right = x.shape[-1] * x.element_size() % 16 == 0
    check(right, "tile", "the POINTERS form for channels that fill no whole 16 bytes", x)
    check(x.data_ptr() % 16 == 0, "tile", "the POINTERS form for a tensor that does not start at a multiple of 16", x)
    padding = "nan" if prologue else "zero"
    return TensorDescriptor(view, list(view.shape), list(view.stride()), [1, *box, channels], padding)


def epilogue_arguments(
    epilogue: Epilogue, prologue: tuple[Tensor, Tensor] | None
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """(the nine p_… of `finish`, its flags and PROLOGUE_ROW); what the other direction's epilogue has is None or 0."""
    pointers = (*epilogue.pointers, *[None] * (9 - len(epilogue.pointers)))
    flags: dict[str, Any] = dict.fromkeys(("BITS", "BIAS_ROW", "SECOND_ROW", "NORM_ROW", "SCALE_ROW"), 0)
    flags.update(RELU=False, PROLOGUE_ROW=0 if prologue is None or prologue[0].shape[0] == 1 else prologue[0].shape[1])
    flags.update((name, value) for name, value in epilogue.flags.items() if name not in ("CI", "CO"))
    return pointers, flags


@triton.jit
def affine_relu(b_x, b_a, b_b):
    """relu(a·x + b) of a tile in x's type. NaN, which is what lies outside then, becomes 0, as relu(b) would not.

    A mask would say the same, but what a mask is made of keeps Triton from computing this in the registers that the
    tensor cores read: the tile would go through shared memory once more.
    """
    return tl.maximum(b_x.to(tl.float32) * b_a[None, :] + b_b[None, :], 0.0).to(b_x.dtype)


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

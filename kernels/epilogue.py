"""Epilogues: what a convolution does to a tile in registers, forward and backward; the same in plain PyTorch.

    forward         y = [relu](acc + bias + residual)        z = relu(a·y + b), y as stored
                    sums = Σ y, Σ y², y as stored            bits = z > 0, or y > 0 without a, b
    input gradient  v = mask ∘ (acc + before)                mask: packed bits, or a·x + b > 0
                    sums = Σ v, Σ v·x                        dx = scale ∘ v + after

Pixels of a member are numbered b·H·W + h·W + w. Vectors of a channel are fp32, one row a member or one for all. Sums
are fp32 (M, T, 2, C), one entry a tile; whoever reads them adds over T in order. Bit j of byte c of `bits` is channel
8c + j.

Everything that is loaded here is loaded here, after the loop: nothing of it takes registers while the loop runs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import cdiv


class ConvOutput(NamedTuple):
    """Results of a convolution; None for what was not asked for."""

    y: Tensor | None
    """(M, B, OH, OW, CO)"""
    z: Tensor | None
    """(M, B, OH, OW, CO): relu(a·y + b)"""
    sums: Tensor | None
    """(M, T, 2, CO) fp32: Σ y and Σ y² in T parts"""
    bits: Tensor | None
    """(bits, B, OH, OW, ⌈CO/8⌉) uint8: where z, kept or not, or without a second output y, is positive"""


class Epilogue(NamedTuple):
    """Arguments that a launcher hands on to `forward_epilogue` or `input_gradient_epilogue`, whichever loop runs."""

    pointers: tuple[Tensor | None, ...]
    """Tensors of the p_… arguments, in their order."""
    flags: dict[str, Any]
    """Constexprs by name, but for MASK_M and MASK_N."""


def pack_bits_ref(x: Tensor) -> Tensor:
    """Pack x > 0 over the last dimension C, eight channels a byte: (…, C) -> (…, ⌈C/8⌉) uint8."""
    C = x.shape[-1]
    positive = torch.nn.functional.pad(x > 0, (0, 8 * cdiv(C, 8) - C)).unflatten(-1, (-1, 8))
    weight = 2 ** torch.arange(8, dtype=torch.int32, device=x.device)
    return (positive * weight).sum(-1).to(torch.uint8)


def unpack_bits_ref(bits: Tensor, C: int) -> Tensor:
    """Unpack what `pack_bits_ref` packed: (…, ⌈C/8⌉) uint8 -> (…, C) bool."""
    shift = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shift) & 1).flatten(-2)[..., :C].bool()


def rows(vector: Tensor, members: Tensor | None) -> Tensor:
    """Rows of a vector (E, C) or (1, C), of the members, to broadcast against (M, B, H, W, C)."""
    if members is not None and vector.shape[0] > 1:
        vector = vector.index_select(0, members)
    return vector[:, None, None, None, :]


def wide(x: Tensor) -> Tensor:
    """Cast x to the type that is computed in: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def conv_epilogue_ref(
    v_MBHWC: Tensor,
    *,
    members: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    second: tuple[Tensor, Tensor] | None = None,
    keep_y: bool = True,
    keep_z: bool = True,
    sums: bool = False,
    bits: int = 0,
    out_dtype: torch.dtype | None = None,
) -> ConvOutput:
    """Definition of the forward's epilogue, on a finished convolution `v`; sums come as one tile, T = 1."""
    out_dtype = out_dtype or v_MBHWC.dtype
    v = wide(v_MBHWC)
    if bias is not None:
        v = v + rows(bias, members)
    if residual is not None:
        v = v + residual
    y = (v.relu() if relu else v).to(out_dtype)
    stored = wide(y)
    z = None
    if second is not None:
        z = (rows(second[0], members) * stored + rows(second[1], members)).relu().to(out_dtype)
    sums_MT2C = torch.stack((stored.sum((1, 2, 3)), (stored * stored).sum((1, 2, 3))), 1)[:, None] if sums else None
    packed = pack_bits_ref((y if z is None else z)[:bits]) if bits else None
    return ConvOutput(y if keep_y else None, z if keep_z else None, sums_MT2C, packed)


def input_gradient_epilogue_ref(
    v_MBHWC: Tensor,
    *,
    members: Tensor | None = None,
    before: Tensor | None = None,
    bits: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    after: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Definition of the input gradient's epilogue, on a finished convolution `v`; sums come as one tile, T = 1."""
    out_dtype = out_dtype or v_MBHWC.dtype
    M, C = v_MBHWC.shape[0], v_MBHWC.shape[-1]
    v = wide(v_MBHWC)
    if before is not None:
        v = v + before
    if bits is not None:
        v = v * unpack_bits_ref(bits[:M], C)
    elif norm is not None:
        v = v * (rows(norm[1], members) * norm[0] + rows(norm[2], members) > 0)
    sums_MT2C = None
    if norm is not None:
        stored = v if scale is not None or after is not None else wide(v.to(out_dtype))
        sums_MT2C = torch.stack((stored.sum((1, 2, 3)), (stored * norm[0]).sum((1, 2, 3))), 1)[:, None]
    if scale is not None:
        v = rows(scale, members) * v
    if after is not None:
        v = v + after
    return v.to(out_dtype), sums_MT2C


@triton.jit
def tile_mask(m_pixel, o_n, C: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr):
    """Mask of what exists of a tile (pixels, channels); a constant where all does: the compiler then makes no mask."""
    m_tile = tl.full((m_pixel.shape[0], o_n.shape[0]), True, tl.int1)
    if MASK_M:
        m_tile &= m_pixel[:, None]
    if MASK_N:
        m_tile &= (o_n < C)[None, :]
    return m_tile


@triton.jit
def load_vector(p_vector, i_weight, o_n, C: tl.constexpr, ROW: tl.constexpr, MASK_N: tl.constexpr):
    """Channels `o_n` of a member's row (ROW = C), or of the row of all members (ROW = 0), to broadcast over pixels."""
    if MASK_N:
        return tl.load(p_vector + i_weight * ROW + o_n, mask=o_n < C, other=0.0)[None, :]
    else:
        return tl.load(p_vector + i_weight * ROW + o_n)[None, :]


@triton.jit
def store_sums(
    p_sums, b_first, b_second, m_tile, i_tile, o_n, C: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr
):
    """Both sums over this tile's pixels into entry `i_tile`, counted over members, of (M, T, 2, C)."""
    if MASK_M:
        b_first = tl.where(m_tile, b_first, 0.0)
        b_second = tl.where(m_tile, b_second, 0.0)
    p_sums += i_tile * (2 * C)
    if MASK_N:
        tl.store(p_sums + o_n, tl.sum(b_first, axis=0), mask=o_n < C)
        tl.store(p_sums + C + o_n, tl.sum(b_second, axis=0), mask=o_n < C)
    else:
        tl.store(p_sums + o_n, tl.sum(b_first, axis=0))
        tl.store(p_sums + C + o_n, tl.sum(b_second, axis=0))


@triton.jit
def pack_bits(b_x):
    """b_x > 0 of a tile (BLOCK_M, BLOCK_N) -> (BLOCK_M, BLOCK_N / 8) uint8."""
    BLOCK_M: tl.constexpr = b_x.shape[0]
    BLOCK_N: tl.constexpr = b_x.shape[1]
    b_bits = tl.reshape((b_x > 0.0).to(tl.int32), (BLOCK_M, BLOCK_N // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(b_bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(b_bits):
    """(BLOCK_M, BLOCK_N / 8) uint8 -> (BLOCK_M, BLOCK_N) bool."""
    BLOCK_M: tl.constexpr = b_bits.shape[0]
    BLOCK_N: tl.constexpr = 8 * b_bits.shape[1]
    b_bits = (b_bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(b_bits.to(tl.int1), (BLOCK_M, BLOCK_N))


@triton.jit
def bits_offsets(
    o_pixel, m_pixel, i_n, C: tl.constexpr, BLOCK_N: tl.constexpr, MASK_M: tl.constexpr, MASK_N: tl.constexpr
):
    """(offsets, mask) of the bytes of a tile's bits, within a member."""
    BYTES: tl.constexpr = (C + 7) // 8
    o_byte = i_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    return o_pixel[:, None] * BYTES + o_byte[None, :], tile_mask(m_pixel, o_byte, BYTES, MASK_M, MASK_N)


@triton.jit
def forward_epilogue(
    b_acc,  # (BLOCK_M, BLOCK_N) fp32
    i_member,  # int64: which of the M outputs
    i_weight,  # int64: which of the E rows of bias, a and b
    o_pixel,  # (BLOCK_M,) int32: pixels within the member
    m_pixel,  # (BLOCK_M,) whether they exist; not looked at without MASK_M
    i_n,  # which tile of BLOCK_N channels
    pixels,  # of a member, B·OH·OW
    i_tile,
    num_tiles,  # place of the sums and T
    p_y,
    p_z,
    p_sums,
    p_bits,
    p_bias,
    p_residual,
    p_a,
    p_b,
    CO: tl.constexpr,
    RELU: tl.constexpr,
    BITS: tl.constexpr,  # members whose bits are wanted
    BIAS_ROW: tl.constexpr,  # CO, or 0 where all members share the row
    SECOND_ROW: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,  # CO is no multiple of BLOCK_N
):
    BLOCK_N: tl.constexpr = b_acc.shape[1]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_y = o_pixel[:, None] * CO + o_n[None, :]
    m_y = tile_mask(m_pixel, o_n, CO, MASK_M, MASK_N)
    i_start = i_member * pixels * CO
    if p_bias is not None:
        b_acc += load_vector(p_bias, i_weight, o_n, CO, BIAS_ROW, MASK_N)
    if p_residual is not None:
        b_acc += tl.load(p_residual + i_start + o_y, mask=m_y).to(tl.float32)
    if RELU:
        b_acc = tl.maximum(b_acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if p_y is not None:
        b_y = b_acc.to(p_y.dtype.element_ty)
        tl.store(p_y + i_start + o_y, b_y, mask=m_y)
    else:
        b_y = b_acc.to(p_z.dtype.element_ty)
    if p_a is not None or p_sums is not None or BITS > 0:
        b_acc = b_y.to(tl.float32)
    if p_sums is not None:
        store_sums(p_sums, b_acc, b_acc * b_acc, m_y, i_member * num_tiles + i_tile, o_n, CO, MASK_M, MASK_N)
    if p_a is not None:
        b_acc *= load_vector(p_a, i_weight, o_n, CO, SECOND_ROW, MASK_N)
        b_acc += load_vector(p_b, i_weight, o_n, CO, SECOND_ROW, MASK_N)
        b_acc = tl.maximum(b_acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_z = b_acc.to(b_y.dtype)
        if p_z is not None:
            tl.store(p_z + i_start + o_y, b_z, mask=m_y)
        b_acc = b_z.to(tl.float32)
    if BITS > 0:  # noqa: SIM102 (the one is compile time, the other is not)
        if i_member < BITS:
            if MASK_N:
                b_acc = tl.where((o_n < CO)[None, :], b_acc, 0.0)
            o_bits, m_bits = bits_offsets(o_pixel, m_pixel, i_n, CO, BLOCK_N, MASK_M, MASK_N)
            tl.store(p_bits + i_member * pixels * ((CO + 7) // 8) + o_bits, pack_bits(b_acc), mask=m_bits)


@triton.jit
def input_gradient_epilogue(
    b_acc,  # (BLOCK_M, BLOCK_N) fp32
    i_member,  # int64: which of the outputs
    i_weight,  # int64: which of the rows of a, b and scale
    o_pixel,  # (BLOCK_M,) int32: pixels within the member
    m_pixel,  # (BLOCK_M,) whether they exist; not looked at without MASK_M
    i_n,  # which tile of BLOCK_N channels
    pixels,  # of a member, B·H·W
    i_tile,
    num_tiles,  # place of the sums and T
    p_dx,
    p_sums,
    p_before,
    p_bits,
    p_x,
    p_a,
    p_b,
    p_scale,
    p_after,
    CI: tl.constexpr,
    NORM_ROW: tl.constexpr,  # CI, or 0 where all members share the row
    SCALE_ROW: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,  # CI is no multiple of BLOCK_N
):
    BLOCK_N: tl.constexpr = b_acc.shape[1]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_x = o_pixel[:, None] * CI + o_n[None, :]
    m_x = tile_mask(m_pixel, o_n, CI, MASK_M, MASK_N)
    i_start = i_member * pixels * CI
    if p_before is not None:
        b_acc += tl.load(p_before + i_start + o_x, mask=m_x).to(tl.float32)
    if p_bits is not None:
        o_bits, m_bits = bits_offsets(o_pixel, m_pixel, i_n, CI, BLOCK_N, MASK_M, MASK_N)
        b_keep = unpack_bits(tl.load(p_bits + i_member * pixels * ((CI + 7) // 8) + o_bits, mask=m_bits))
        b_acc = tl.where(b_keep, b_acc, 0.0)
    if p_x is not None:
        b_x = tl.load(p_x + i_start + o_x, mask=m_x).to(tl.float32)
        if p_bits is None:
            b_a = load_vector(p_a, i_weight, o_n, CI, NORM_ROW, MASK_N)
            b_b = load_vector(p_b, i_weight, o_n, CI, NORM_ROW, MASK_N)
            b_acc = tl.where(b_a * b_x + b_b > 0.0, b_acc, 0.0)
        if p_scale is None and p_after is None:  # of what is stored
            b_acc = b_acc.to(p_dx.dtype.element_ty).to(tl.float32)
        store_sums(p_sums, b_acc, b_acc * b_x, m_x, i_member * num_tiles + i_tile, o_n, CI, MASK_M, MASK_N)
    if p_scale is not None:
        b_acc *= load_vector(p_scale, i_weight, o_n, CI, SCALE_ROW, MASK_N)
    if p_after is not None:
        b_acc += tl.load(p_after + i_start + o_x, mask=m_x).to(tl.float32)
    tl.store(p_dx + i_start + o_x, b_acc.to(p_dx.dtype.element_ty), mask=m_x)

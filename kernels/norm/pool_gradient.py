"""Gradient of global average pooling, with what lies before the pooling: a ReLU, a BatchNorm.

    v = mask ∘ df / (H·W),   sums = Σv, Σv·x,   dx = scale ∘ v          mask: packed bits, or a·x + b > 0

df (M, B, C) -> dx (M, B, H, W, C) and sums (M, T, 2, C), what `batch_norm_coefficients` needs. Bytes: df and dx, x
if given, C / 8 a pixel of bits; 1 to 7 FLOPs a value, in fp32. Mask, sums and scale are those of a convolution's input
gradient (`epilogue.py`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.epilogue import input_gradient_epilogue_ref, unpack_bits, wide
from ensdistill.kernels.launch import begin, cdiv, check, launch
from ensdistill.kernels.norm.channels import (
    channel_tile,
    check_activations,
    check_vectors,
    load_f32,
    store,
)
from ensdistill.kernels.operation import operation

STEPS = 4
"""Tiles of a program that also sums: fewer partial sums, and still 512 programs at 4 × 128 × 8 × 8 × 256."""


def global_pool_gradient_ref(
    df_MBC: Tensor,
    *,
    size: tuple[int, int],
    bits: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    members: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Define dx and the sums, in fp32 or float64; sums come as one tile, T = 1."""
    M, B, C = df_MBC.shape
    if scale is not None and members is not None and len(scale) > 1:
        scale = scale.index_select(0, members)
    v_MBHWC = (wide(df_MBC) / (size[0] * size[1]))[:, :, None, None].expand(M, B, *size, C)
    return input_gradient_epilogue_ref(v_MBHWC, bits=bits, norm=norm, scale=scale, out_dtype=dtype)


@triton.jit
def global_pool_gradient_kernel(
    p_df,
    p_bits,
    p_x,
    p_a,
    p_b,
    p_scale,
    p_members,
    p_dx,
    p_sums,
    rows,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    NORM_PER_MEMBER: tl.constexpr,
    SCALE_PER_MEMBER: tl.constexpr,
    EVEN: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    i_m = tl.program_id(1)
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    MASKED_C: tl.constexpr = C % BLOCK_C != 0
    MASKED: tl.constexpr = MASKED_C or not EVEN
    i_t = tl.program_id(0) // BLOCKS_C
    i_c = tl.program_id(0) % BLOCKS_C * BLOCK_C
    o_c = i_c + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    i_member = i_m.to(tl.int64) * rows
    if p_x is not None:
        b_sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        b_sum_x = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_s in range(STEPS):
        i_n = (i_t * STEPS + i_s) * BLOCK_N
        o_n = tl.arange(0, BLOCK_N)
        m = (i_n + o_n < rows)[:, None] & m_c[None, :]
        i_row = i_member + i_n
        o = o_n[:, None] * C + o_c[None, :]
        o_image = ((i_n + o_n) // PIXELS)[:, None] * C + o_c[None, :]
        b = load_f32(p_df + i_m.to(tl.int64) * (rows // PIXELS) * C + o_image, m, MASKED) * (1.0 / PIXELS)
        if p_x is not None:
            b_x = load_f32(p_x + i_row * C + o, m, MASKED)
        if p_bits is not None:
            BYTES: tl.constexpr = (C + 7) // 8
            o_byte = i_c // 8 + tl.arange(0, BLOCK_C // 8)
            m_byte = (i_n + o_n < rows)[:, None] & (o_byte < BYTES)[None, :]
            p_byte = p_bits + i_row * BYTES + o_n[:, None] * BYTES + o_byte[None, :]
            b_bits = tl.load(p_byte, mask=m_byte, other=0) if MASKED else tl.load(p_byte)
            b = tl.where(unpack_bits(b_bits), b, 0.0)
        elif p_x is not None:
            o_norm = i_m * C + o_c if NORM_PER_MEMBER else o_c
            b_a = load_f32(p_a + o_norm, m_c, MASKED_C)[None, :]
            b_b = load_f32(p_b + o_norm, m_c, MASKED_C)[None, :]
            b = tl.where(b_a * b_x + b_b > 0, b, 0.0)
        if p_x is not None:
            b_v = b
            if p_scale is None:
                b_v = b.to(p_dx.dtype.element_ty).to(tl.float32)
            b_sum += b_v
            b_sum_x += b_v * b_x
        if p_scale is not None:
            i_scale = i_m
            if p_members is not None:
                i_scale = tl.load(p_members + i_m).to(tl.int32)
            o_scale = i_scale * C + o_c if SCALE_PER_MEMBER else o_c
            b = b * load_f32(p_scale + o_scale, m_c, MASKED_C)[None, :]
        store(p_dx + i_row * C + o, b, m, MASKED)
    if p_x is not None:
        T = tl.num_programs(0) // BLOCKS_C
        p_s = p_sums + (i_m * T + i_t) * (2 * C) + o_c
        tl.store(p_s, tl.sum(b_sum, axis=0), mask=m_c)
        tl.store(p_s + C, tl.sum(b_sum_x, axis=0), mask=m_c)


@operation(definition=global_pool_gradient_ref)
def global_pool_gradient(
    df_MBC: Tensor,
    *,
    size: tuple[int, int],
    bits: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    members: Tensor | None = None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Compute dx = scale ∘ v, v = mask ∘ df / (H·W), (M, B, H, W, C); with `norm` also Σv and Σv·x (M, T, 2, C).

    Args:
        df_MBC: bf16 or fp32, contiguous.
        size: H, W.
        bits: the mask, packed: uint8 (at least M, B, H, W, ⌈C/8⌉).
        norm: x (M, B, H, W, C), with which the sums are taken, and a, b, fp32 (1, C) or (M, C): without `bits` the mask
            is a·x + b > 0.
        scale: fp32 (1, C) or (M, C), or with `members` (E, C). Without it the sums are of v as stored, rounded to
            `dtype`; with it of v in fp32.
        members: int64 (M,), contiguous: the rows of `scale`, where it has several.
        dtype: type of dx.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    check_activations(df_MBC, "df_MBC")
    check(df_MBC.ndim == 3, "df_MBC", "(M, B, C)", df_MBC)
    (M, B, C), (H, W) = df_MBC.shape, size
    check(dtype in (torch.float32, torch.bfloat16), "dtype", "float32 or bfloat16", dtype)
    check(H > 0 and W > 0, "size", "positive H and W", size)
    if bits is not None:
        fits = bits.ndim == 5 and len(bits) >= M and bits.shape[1:] == (B, H, W, cdiv(C, 8))
        right = fits and bits.dtype == torch.uint8 and bits.is_contiguous()
        check(right, "bits", f"contiguous uint8 ({M}, {B}, {H}, {W}, {cdiv(C, 8)})", bits)
    x, a, b = norm if norm is not None else (None, None, None)
    if x is not None and a is not None and b is not None:
        check_activations(x, "norm x", torch.Size((M, B, H, W, C)))
        check_vectors(a, "norm a", M, C)
        check_vectors(b, "norm b", M, C)
        check(a.shape == b.shape, "norm b", f"the shape of a, {tuple(a.shape)}", b)
    if scale is not None:
        check_vectors(scale, "scale", M if members is None else len(scale), C)
    if members is not None:
        right = scale is not None and members.shape == (M,) and members.dtype == torch.int64 and members.is_contiguous()
        check(right, "members", f"contiguous int64 ({M},), beside a scale", members)
    rows = B * H * W
    tile = channel_tile(M, rows, C, steps=STEPS if x is not None else 1)
    T = tile.programs(rows)
    dx_MBHWC = torch.empty(M, B, H, W, C, dtype=dtype, device=df_MBC.device)
    sums_MT2C = None if x is None else torch.empty(M, T, 2, C, device=df_MBC.device)
    launch(
        global_pool_gradient_kernel,
        (T * tile.blocks(C), M),
        *(df_MBC, bits, x, a, b, scale, members, dx_MBHWC, sums_MT2C, rows),
        PIXELS=H * W,
        C=C,
        NORM_PER_MEMBER=a is not None and len(a) > 1,
        SCALE_PER_MEMBER=scale is not None and len(scale) > 1,
        EVEN=rows % (tile.BLOCK_N * tile.steps) == 0,
        STEPS=tile.steps,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=4 if x is None else 8,  # two sums beside the tile
    )
    return dx_MBHWC, sums_MT2C

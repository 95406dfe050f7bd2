"""Global average pooling of members' activations.

    f = mean over pixels of [relu](a·x + b)

x (M, B, H, W, C) -> f (M, B, C); a and b (1, C) or (M, C). Bytes: x and f; 1 to 4 FLOPs a value, in fp32. Its gradient:
`pool_gradient.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch as launching
from ensdistill.kernels.epilogue import wide
from ensdistill.kernels.launch import MAX_TILE, begin, cdiv, check, launch, power_of_2
from ensdistill.kernels.norm.channels import (
    ELEMENTS,
    channel_block,
    check_activations,
    check_vectors,
    load_f32,
    over_pixels,
    store,
)
from ensdistill.kernels.operation import operation


def global_pool_ref(
    x_MBHWC: Tensor, *, prologue: tuple[Tensor, Tensor] | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Define f, in fp32 or float64."""
    v = wide(x_MBHWC)
    if prologue is not None:
        v = (v * over_pixels(prologue[0], v) + over_pixels(prologue[1], v)).relu()
    return v.mean((2, 3)).to(out_dtype or x_MBHWC.dtype)


@triton.jit
def global_pool_kernel(
    p_x,
    p_a,
    p_b,
    p_f,
    B,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    PER_MEMBER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    i_m = tl.program_id(1)
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    MASKED_C: tl.constexpr = C % BLOCK_C != 0
    MASKED_P: tl.constexpr = PIXELS % BLOCK_P != 0
    i_b = tl.program_id(0) // BLOCKS_C * BLOCK_B
    o_b, o_p = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_P)
    o_c = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m_b, m_c = i_b + o_b < B, o_c < C
    i_image = i_m.to(tl.int64) * B + i_b
    p_x += i_image * (PIXELS * C) + o_b[:, None, None].to(tl.int64) * (PIXELS * C) + o_c[None, None, :]
    o_vector = i_m * C + o_c if PER_MEMBER else o_c
    b_f = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for i_p in range(0, PIXELS, BLOCK_P):
        m_p = i_p + o_p < PIXELS
        m = m_b[:, None, None] & m_p[None, :, None] & m_c[None, None, :]
        b = load_f32(p_x + (i_p + o_p)[None, :, None] * C, m, MASKED_C or MASKED_P or not EVEN)
        if p_a is not None:
            b = b * load_f32(p_a + o_vector, m_c, MASKED_C)[None, None, :]
            b = b + load_f32(p_b + o_vector, m_c, MASKED_C)[None, None, :]
            b = tl.maximum(b, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if MASKED_P:  # relu(b) is not 0 past the last pixel
                b = tl.where(m_p[None, :, None], b, 0.0)
        b_f += tl.sum(b, axis=1)
    o = o_b[:, None] * C + o_c[None, :]
    store(p_f + i_image * C + o, b_f * (1.0 / PIXELS), m_b[:, None] & m_c[None, :], MASKED_C or not EVEN)


@operation(definition=global_pool_ref)
def global_pool(
    x_MBHWC: Tensor, *, prologue: tuple[Tensor, Tensor] | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Average over the pixels of x, or of relu(a·x + b): (M, B, C). No gradient: see `pool_gradient.py`.

    Args:
        x_MBHWC: bf16 or fp32, contiguous.
        prologue: a and b, fp32 (1, C) or (M, C).
        out_dtype: type of the result; None for that of `x_MBHWC`.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    check_activations(x_MBHWC, "x_MBHWC")
    check(x_MBHWC.ndim == 5, "x_MBHWC", "(M, B, H, W, C)", x_MBHWC)
    check(x_MBHWC.shape[2] * x_MBHWC.shape[3] > 0, "x_MBHWC", "at least one pixel", x_MBHWC)
    out_dtype = out_dtype or x_MBHWC.dtype
    check(out_dtype in (torch.float32, torch.bfloat16), "out_dtype", "float32 or bfloat16", out_dtype)
    a, b = prologue if prologue is not None else (None, None)
    if a is not None and b is not None:
        check_vectors(a, "prologue a", len(x_MBHWC), x_MBHWC.shape[-1])
        check_vectors(b, "prologue b", len(x_MBHWC), x_MBHWC.shape[-1])
        check(a.shape == b.shape, "prologue b", f"the shape of a, {tuple(a.shape)}", b)
    M, B, H, W, C = x_MBHWC.shape
    f_MBC = torch.empty(M, B, C, dtype=out_dtype, device=x_MBHWC.device)
    BLOCK_C = channel_block(C)
    blocks = cdiv(C, BLOCK_C)
    BLOCK_P = min(power_of_2(H * W), max(1, ELEMENTS // BLOCK_C))
    BLOCK_B = min(power_of_2(B), max(1, ELEMENTS // (BLOCK_C * BLOCK_P)))
    if launching.INTERPRETED:
        most = max(M * blocks, launching.MAX_INTERPRETED_PROGRAMS)
        while M * blocks * cdiv(B, BLOCK_B) > most and BLOCK_B * BLOCK_P * BLOCK_C < MAX_TILE:
            BLOCK_B *= 2
    launch(
        global_pool_kernel,
        (cdiv(B, BLOCK_B) * blocks, M),
        *(x_MBHWC, a, b, f_MBC, B),
        PIXELS=H * W,
        C=C,
        PER_MEMBER=a is not None and len(a) > 1,
        EVEN=B % BLOCK_B == 0,
        BLOCK_B=BLOCK_B,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
    return f_MBC

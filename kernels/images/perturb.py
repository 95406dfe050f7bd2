"""Perturbation of images: one step of fixed length along an image gradient, inside [0, 1], and normalised if wanted.

    x'_i = clip(x_i + scale_i · (√D / 255) · g_i / ‖g_i‖₂, 0, 1)        D = C·H·W, the norm per image
    x̂'_i = (x'_i − mean) / std

x, g (B, …) -> x' (B, …), x̂' (B, …). Reads x and g, writes x' and x̂': 3 passes over the images and a half for a x̂' in
bf16; some 10 FLOP a value. An image of up to 16,384 values stays in registers between norm and step; larger ones are
read in tiles by two kernels, and g twice. A zero gradient leaves its image as it is (the official code divides 0 by 0
there), a NaN spoils its whole image. Source: Nam et al. 2022, section 3.2; `scale` is the confidence of ConfODS (Nam
et al. 2021) and absent elsewhere.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch
from ensdistill.kernels.images.augment import check_normalise, normalise_ref
from ensdistill.kernels.launch import begin, cdiv, check, power_of_2, use_kernel

ONE_BLOCK = 1 << 14
"""Values of an image that a program holds at once; 16 warps have 32 each thread."""


def perturb_ref(x: Tensor, g: Tensor, scale_B: Tensor | None = None) -> Tensor:
    """Define x'. The norm is taken of g / max|g|: the square of a small float32 gradient underflows."""
    dims = tuple(range(1, x.ndim))
    g = g.to(x.dtype)
    largest = g.abs().amax(dims, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    g = g / largest.clamp_min(tiny)
    length = math.sqrt(x[0].numel()) / 255
    step = length * g / torch.linalg.vector_norm(g, dim=dims, keepdim=True).clamp_min(tiny)
    if scale_B is not None:
        step = step * scale_B.to(x.dtype).view(-1, *[1] * len(dims))
    return (x + step).clamp(0, 1)


@triton.jit
def _norm(b_g, TINY: tl.constexpr):
    # of each row: max|g|, and ‖g / max|g|‖². Comparisons with a NaN are false: it passes through.
    largest = tl.max(tl.abs(b_g), axis=1)
    largest = tl.where(largest < TINY, TINY, largest)
    b_u = tl.div_rn(b_g, tl.broadcast_to(largest[:, None], b_g.shape))
    return largest, tl.sum(b_u * b_u, axis=1)


@triton.jit
def perturb_norm_kernel(p_g, p_norm, D: tl.constexpr, T: tl.constexpr, TINY: tl.constexpr, BLOCK_D: tl.constexpr):
    begin()
    # norms of the tiles of large images: (B, T, 2)
    i_b, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = i_t * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    b_g = tl.load(p_g + i_b * D + o_d, mask=o_d < D, other=0).to(tl.float32)
    largest, square = _norm(b_g, TINY)
    o_one = tl.arange(0, 1)
    tl.store(p_norm + (i_b * T + i_t) * 2 + o_one, largest)
    tl.store(p_norm + (i_b * T + i_t) * 2 + 1 + o_one, square)


@triton.jit
def perturb_kernel(
    p_x,
    p_g,
    p_scale,
    p_norm,
    p_y,
    p_z,
    p_mean,
    p_std,
    B,
    LENGTH: tl.constexpr,
    TINY: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    begin()
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_b = o_b < B
    m = m_b[:, None] & (o_d < D)[None, :]
    o_x = o_b.to(tl.int64)[:, None] * D + o_d[None, :]
    b_g = tl.load(p_g + o_x, mask=m, other=0).to(tl.float32)
    b_x = tl.load(p_x + o_x, mask=m, other=0)
    if p_norm is not None:
        o_t = tl.arange(0, BLOCK_T)
        m_t = m_b[:, None] & (o_t < T)[None, :]
        o_norm = (o_b.to(tl.int64)[:, None] * T + o_t[None, :]) * 2
        b_largest = tl.load(p_norm + o_norm, mask=m_t, other=TINY)
        b_square = tl.load(p_norm + o_norm + 1, mask=m_t, other=0)
        largest = tl.max(b_largest, axis=1)
        ratio = tl.div_rn(b_largest, tl.broadcast_to(largest[:, None], b_largest.shape))
        square = tl.sum(b_square * ratio * ratio, axis=1)
    else:
        largest, square = _norm(b_g, TINY)
    norm = tl.sqrt_rn(square)
    norm = tl.where(norm < TINY, TINY, norm)
    b_u = LENGTH * tl.div_rn(b_g, tl.broadcast_to(largest[:, None], b_g.shape))
    b_step = tl.div_rn(b_u, tl.broadcast_to(norm[:, None], b_u.shape))
    if p_scale is not None:
        b_step *= tl.load(p_scale + o_b, mask=m_b, other=0).to(tl.float32)[:, None]
    b_y = b_x + b_step
    b_y = tl.where(b_y < 0, 0.0, b_y)
    b_y = tl.where(b_y > 1, 1.0, b_y)
    tl.store(p_y + o_x, b_y, mask=m)
    if p_z is not None:
        mean, std = tl.load(p_mean + o_d % C)[None, :], tl.load(p_std + o_d % C)[None, :]
        b_z = tl.div_rn(b_y - mean, tl.broadcast_to(std, b_y.shape))
        tl.store(p_z + o_x, b_z.to(p_z.dtype.element_ty), mask=m)


def launch_perturb(
    x: Tensor, g: Tensor, scale_B: Tensor | None, mean_C: Tensor | None, std_C: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Allocate and launch: x', and x̂' where there is a mean, in the memory order of `x`, which must be dense."""
    B, D = len(x), x[0].numel()
    y = torch.empty_like(x)
    z = torch.empty_like(x, dtype=dtype) if mean_C is not None else None
    g = g.contiguous() if x.is_contiguous() else g.contiguous(memory_format=torch.channels_last)
    length, tiny = math.sqrt(D) / 255, torch.finfo(torch.float32).tiny
    BLOCK_B, BLOCK_D, T, norm = 1, power_of_2(D), 1, None
    num_warps = min(16, max(4, BLOCK_D // 512))
    if D > ONE_BLOCK:
        BLOCK_D = power_of_2(cdiv(D, 4)) if launch.INTERPRETED else 4096
        T, num_warps = cdiv(D, BLOCK_D), 8
        norm = torch.empty((B, T, 2), dtype=torch.float32, device=x.device)
        launch.launch(perturb_norm_kernel, (B, T), g, norm, D=D, T=T, TINY=tiny, BLOCK_D=BLOCK_D, num_warps=num_warps)
    else:
        # small images share a tile; in the interpreter as many as keep the programs few
        few = power_of_2(cdiv(B, launch.MAX_INTERPRETED_PROGRAMS)) if launch.INTERPRETED else 1
        BLOCK_B = min(max(few, 1024 // BLOCK_D, 1), launch.MAX_TILE // BLOCK_D)
    launch.launch(
        perturb_kernel,
        (cdiv(B, BLOCK_B), T),
        x,
        g,
        scale_B,
        norm,
        y,
        z,
        mean_C,
        std_C,
        B,
        LENGTH=length,
        TINY=tiny,
        D=D,
        C=1 if mean_C is None else len(mean_C),
        T=T,
        BLOCK_B=BLOCK_B,
        BLOCK_D=BLOCK_D,
        BLOCK_T=power_of_2(T),
        num_warps=num_warps,
    )
    return y, z


def perturb(
    x: Tensor,
    g: Tensor,
    scale_B: Tensor | None = None,
    *,
    normalise: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Step from `x` along `g`; see the module's docstring.

    Args:
        x: images (B, …) in [0, 1]. The kernel takes float32, and the memory of (B, H, W, C) and of NCHW as it is.
        g: gradient, shape of `x`; any scale.
        scale_B: factor of each image's step, or None for 1.
        normalise: (mean_C, std_C), float32: also give (x' − mean) / std in `dtype`, written in the same pass. `x` is
            (B, H, W, C), or a (B, C, H, W) view of that memory.
        kernel: see `use_kernel`.

    Returns:
        x'; and x̂', None without `normalise`. Shape and memory order are those of `x`.

    Raises:
        ValueError: shapes differ, or normalise's do not fit `x`.
    """
    check(x.shape == g.shape, "g", f"the shape of x, {tuple(x.shape)}", tuple(g.shape))
    if scale_B is not None:
        check(scale_B.shape == x.shape[:1], "scale_B", f"shape {tuple(x.shape[:1])}", tuple(scale_B.shape))
    view_as_bchw = False
    mean_C, std_C = None, None
    if normalise is not None:
        C = len(normalise[0])
        view_as_bchw = x.ndim == 4 and x.shape[1] == C and x.permute(0, 2, 3, 1).is_contiguous()
        dense = view_as_bchw or (x.shape[-1] == C and x.is_contiguous())
        check(dense, "x", f"{C} channels that lie together in memory", f"{tuple(x.shape)} with strides {x.stride()}")
        mean_C, std_C = check_normalise(normalise, C, dtype)
    if use_kernel(kernel if kernel is not None or x.dtype == torch.float32 else False, x, g, scale_B):
        check(x.dtype == torch.float32, "x", "float32 images for the kernel", x)
        if not x.is_contiguous() and not (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        return launch_perturb(x, g, scale_B, mean_C, std_C, dtype)
    y = perturb_ref(x, g, scale_B)
    if mean_C is None or std_C is None:
        return y, None
    if view_as_bchw:
        return y, normalise_ref(y.permute(0, 2, 3, 1), mean_C, std_C, dtype).permute(0, 3, 1, 2)
    return y, normalise_ref(y, mean_C, std_C, dtype)

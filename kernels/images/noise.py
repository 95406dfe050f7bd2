"""Gaussian noise on the images, drawn and added in one pass, inside [0, 1], and normalised if wanted.

    x'_i = clip(x_i + n_i / 255, 0, 1)        n_i standard normal: `philox.normal` of row first_row + i
    x̂'_i = (x'_i − mean) / std

x (B, C, H, W) -> x', x̂' (B, C, H, W). Number d = (c·H + h)·W + w of an image comes from Philox block d // 4, whatever
the memory's order: a pixel's noise does not depend on it. Reads x, writes x' and x̂': 2 passes over the images and a
half for a x̂' in bf16. A thread draws the whole block of its own value and uses one of its four numbers, for values
that share a block lie C apart: 170 instructions a value in sm_90's code, 58 with one channel. They bind, not memory.
Source: Nam et al. 2021.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch
from ensdistill.kernels.images.augment import check_normalise, normalise_ref
from ensdistill.kernels.launch import begin, cdiv, check, power_of_2, use_kernel
from ensdistill.kernels.philox import STREAM_NOISE, check_counter, normal


def add_noise_ref(x_BCHW: Tensor, counter: Tensor) -> Tensor:
    """Define the images with noise, which is float32 whatever the images are."""
    rows = torch.arange(len(x_BCHW), device=x_BCHW.device) + counter[2]
    noise_BCHW = normal(counter[0], rows, counter[1], STREAM_NOISE, x_BCHW[0].numel()).view(x_BCHW.shape)
    return (x_BCHW + noise_BCHW / 255).clamp(0, 1)


@triton.jit
def _cos(word, quarters):
    # cos(2π · uniform(word) + quarters · π/2), off by 1.1e-7 at most. The word's 23 bits are a part of a turn: the
    # nearest quarter comes off them exactly. tl.cos would keep a stack for the reduction of arguments past 1e5.
    bits = (word >> 9).to(tl.int32)
    nearest = (bits + (1 << 20)) >> 21
    angle = ((bits - (nearest << 21)).to(tl.float32) + 0.5) * (6.283185307179586 / (1 << 23))
    # minimax polynomials for [-π/4, π/4], of Cephes' sinf.c
    square = angle * angle
    cos = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cos = (cos * square - 0.5) * square + 1.0
    sin = (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    sin = sin * square * angle + angle
    quarter = nearest + quarters
    value = tl.where((quarter & 1) != 0, sin, cos)
    return tl.where(((quarter + 1) & 2) != 0, -value, value)


@triton.jit
def add_noise_kernel(
    p_x,
    p_y,
    p_z,
    p_counter,
    p_mean,
    p_std,
    B,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    begin()
    # a tile: BLOCK_P of the values of BLOCK_B images, in memory's order, in which C is the fastest
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = o_p % C
    o_d = (o_c * PIXELS + o_p // C)[None, :]
    m = (o_b < B)[:, None] & (o_p < PIXELS * C)[None, :]
    o_x = o_b.to(tl.int64)[:, None] * (PIXELS * C) + o_p[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0)
    seed, step, first_row = tl.load(p_counter), tl.load(p_counter + 1), tl.load(p_counter + 2)
    row = (first_row + o_b).to(tl.uint32)[:, None]
    word_0, word_1, word_2, word_3 = tl.philox(seed, row, step.to(tl.uint32), STREAM, o_d // 4)
    # numbers 0 and 1 of a block are of words 0 and 1, 2 and 3 of words 2 and 3; the odd ones are sines
    m_second = (o_d & 2) != 0
    u = ((tl.where(m_second, word_2, word_0) >> 9).to(tl.float32) + 0.5) * (1.0 / (1 << 23))
    cos = _cos(tl.where(m_second, word_3, word_1), 3 * (o_d & 1))
    b_y = b_x + tl.sqrt(-2.0 * tl.log(u)) * cos * (1.0 / 255.0)
    # comparisons with a NaN are false: it passes through
    b_y = tl.where(b_y < 0, 0.0, b_y)
    b_y = tl.where(b_y > 1, 1.0, b_y)
    tl.store(p_y + o_x, b_y, mask=m)
    if p_z is not None:
        mean, std = tl.load(p_mean + o_c)[None, :], tl.load(p_std + o_c)[None, :]
        b_z = tl.div_rn(b_y - mean, tl.broadcast_to(std, b_y.shape))
        tl.store(p_z + o_x, b_z.to(p_z.dtype.element_ty), mask=m)


def launch_add_noise(
    x_BCHW: Tensor, counter: Tensor, mean_C: Tensor | None, std_C: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Allocate and launch: x', and x̂' where there is a mean, in the memory order of `x_BCHW`, which must be dense."""
    B, C, H, W = x_BCHW.shape
    D = C * H * W
    y_BCHW = torch.empty_like(x_BCHW)
    z_BCHW = torch.empty_like(x_BCHW, dtype=dtype) if mean_C is not None else None
    # memory in the order of the draws is that of one channel
    fastest = C if x_BCHW.is_contiguous(memory_format=torch.channels_last) else 1
    BLOCK_P = min(power_of_2(D), 1 << 14 if launch.INTERPRETED else 1024)
    # images of few pixels share a tile; in the interpreter as many as keep the programs few
    BLOCK_B = max(1, 1024 // BLOCK_P)
    if launch.INTERPRETED:
        few = power_of_2(cdiv(B * cdiv(D, BLOCK_P), launch.MAX_INTERPRETED_PROGRAMS))
        BLOCK_B = min(max(few, BLOCK_B), launch.MAX_TILE // BLOCK_P)
    launch.launch(
        add_noise_kernel,
        (cdiv(B, BLOCK_B), cdiv(D, BLOCK_P)),
        x_BCHW,
        y_BCHW,
        z_BCHW,
        counter,
        mean_C,
        std_C,
        B,
        PIXELS=D // fastest,
        C=fastest,
        STREAM=STREAM_NOISE,
        BLOCK_B=BLOCK_B,
        BLOCK_P=BLOCK_P,
        num_warps=4,
    )
    return y_BCHW, z_BCHW


def add_noise(
    x_BCHW: Tensor,
    counter: Tensor,
    *,
    normalise: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add noise to images; see the module's docstring.

    Args:
        x_BCHW: images in [0, 1]. The kernel takes float32, and the memory of (B, H, W, C) and of (B, C, H, W) as it is.
        counter: (seed, step, first_row), int64 (3,) on their device, from `philox.counter_of`.
        normalise: (mean_C, std_C), float32: also give (x' − mean) / std in `dtype`, written in the same pass.
            `x_BCHW` has the memory of (B, H, W, C) then.
        kernel: see `use_kernel`.

    Returns:
        x'; and x̂', None without `normalise`. Shape and memory order are those of `x_BCHW`.

    Raises:
        ValueError: an argument has another type or shape, or normalise's do not fit `x_BCHW`.
    """
    check(x_BCHW.ndim == 4, "x_BCHW", "images (B, C, H, W)", x_BCHW)
    check_counter(counter)
    C = x_BCHW.shape[1]
    mean_C, std_C = check_normalise(normalise, C, dtype)
    together = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    if normalise is not None:
        found = f"{tuple(x_BCHW.shape)} with strides {x_BCHW.stride()}"
        check(together, "x_BCHW", f"{C} channels that lie together in memory", found)
    if use_kernel(kernel if kernel is not None or x_BCHW.dtype == torch.float32 else False, x_BCHW):
        check(x_BCHW.dtype == torch.float32, "x_BCHW", "float32 images for the kernel", x_BCHW)
        x_BCHW = x_BCHW if together else x_BCHW.contiguous()
        return launch_add_noise(x_BCHW, counter, mean_C, std_C, dtype)
    y_BCHW = add_noise_ref(x_BCHW, counter)
    if mean_C is None or std_C is None:
        return y_BCHW, None
    return y_BCHW, normalise_ref(y_BCHW.permute(0, 2, 3, 1), mean_C, std_C, dtype).permute(0, 3, 1, 2)

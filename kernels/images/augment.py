"""Augmentation of uint8 images: zero-padded random crop, random flip, [0, 1], and normalised if wanted.

    y[i, h, w] = x[i, h + dy_i, w' + dx_i] / 255   where that pixel exists, else 0;   w' = W − 1 − w if flip_i else w
    z = (y − mean) / std
    dy_i, dx_i in {−P, …, P}, flip_i in {0, 1}: Philox words 0, 1, 2 of (seed, row_i, step, STREAM_CROP_FLIP)

x (B, H, W, C) uint8 -> y (B, H, W, C) float32, z likewise in a type of its own. Reads B·H·W·C bytes, writes four times
as many for y and two or four times for z; no arithmetic to speak of. `row` is the image's row in the *global* batch, so
that splitting a batch over devices changes no crop. Kernel and reference agree to the bit on every device: both divide
(PyTorch would multiply a CUDA tensor by the reciprocal of a Python number).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch
from ensdistill.kernels.launch import KERNEL_TYPES, begin, cdiv, check, power_of_2, use_kernel
from ensdistill.kernels.philox import STREAM_CROP_FLIP, below, check_counter, philox


def augment_ref(x_BHWC: Tensor, counter: Tensor, *, pad: int = 4, flip: bool = True) -> Tensor:
    """Crop after padding by `pad` zeros a side, flip with probability ½ (if `flip`), scale to [0, 1]: the definition.

    Returns: (B, H, W, C) float32. With pad 0 and no flip it is the conversion alone.
    """
    B, H, W, _ = x_BHWC.shape
    device = x_BHWC.device
    white = torch.full((), 255.0, device=device)
    if pad == 0 and not flip:
        return x_BHWC.to(torch.float32) / white
    rows = torch.arange(B, device=device) + counter[2]
    word_y, word_x, word_flip, _ = philox(counter[0], rows, counter[1], STREAM_CROP_FLIP)
    dy_B, dx_B = below(word_y, 2 * pad + 1) - pad, below(word_x, 2 * pad + 1) - pad
    h_BH = torch.arange(H, device=device) + dy_B[:, None]
    w_W = torch.arange(W, device=device).expand(B, W)
    if flip:
        w_W = torch.where((word_flip >> 31).bool()[:, None], w_W.flip(1), w_W)
    w_BW = w_W + dx_B[:, None]
    inside_BHW = ((h_BH >= 0) & (h_BH < H))[:, :, None] & ((w_BW >= 0) & (w_BW < W))[:, None, :]
    i_B = torch.arange(B, device=device)
    y_BHWC = x_BHWC[i_B[:, None, None], h_BH.clamp(0, H - 1)[:, :, None], w_BW.clamp(0, W - 1)[:, None, :]]
    return torch.where(inside_BHW[..., None], y_BHWC, y_BHWC.new_zeros(())).to(torch.float32) / white


def normalise_ref(x: Tensor, mean_C: Tensor, std_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute (x − mean) / std over the last axis, computed in the type of `x` and stored in `dtype`."""
    return ((x - mean_C.to(x.dtype)) / std_C.to(x.dtype)).to(dtype)


@triton.jit
def augment_kernel(
    p_x,
    p_y,
    p_z,
    p_counter,
    p_mean,
    p_std,
    B,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    PAD: tl.constexpr,
    FLIP: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    begin()
    # a tile: BLOCK_P of the H·W·C values of BLOCK_B images
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c, o_w, o_h = o_p % C, (o_p // C) % W, o_p // (C * W)
    m_out = (o_b < B)[:, None] & (o_p < H * W * C)[None, :]
    o_image = o_b.to(tl.int64)[:, None] * (H * W * C)
    if PAD > 0 or FLIP:
        seed, step, first_row = tl.load(p_counter), tl.load(p_counter + 1), tl.load(p_counter + 2)
        row = (first_row + o_b).to(tl.uint32)
        word_y, word_x, word_flip, _ = tl.philox(seed, row, step.to(tl.uint32), STREAM, 0)
        # the high half of word · (2 · PAD + 1) is uniform in 0 … 2 · PAD
        dy = ((word_y.to(tl.uint64) * (2 * PAD + 1)) >> 32).to(tl.int32) - PAD
        dx = ((word_x.to(tl.uint64) * (2 * PAD + 1)) >> 32).to(tl.int32) - PAD
        i_h = o_h[None, :] + dy[:, None]
        i_w = o_w[None, :] + tl.zeros([BLOCK_B, 1], tl.int32)
        if FLIP:
            i_w = tl.where(((word_flip >> 31) != 0)[:, None], W - 1 - i_w, i_w)
        i_w += dx[:, None]
        m_in = m_out & (i_h >= 0) & (i_h < H) & (i_w >= 0) & (i_w < W)
        b_x = tl.load(p_x + o_image + ((i_h * W + i_w) * C + o_c[None, :]), mask=m_in, other=0)
    else:
        b_x = tl.load(p_x + o_image + o_p[None, :], mask=m_out, other=0)
    b_y = tl.div_rn(b_x.to(tl.float32), 255.0)
    tl.store(p_y + o_image + o_p[None, :], b_y, mask=m_out)
    if p_z is not None:
        mean, std = tl.load(p_mean + o_c)[None, :], tl.load(p_std + o_c)[None, :]
        b_z = tl.div_rn(b_y - mean, tl.broadcast_to(std, b_y.shape))
        tl.store(p_z + o_image + o_p[None, :], b_z.to(p_z.dtype.element_ty), mask=m_out)


def launch_augment(
    x_BHWC: Tensor,
    counter: Tensor,
    pad: int,
    flip: bool,
    mean_C: Tensor | None,
    std_C: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Allocate and launch: the images, and the normalised images where there is a mean."""
    B, H, W, C = x_BHWC.shape
    y_BHWC = torch.empty((B, H, W, C), dtype=torch.float32, device=x_BHWC.device)
    z_BHWC = torch.empty((B, H, W, C), dtype=dtype, device=x_BHWC.device) if mean_C is not None else None
    BLOCK_P = min(power_of_2(H * W * C), 1 << 14 if launch.INTERPRETED else 1024 if B * H * W * C <= 1 << 20 else 4096)
    # images of few pixels share a tile; in the interpreter as many as keep the programs few
    BLOCK_B = max(1, 1024 // BLOCK_P)
    if launch.INTERPRETED:
        programs = cdiv(H * W * C, BLOCK_P)
        few = power_of_2(cdiv(B * programs, launch.MAX_INTERPRETED_PROGRAMS))
        BLOCK_B = min(max(few, BLOCK_B), launch.MAX_TILE // BLOCK_P)
    launch.launch(
        augment_kernel,
        (cdiv(B, BLOCK_B), cdiv(H * W * C, BLOCK_P)),
        x_BHWC.contiguous(),
        y_BHWC,
        z_BHWC,
        counter,
        mean_C,
        std_C,
        B,
        H=H,
        W=W,
        C=C,
        PAD=pad,
        FLIP=flip,
        STREAM=STREAM_CROP_FLIP,
        BLOCK_B=BLOCK_B,
        BLOCK_P=BLOCK_P,
        num_warps=4 if BLOCK_P <= 1024 else 8,
    )
    return y_BHWC, z_BHWC


def augment(
    x_BHWC: Tensor,
    counter: Tensor,
    *,
    pad: int = 4,
    flip: bool = True,
    normalise: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Augment a batch; see `augment_ref`.

    Args:
        x_BHWC: uint8.
        counter: (seed, step, first_row), int64 (3,), from `philox.counter_of`: what the crops are drawn from.
        pad, flip: see `augment_ref`.
        normalise: (mean_C, std_C), float32: also give (y − mean) / std in `dtype`, written in the same pass.
        kernel: see `use_kernel`.

    Returns:
        y (B, H, W, C) float32 in [0, 1]; and y normalised, None without `normalise`.

    Raises:
        ValueError: an argument has another type or shape, or `pad` is negative or not below H and W.
    """
    check(x_BHWC.dtype == torch.uint8 and x_BHWC.ndim == 4, "x_BHWC", "a uint8 tensor (B, H, W, C)", x_BHWC)
    smaller = min(x_BHWC.shape[1:3])
    check(0 <= pad < smaller, "pad", f"0 ≤ pad < {smaller} for images {tuple(x_BHWC.shape[1:3])}", pad)
    check_counter(counter)
    mean_C, std_C = check_normalise(normalise, x_BHWC.shape[3], dtype)
    if use_kernel(kernel, x_BHWC, mean_C, std_C):
        return launch_augment(x_BHWC, counter, pad, flip, mean_C, std_C, dtype)
    y_BHWC = augment_ref(x_BHWC, counter, pad=pad, flip=flip)
    return y_BHWC, None if normalise is None else normalise_ref(y_BHWC, *normalise, dtype)


def check_normalise(
    normalise: tuple[Tensor, Tensor] | None, C: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Unpack (mean, std), or two None; ValueError where they are no float32 vectors of C or `dtype` is not written."""
    if normalise is None:
        return None, None
    check(dtype in KERNEL_TYPES, "dtype", "float32 or bfloat16", dtype)
    for name, vector in zip(("mean", "std"), normalise, strict=True):
        check(vector.dtype == torch.float32 and vector.shape == (C,), name, f"a float32 tensor ({C},)", vector)
    return normalise

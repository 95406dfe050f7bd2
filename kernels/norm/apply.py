"""Application of BatchNorm: the affine map of each channel, with what a block does before and after it.

    z = [relu](scale·x + shift + residual)

x (M, …, C) -> z of its type; scale and shift, fp32 (1, C) or (M, C), come from `batch_norm_statistics` or from running
statistics. On request the packed ReLU bits of the first members. Bytes: x and z, the residual where there is one, C / 8
a pixel of bits; 2 to 4 FLOPs a value, in fp32. Source: Ioffe and Szegedy 2015, algorithm 1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.epilogue import pack_bits, pack_bits_ref, wide
from ensdistill.kernels.launch import begin, cdiv, check, launch
from ensdistill.kernels.norm.channels import (
    DONE,
    NO_SUMS,
    await_done,
    channel_tile,
    check_activations,
    check_vectors,
    claim,
    is_done,
    load,
    load_vector,
    over_pixels,
    publish,
    store,
    sum_share,
)
from ensdistill.kernels.norm.statistics import finish_statistics


def batch_norm_apply_ref(
    x: Tensor, scale: Tensor, shift: Tensor, *, relu: bool = True, residual: Tensor | None = None, bits: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Define z and its packed bits, in fp32 or float64."""
    z = wide(x) * over_pixels(scale, x) + over_pixels(shift, x)
    z = z if residual is None else z + residual
    z = (z.relu() if relu else z).to(x.dtype)
    return z, pack_bits_ref(z[:bits]) if bits else None


@triton.jit
def batch_norm_apply_kernel(
    p_x,
    p_scale,
    p_shift,
    p_residual,
    p_z,
    p_bits,
    rows,
    bits,
    p_sums,  # None: scale and shift are given; else this launch finishes the statistics first
    p_gamma,
    p_beta,
    p_mean,
    p_rstd,
    p_running_mean,
    p_running_var,
    p_shares,
    p_counters,
    sum_rows,
    n,
    eps,
    momentum,
    correction,
    C: tl.constexpr,
    PER_MEMBER: tl.constexpr,
    RELU: tl.constexpr,
    EVEN: tl.constexpr,
    OWN_GAMMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    begin()
    i_m = tl.program_id(1)
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    MASKED_C: tl.constexpr = C % BLOCK_C != 0
    MASKED: tl.constexpr = MASKED_C or not EVEN
    i_n = tl.program_id(0) // BLOCKS_C * BLOCK_N
    i_c = tl.program_id(0) % BLOCKS_C * BLOCK_C
    o_n, o_c = tl.arange(0, BLOCK_N), i_c + tl.arange(0, BLOCK_C)
    m = (i_n + o_n < rows)[:, None] & (o_c < C)[None, :]
    i_row = i_m.to(tl.int64) * rows + i_n
    o = o_n[:, None] * C + o_c[None, :]
    o_vector = i_m * C + o_c if PER_MEMBER else o_c
    # on their way while the statistics are finished
    b_x = load(p_x + i_row * C + o, m, MASKED)
    if p_residual is not None:
        b_residual = load(p_residual + i_row * C + o, m, MASKED)
    if p_sums is not None:  # noqa: SIM102 - decided when it is compiled, the next when it runs
        if not is_done(p_counters, BLOCKS):
            i_share = claim(p_counters)
            while i_share < BLOCKS * SHARES:
                is_last, i_g, o_s, b_sum, b_square = sum_share(
                    p_sums, p_shares, p_counters, i_share, sum_rows, C, SHARES, BLOCK_T, BLOCK_S
                )
                if is_last:
                    finish_statistics(
                        b_sum, b_square, i_g, o_s, p_gamma, p_beta, p_mean, p_rstd, p_scale, p_shift, p_running_mean,
                        p_running_var, n, eps, momentum, correction, C, OWN_GAMMA,
                    )  # fmt: skip
                    publish(p_counters + DONE)
                i_share = claim(p_counters)
            await_done(p_counters, BLOCKS)
    b = b_x.to(tl.float32) * load_vector(p_scale + o_vector, o_c < C, MASKED_C)[None, :]
    b = b + load_vector(p_shift + o_vector, o_c < C, MASKED_C)[None, :]
    if p_residual is not None:
        b = b + b_residual.to(tl.float32)
    if RELU:
        b = tl.maximum(b, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_z = b.to(p_z.dtype.element_ty)
    store(p_z + i_row * C + o, b_z, m, MASKED)
    if p_bits is not None:  # noqa: SIM102 - decided when it is compiled, the next when it runs
        if i_m < bits:
            BYTES: tl.constexpr = (C + 7) // 8
            o_byte = i_c // 8 + tl.arange(0, BLOCK_C // 8)
            m_byte = (i_n + o_n < rows)[:, None] & (o_byte < BYTES)[None, :]
            b_bits = pack_bits(tl.where(m, b_z.to(tl.float32), 0.0))
            store(p_bits + i_row * BYTES + o_n[:, None] * BYTES + o_byte[None, :], b_bits, m_byte, MASKED)


def launch_batch_norm_apply(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    relu: bool,
    residual: Tensor | None,
    bits: int,
    sums: Sequence[Any] = (None,) * 9 + (0,) * 5,
    constants: Mapping[str, int] = NO_SUMS,
) -> tuple[Tensor, Tensor | None]:
    """Allocate z and its bits, if any are asked for, and launch.

    `sums`: from p_sums to correction, of which `scale` and `shift` are made first; `constants`: what that takes.
    """
    (M, *_, C), rows = x.shape, x[0, ..., 0].numel()
    z = torch.empty_like(x)
    packed_shape = (bits, *x.shape[1:-1], cdiv(C, 8))
    packed = torch.empty(packed_shape, dtype=torch.uint8, device=x.device) if bits else None
    tile = channel_tile(M, rows, C)
    launch(
        batch_norm_apply_kernel,
        (tile.programs(rows) * tile.blocks(C), M),
        *(x, scale, shift, residual, z, packed, rows, bits, *sums),
        C=C,
        PER_MEMBER=len(scale) > 1,
        RELU=relu,
        EVEN=rows % tile.BLOCK_N == 0,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        **constants,
        num_warps=4,
    )
    return z, packed


def check_apply(x: Tensor, relu: bool, residual: Tensor | None, bits: int) -> None:
    """Raise ValueError unless these are arguments of `batch_norm_apply`."""
    check_activations(x, "x")
    if residual is not None:
        check_activations(residual, "residual", x.shape)
    check(0 <= bits <= len(x) and (relu or not bits), "bits", "0 without ReLU, else at most the members", bits)


def batch_norm_apply(
    x: Tensor, scale: Tensor, shift: Tensor, *, relu: bool = True, residual: Tensor | None = None, bits: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Compute z = [relu](scale·x + shift + residual) and the packed ReLU bits of the first `bits` members (None for 0).

    There is no gradient: `norm/gradient.py` has the backward.

    Args:
        x: (M, …, C), bf16 or fp32, contiguous.
        scale, shift: fp32 (1, C) or (M, C).
        residual: shape of `x`, bf16 or fp32.
        bits: members whose bits are wanted: (bits, …, ⌈C/8⌉) uint8, bit j of byte c is channel 8c + j, 1 where z > 0.

    Raises:
        ValueError: a shape or type that is none of these; bits without ReLU or of more members than there are.
    """
    check_apply(x, relu, residual, bits)
    check_vectors(scale, "scale", len(x), x.shape[-1])
    check_vectors(shift, "shift", len(x), x.shape[-1])
    check(shift.shape == scale.shape, "shift", f"the shape of scale, {tuple(scale.shape)}", shift)
    return launch_batch_norm_apply(x, scale, shift, relu, residual, bits)

"""BatchNorm's backward half: from du, the gradient at scale·x + shift, to dγ, dβ and dx.

    dβ = Σdu,   dγ = (Σdu·x − mean·Σdu)·rstd
    dx = c0·du + c1·x + c2 + residual
    c0 = γ·rstd,   c1 = −γ·rstd²·dγ / n,   c2 = −γ·rstd·dβ / n − c1·mean

n counts the values behind the statistics: one member's, or all members' where they share them. The residual is the
gradient that reaches x on another way, such as a shortcut.

Coefficients: sums (M, T, 2, C) fp32 of du and du·x -> dγ, dβ and (G, 3, C). Bytes: 8·M·T·C, from L2; the sums are taken
and their difference formed in fp64. Input gradient: du, x (M, …, C) -> dx of du's type. Bytes: du, x and dx, the
residual where there is one; 4 or 5 FLOPs a value. Source: Ioffe and Szegedy 2015, section 3.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.epilogue import wide
from ensdistill.kernels.launch import begin, cdiv, check, launch
from ensdistill.kernels.norm.channels import (
    DONE,
    NO_SUMS,
    await_done,
    channel_tile,
    check_activations,
    check_gamma,
    check_sums,
    claim,
    is_done,
    load,
    load_vector,
    over_pixels,
    publish,
    store,
    sum_share,
    sums_options,
)
from ensdistill.kernels.norm.statistics import BatchStatistics, SumsOf


def batch_norm_coefficients_ref(
    sums_MT2C: Tensor, statistics: BatchStatistics, gamma: Tensor, *, count: int, per_member: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Define dγ, dβ and the coefficients; computed in float64, results in the type of `sums_MT2C`."""
    n = count if per_member else count * len(sums_MT2C)
    sums_G2C = sums_MT2C.double().sum(1 if per_member else (0, 1)).view(-1, 2, sums_MT2C.shape[-1])
    mean, rstd = statistics.mean.double(), statistics.rstd.double()
    dbeta_GC = sums_G2C[:, 0]
    dgamma_GC = (sums_G2C[:, 1] - mean * dbeta_GC) * rstd
    c0 = gamma * rstd
    c1 = -c0 * rstd * dgamma_GC / n
    c2 = -c0 * dbeta_GC / n - c1 * mean
    dtype = sums_MT2C.dtype
    dgamma, dbeta = (v.sum_to_size(gamma.shape).to(dtype) for v in (dgamma_GC, dbeta_GC))
    return dgamma, dbeta, torch.stack((c0, c1, c2), 1).to(dtype)


def batch_norm_input_gradient_ref(
    du: Tensor, x: Tensor, coefficients_G3C: Tensor, *, residual: Tensor | None = None
) -> Tensor:
    """Define dx, in fp32 or float64."""
    c0, c1, c2 = (over_pixels(v, x) for v in coefficients_G3C.unbind(1))
    dx = c0 * wide(du) + c1 * wide(x) + c2
    return (dx if residual is None else dx + residual).to(du.dtype)


@triton.jit
def finish_coefficients(
    b_dbeta,
    b_dgamma,
    i_g,
    o_c,
    p_mean,
    p_rstd,
    p_gamma,
    p_dgamma,
    p_dbeta,
    p_coefficients,
    n,
    C,
    OWN_GAMMA: tl.constexpr,
):
    """From both sums of channels `o_c` of group `i_g` to dγ, dβ and the coefficients."""
    m_c = o_c < C
    o_g = i_g * C + o_c
    b_mean = tl.load(p_mean + o_g, mask=m_c, other=0.0).to(tl.float64)
    b_rstd = tl.load(p_rstd + o_g, mask=m_c, other=0.0).to(tl.float64)
    b_gamma = tl.load(p_gamma + (o_g if OWN_GAMMA else o_c), mask=m_c, other=0.0).to(tl.float64)
    b_dgamma = (b_dgamma - b_mean * b_dbeta) * b_rstd
    b_0 = b_gamma * b_rstd
    b_1 = -b_0 * b_rstd * b_dgamma / n
    b_2 = -b_0 * b_dbeta / n - b_1 * b_mean
    tl.store(p_dgamma + o_g, b_dgamma.to(tl.float32), mask=m_c)
    tl.store(p_dbeta + o_g, b_dbeta.to(tl.float32), mask=m_c)
    p = p_coefficients + i_g * (3 * C) + o_c
    tl.store(p, b_0.to(tl.float32), mask=m_c)
    tl.store(p + C, b_1.to(tl.float32), mask=m_c)
    tl.store(p + 2 * C, b_2.to(tl.float32), mask=m_c)


@triton.jit
def batch_norm_coefficients_kernel(
    p_sums,
    p_mean,
    p_rstd,
    p_gamma,
    p_dgamma,
    p_dbeta,
    p_coefficients,
    rows,
    n,
    C,
    OWN_GAMMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    _, i_g, o_c, b_dbeta, b_dgamma = sum_share(p_sums, None, None, tl.program_id(0), rows, C, 1, BLOCK_T, BLOCK_C)
    finish_coefficients(
        b_dbeta, b_dgamma, i_g, o_c, p_mean, p_rstd, p_gamma, p_dgamma, p_dbeta, p_coefficients, n, C, OWN_GAMMA
    )


@triton.jit
def batch_norm_input_gradient_kernel(
    p_du,
    p_x,
    p_coefficients,
    p_residual,
    p_dx,
    rows,
    p_sums,  # None: the coefficients are given; else this launch finishes them first
    p_mean,
    p_rstd,
    p_gamma,
    p_dgamma,
    p_dbeta,
    p_shares,
    p_counters,
    sum_rows,
    n,
    C: tl.constexpr,
    PER_MEMBER: tl.constexpr,
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
    o_n, o_c = tl.arange(0, BLOCK_N), tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m = (i_n + o_n < rows)[:, None] & (o_c < C)[None, :]
    o_member = (i_m.to(tl.int64) * rows + i_n) * C
    o = o_n[:, None] * C + o_c[None, :]
    # on their way while the coefficients are finished
    b_du = load(p_du + o_member + o, m, MASKED)
    b_x = load(p_x + o_member + o, m, MASKED)
    if p_residual is not None:
        b_residual = load(p_residual + o_member + o, m, MASKED)
    if p_sums is not None:  # noqa: SIM102 - decided when it is compiled, the next when it runs
        if not is_done(p_counters, BLOCKS):
            i_share = claim(p_counters)
            while i_share < BLOCKS * SHARES:
                is_last, i_g, o_s, b_dbeta, b_dgamma = sum_share(
                    p_sums, p_shares, p_counters, i_share, sum_rows, C, SHARES, BLOCK_T, BLOCK_S
                )
                if is_last:
                    finish_coefficients(
                        b_dbeta, b_dgamma, i_g, o_s, p_mean, p_rstd, p_gamma, p_dgamma, p_dbeta, p_coefficients, n, C,
                        OWN_GAMMA,
                    )  # fmt: skip
                    publish(p_counters + DONE)
                i_share = claim(p_counters)
            await_done(p_counters, BLOCKS)
    p_c = p_coefficients + (i_m * (3 * C) + o_c if PER_MEMBER else o_c)
    b = b_du.to(tl.float32) * load_vector(p_c, o_c < C, MASKED_C)[None, :]
    b += b_x.to(tl.float32) * load_vector(p_c + C, o_c < C, MASKED_C)[None, :]
    b += load_vector(p_c + 2 * C, o_c < C, MASKED_C)[None, :]
    if p_residual is not None:
        b += b_residual.to(tl.float32)
    store(p_dx + o_member + o, b, m, MASKED)


def empty_coefficients(groups: int, C: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate dγ (G, C), dβ (G, C) and the coefficients (G, 3, C)."""
    dgamma_GC, dbeta_GC = (torch.empty(groups, C, device=device) for _ in range(2))
    return dgamma_GC, dbeta_GC, torch.empty(groups, 3, C, device=device)


def of_gamma(dgamma_GC: Tensor, dbeta_GC: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Give dγ and dβ the shape of `gamma`, summed over the groups that share it."""
    if gamma.ndim == 1 and len(dgamma_GC) > 1:
        dgamma_GC, dbeta_GC = dgamma_GC.sum(0), dbeta_GC.sum(0)
    return dgamma_GC.view(gamma.shape), dbeta_GC.view(gamma.shape)


def launch_batch_norm_input_gradient(
    du: Tensor,
    x: Tensor,
    coefficients_G3C: Tensor,
    residual: Tensor | None,
    sums: Sequence[Any] = (None,) * 8 + (0,) * 2,
    constants: Mapping[str, int] = NO_SUMS,
) -> Tensor:
    """Allocate dx and launch.

    `sums`: from p_sums to n, of which the coefficients are made first; `constants`: what that takes.
    """
    (M, *_, C), rows = x.shape, x[0, ..., 0].numel()
    dx = torch.empty_like(du)
    tile = channel_tile(M, rows, C)
    launch(
        batch_norm_input_gradient_kernel,
        (tile.programs(rows) * tile.blocks(C), M),
        *(du, x, coefficients_G3C, residual, dx, rows, *sums),
        C=C,
        PER_MEMBER=len(coefficients_G3C) > 1,
        EVEN=rows % tile.BLOCK_N == 0,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        **constants,
        num_warps=4,
    )
    return dx


def check_coefficients(
    sums_MT2C: Tensor, statistics: BatchStatistics, gamma: Tensor, count: int, per_member: bool
) -> None:
    """Raise ValueError unless these are arguments of `batch_norm_coefficients`."""
    check_sums(sums_MT2C, count)
    M, C = len(sums_MT2C), sums_MT2C.shape[-1]
    check_gamma(gamma, "gamma", M, C, per_member)
    shape = (M if per_member else 1, C)
    for name, v in (("statistics.mean", statistics.mean), ("statistics.rstd", statistics.rstd)):
        right = v.shape == shape and v.dtype == torch.float32 and v.is_contiguous()
        check(right, name, f"contiguous float32 {shape}", v)


def check_input_gradient(du: Tensor, x: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError unless these are activations that `batch_norm_input_gradient` can read."""
    check_activations(du, "du")
    check_activations(x, "x", du.shape)
    if residual is not None:
        check_activations(residual, "residual", du.shape)


def batch_norm_coefficients(
    sums_MT2C: Tensor, statistics: BatchStatistics, gamma: Tensor, *, count: int, per_member: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dγ and dβ (shape of `gamma`), and the coefficients of dx, fp32 (G, 3, C).

    Args:
        sums_MT2C: Σdu and Σdu·x in T parts a member, fp32 (M, T, 2, C); x is what the statistics were taken of.
        statistics: the forward's.
        gamma: fp32 (C,), or (M, C) with `per_member`.
        count: values a channel of one member, B·H·W.
        per_member: as in the forward.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    check_coefficients(sums_MT2C, statistics, gamma, count, per_member)
    C = sums_MT2C.shape[-1]
    G, rows, n = SumsOf.of(sums_MT2C, count, per_member)
    dgamma_GC, dbeta_GC, coefficients_G3C = empty_coefficients(G, C, sums_MT2C.device)
    options = sums_options(rows, C)
    launch(
        batch_norm_coefficients_kernel,
        (cdiv(C, options["BLOCK_C"]) * G,),
        *(sums_MT2C, statistics.mean, statistics.rstd, gamma, dgamma_GC, dbeta_GC, coefficients_G3C, rows, n),
        C=C,
        OWN_GAMMA=gamma.ndim == 2,
        **options,
    )
    return *of_gamma(dgamma_GC, dbeta_GC, gamma), coefficients_G3C


def batch_norm_input_gradient(
    du: Tensor, x: Tensor, coefficients_G3C: Tensor, *, residual: Tensor | None = None
) -> Tensor:
    """Compute dx = c0·du + c1·x + c2 + residual, of du's type.

    Args:
        du: gradient at scale·x + shift, (M, …, C), bf16 or fp32.
        x: what the statistics were taken of, same shape, bf16 or fp32.
        coefficients_G3C: of `batch_norm_coefficients`, G = 1 or M.
        residual: added to dx; same shape, bf16 or fp32.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    check_input_gradient(du, x, residual)
    C = du.shape[-1]
    right = coefficients_G3C.shape in ((1, 3, C), (len(du), 3, C)) and coefficients_G3C.dtype == torch.float32
    expected = f"contiguous float32 (1, 3, {C}) or ({len(du)}, 3, {C})"
    check(right and coefficients_G3C.is_contiguous(), "coefficients_G3C", expected, coefficients_G3C)
    return launch_batch_norm_input_gradient(du, x, coefficients_G3C, residual)

"""BatchNorm's statistics of a batch, finished from partial sums.

    mean = Σx / n,   var = max(Σx² / n − mean², 0),   rstd = 1 / √(var + ε)
    scale = γ·rstd,   shift = β − mean·scale,   running ← (1 − momentum)·running + momentum·(mean, var)

sums (M, T, 2, C) fp32 -> four vectors (G, C), G = 1 or M. n counts one member's values, or all members' when they share
statistics. The running variance is the *biased* one, as the official code has it (PyTorch keeps n / (n − 1) times it).

Bytes: 8·M·T·C, from L2; two fp64 additions a value. They are added and subtracted in fp64, so that what the difference
of squares loses lies in the fp32 partial sums alone: some 2⁻²³·(mean / std)² / √T of the variance. Measured at a mean
of 100 std: 1.5e-3 of it with one part a member, 1.8e-4 with 64 (with the second stage in fp32: 2e-3 to 5e-3).
Source: Ioffe and Szegedy 2015, algorithm 1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import begin, cdiv, check, launch
from ensdistill.kernels.norm.channels import (
    check_counters,
    check_gamma,
    check_sums,
    sum_share,
    sums_options,
    sums_shared_options,
)
from ensdistill.kernels.operation import operation


class BatchStatistics(NamedTuple):
    """Vectors of a norm for each group (all members, or one each) and channel, fp32 (G, C)."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


def batch_norm_statistics_ref(
    sums_MT2C: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    count: int,
    per_member: bool = False,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    unbiased: bool = False,
    counters: Tensor | None = None,  # the kernel's
) -> BatchStatistics:
    """Define the statistics; sums in float64, results in the type of `sums_MT2C`."""
    n = count if per_member else count * len(sums_MT2C)
    sums_G2C = sums_MT2C.double().sum(1 if per_member else (0, 1)).view(-1, 2, sums_MT2C.shape[-1])
    mean = sums_G2C[:, 0] / n
    var = (sums_G2C[:, 1] / n - mean.square()).clamp_min(0)
    rstd = (var + eps).rsqrt()
    scale = gamma * rstd
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.view_as(running_mean).to(running_mean.dtype), momentum)
            kept = var * (n / (n - 1)) if unbiased else var
            running_var.lerp_(kept.view_as(running_var).to(running_var.dtype), momentum)
    return BatchStatistics(*(v.to(sums_MT2C.dtype) for v in (mean, rstd, scale, beta - mean * scale)))


@triton.jit
def finish_statistics(
    b_sum,
    b_square,
    i_g,
    o_c,
    p_gamma,
    p_beta,
    p_mean,
    p_rstd,
    p_scale,
    p_shift,
    p_running_mean,
    p_running_var,
    n,
    eps,
    momentum,
    correction,  # of the running variance, n / (n - 1) or 1
    C,
    OWN_GAMMA: tl.constexpr,
):
    """From both sums of channels `o_c` of group `i_g` to all that the norm has of vectors."""
    m_c = o_c < C
    b_mean = b_sum / n
    b_var = b_square / n - b_mean * b_mean
    b_var = tl.where(b_var < 0, 0.0, b_var)  # NaN stays
    b_rstd = 1.0 / tl.sqrt(b_var + eps)
    o_gamma = i_g * C + o_c if OWN_GAMMA else o_c
    b_scale = tl.load(p_gamma + o_gamma, mask=m_c, other=0.0).to(tl.float64) * b_rstd
    b_shift = tl.load(p_beta + o_gamma, mask=m_c, other=0.0).to(tl.float64) - b_mean * b_scale
    o_g = i_g * C + o_c
    tl.store(p_mean + o_g, b_mean.to(tl.float32), mask=m_c)
    tl.store(p_rstd + o_g, b_rstd.to(tl.float32), mask=m_c)
    tl.store(p_scale + o_g, b_scale.to(tl.float32), mask=m_c)
    tl.store(p_shift + o_g, b_shift.to(tl.float32), mask=m_c)
    if p_running_mean is not None:
        b_old = tl.load(p_running_mean + o_g, mask=m_c, other=0.0).to(tl.float64)
        tl.store(p_running_mean + o_g, (b_old + momentum * (b_mean - b_old)).to(tl.float32), mask=m_c)
        b_old = tl.load(p_running_var + o_g, mask=m_c, other=0.0).to(tl.float64)
        tl.store(p_running_var + o_g, (b_old + momentum * (b_var * correction - b_old)).to(tl.float32), mask=m_c)


@triton.jit
def batch_norm_statistics_kernel(
    p_sums,
    p_gamma,
    p_beta,
    p_mean,
    p_rstd,
    p_scale,
    p_shift,
    p_running_mean,
    p_running_var,
    p_shares,
    p_counters,  # None: a program sums all rows of its channels
    rows,
    n,
    eps,
    momentum,
    correction,
    C,
    OWN_GAMMA: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    is_last, i_g, o_c, b_sum, b_square = sum_share(
        p_sums, p_shares, p_counters, tl.program_id(0), rows, C, SHARES, BLOCK_T, BLOCK_C
    )
    if is_last:
        finish_statistics(
            b_sum, b_square, i_g, o_c, p_gamma, p_beta, p_mean, p_rstd, p_scale, p_shift, p_running_mean,
            p_running_var, n, eps, momentum, correction, C, OWN_GAMMA,
        )  # fmt: skip


class SumsOf(NamedTuple):
    """Partial sums, and how the groups that share statistics divide them."""

    groups: int
    rows: int
    """Partial sums of a group."""
    n: int
    """Values a channel of a group."""

    @classmethod
    def of(cls, sums_MT2C: Tensor, count: int, per_member: bool) -> SumsOf:
        """Count groups, rows and values: the members are groups, or all of them are one."""
        M, T = sums_MT2C.shape[:2]
        return cls(M, T, count) if per_member else cls(1, M * T, count * M)


def empty_statistics(groups: int, C: int, device: torch.device) -> BatchStatistics:
    """Allocate statistics that a kernel will write."""
    return BatchStatistics(*(torch.empty(groups, C, device=device) for _ in range(4)))


def shares_and_options(
    sums_MT2C: Tensor, groups: int, rows: int, counters: Tensor | None
) -> tuple[Tensor | None, dict[str, int]]:
    """Allocate the shares of `sum_share`, None where one program sums all rows, and choose its constants."""
    C = sums_MT2C.shape[-1]
    if counters is None:
        options = sums_options(rows, C)
        return None, options | {"SHARES": 1, "BLOCKS": groups * cdiv(C, options["BLOCK_C"])}
    options = sums_shared_options(rows, C, groups)
    if options["SHARES"] == 1:
        return None, options
    shape = (options["BLOCKS"], options["SHARES"], 2, options["BLOCK_C"])
    return torch.empty(shape, dtype=torch.float64, device=sums_MT2C.device), options


def check_running(
    sums_MT2C: Tensor,
    gamma: Tensor,
    beta: Tensor,
    count: int,
    per_member: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    unbiased: bool,
) -> None:
    """Raise ValueError unless these are arguments of `batch_norm_statistics`; either running statistic may be None."""
    check_sums(sums_MT2C, count)
    M, C = len(sums_MT2C), sums_MT2C.shape[-1]
    check_gamma(gamma, "gamma", M, C, per_member)
    check_gamma(beta, "beta", M, C, per_member)
    n = count if per_member else count * M
    check(n > 1 or not unbiased, "count", "more than one value a channel for an unbiased variance", n)
    check(beta.shape == gamma.shape, "beta", f"the shape of gamma, {tuple(gamma.shape)}", beta)
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None:
            shape = (M, C) if per_member else (C,)
            right = running.shape == shape and running.dtype == torch.float32 and running.is_contiguous()
            check(right, name, f"contiguous float32 {shape}", running)


@operation(definition=batch_norm_statistics_ref, library=batch_norm_statistics_ref)
def batch_norm_statistics(
    sums_MT2C: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    count: int,
    per_member: bool = False,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    unbiased: bool = False,
    counters: Tensor | None = None,
) -> BatchStatistics:
    """Finish the statistics of a batch from its partial sums; no gradient.

    Args:
        sums_MT2C: Σx and Σx² in T parts a member, fp32 (M, T, 2, C).
        gamma, beta: fp32 (C,), or (M, C) with `per_member`.
        count: values a channel of one member, B·H·W.
        per_member: statistics of each member (G = M) instead of all together (G = 1).
        running_mean, running_var: fp32 (C,), or (M, C) with `per_member`; updated in place where given.
        momentum: weight of this batch in the running statistics.
        unbiased: keep the running variance of n − 1, as PyTorch's own norm does, instead of the official code's of n.
        counters: zeros, int32 of `num_counters(C, G)` or more, which this launch uses up: many programs then share the
            rows of a channel.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    if running_mean is None or running_var is None:
        check(running_mean is running_var, "running_mean, running_var", "both or neither", "one")
    check_running(sums_MT2C, gamma, beta, count, per_member, running_mean, running_var, unbiased)
    C = sums_MT2C.shape[-1]
    G, rows, n = SumsOf.of(sums_MT2C, count, per_member)
    check_counters(counters, C, G, sums_MT2C)
    statistics = empty_statistics(G, C, sums_MT2C.device)
    shares, options = shares_and_options(sums_MT2C, G, rows, counters)
    launch(
        batch_norm_statistics_kernel,
        (options.pop("BLOCKS") * options["SHARES"],),
        *(sums_MT2C, gamma, beta, *statistics, running_mean, running_var, shares, counters),
        *(rows, n, eps, momentum, n / (n - 1) if unbiased else 1.0),
        C=C,
        OWN_GAMMA=gamma.ndim == 2,
        **options,
    )
    return statistics

"""BatchNorm of a training batch in one launch each way: the pass over the activations finishes its sums first.

    forward     sums (M, T, 2, C) of Σx, Σx² -> mean, rstd, scale, shift;  z = [relu](scale·x + shift + residual)
    backward    sums of Σdu, Σdu·x -> dγ, dβ, c0, c1, c2;                  dx = c0·du + c1·x + c2 + residual

Formulas, bytes and FLOPs are those of `batch_norm_statistics` and `batch_norm_apply`, of `batch_norm_coefficients` and
`batch_norm_input_gradient`; what goes is a launch for each, of few programs that all others wait for.

The programs that start first share the rows of the sums out among themselves (`sum_share`), while what they load of
the activations is on its way; then everybody waits until the vectors are there (`await_done`). Since a program waits
only where all shares are taken, by programs that run, no order and no number of programs can make it wait for ever.
The alternative, that the last tile of the convolution before finishes the sums, saves the wait too, but puts counters
and fp64 into every convolution's epilogue, the library's and all candidates' included.

`FUSED` False, or ENSDISTILL_FUSED_NORMS=0 in the environment, gives the two launches instead.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ensdistill.kernels.norm.apply import (
    batch_norm_apply,
    batch_norm_apply_ref,
    check_apply,
    launch_batch_norm_apply,
)
from ensdistill.kernels.norm.channels import check_counters
from ensdistill.kernels.norm.gradient import (
    batch_norm_coefficients,
    batch_norm_coefficients_ref,
    batch_norm_input_gradient,
    batch_norm_input_gradient_ref,
    check_coefficients,
    check_input_gradient,
    empty_coefficients,
    launch_batch_norm_input_gradient,
    of_gamma,
)
from ensdistill.kernels.norm.statistics import (
    BatchStatistics,
    SumsOf,
    batch_norm_statistics,
    batch_norm_statistics_ref,
    check_running,
    empty_statistics,
    shares_and_options,
)
from ensdistill.kernels.operation import compiled, operation

FUSED = os.environ.get("ENSDISTILL_FUSED_NORMS", "1") != "0"
"""Finish sums in the pass that needs them; else in a launch of their own before it."""
Normalised = tuple[Tensor, Tensor | None, BatchStatistics]


def batch_norm_ref(
    x: Tensor,
    sums_MT2C: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    count: int,
    running_mean: Tensor,
    running_var: Tensor,
    per_member: bool = False,
    eps: float = 1e-5,
    momentum: float = 0.1,
    unbiased: bool = False,
    relu: bool = True,
    residual: Tensor | None = None,
    bits: int = 0,
    counters: Tensor | None = None,  # the kernel's
    apply: Callable[..., tuple[Tensor, Tensor | None]] = batch_norm_apply_ref,
) -> Normalised:
    """Define the forward; `apply` computes the pass over the activations."""
    running: dict[str, Any] = {
        "running_mean": running_mean,
        "running_var": running_var,
        "momentum": momentum,
        "unbiased": unbiased,
    }
    statistics = batch_norm_statistics_ref(
        sums_MT2C, gamma, beta, count=count, per_member=per_member, eps=eps, **running
    )
    z, packed = apply(x, statistics.scale, statistics.shift, relu=relu, residual=residual, bits=bits)
    return z, packed, statistics


def batch_norm_backward_ref(
    du: Tensor,
    x: Tensor,
    sums_MT2C: Tensor,
    statistics: BatchStatistics,
    gamma: Tensor,
    *,
    count: int,
    per_member: bool = False,
    residual: Tensor | None = None,
    counters: Tensor | None = None,  # the kernel's
    apply: Callable[..., Tensor] = batch_norm_input_gradient_ref,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define the backward; `apply` computes the pass over the activations."""
    dgamma, dbeta, coefficients_G3C = batch_norm_coefficients_ref(
        sums_MT2C, statistics, gamma, count=count, per_member=per_member
    )
    return apply(du, x, coefficients_G3C, residual=residual), dgamma, dbeta


def _finishing(
    sums_MT2C: Tensor, gamma: Tensor, count: int, per_member: bool, counters: Tensor
) -> tuple[SumsOf, Tensor | None, dict[str, int]]:
    """Prepare a pass that finishes its sums: their groups, memory for the shares, the constants."""
    groups = SumsOf.of(sums_MT2C, count, per_member)
    check_counters(counters, sums_MT2C.shape[-1], groups.groups, sums_MT2C)
    shares, options = shares_and_options(sums_MT2C, groups.groups, groups.rows, counters)
    options["BLOCK_S"] = options.pop("BLOCK_C")
    return groups, shares, options | {"OWN_GAMMA": gamma.ndim == 2}


@operation(
    definition=batch_norm_ref,
    library=functools.partial(batch_norm_ref, apply=functools.partial(compiled, batch_norm_apply_ref)),
)
def batch_norm(
    x: Tensor,
    sums_MT2C: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    count: int,
    running_mean: Tensor,
    running_var: Tensor,
    per_member: bool = False,
    eps: float = 1e-5,
    momentum: float = 0.1,
    unbiased: bool = False,
    relu: bool = True,
    residual: Tensor | None = None,
    bits: int = 0,
    counters: Tensor | None = None,
) -> Normalised:
    """Compute what `batch_norm_statistics` and then `batch_norm_apply` give: z, its packed bits, the statistics.

    Args:
        x: (M, …, C), bf16 or fp32, contiguous.
        sums_MT2C: of x; after an exchange between processes (1, T, 2, C), and `count` all members' values.
        gamma, beta, count, running_mean, running_var, per_member, eps, momentum, unbiased: see `batch_norm_statistics`.
        relu, residual, bits: see `batch_norm_apply`.
        counters: zeros, int32 of `num_counters(C, G)` or more, which this launch uses up; None for two launches.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    running: dict[str, Any] = {
        "running_mean": running_mean,
        "running_var": running_var,
        "momentum": momentum,
        "unbiased": unbiased,
    }
    if counters is None or not FUSED:
        statistics = batch_norm_statistics(
            sums_MT2C, gamma, beta, count=count, per_member=per_member, eps=eps, counters=counters, **running
        )
        z, packed = batch_norm_apply(x, statistics.scale, statistics.shift, relu=relu, residual=residual, bits=bits)
        return z, packed, statistics
    check_running(sums_MT2C, gamma, beta, count, per_member, running_mean, running_var, unbiased)
    check_apply(x, relu, residual, bits)
    (G, rows, n), shares, constants = _finishing(sums_MT2C, gamma, count, per_member, counters)
    statistics = empty_statistics(G, x.shape[-1], x.device)
    mean, rstd, scale, shift = statistics
    tensors = (sums_MT2C, gamma, beta, mean, rstd, running_mean, running_var, shares, counters)
    numbers = (rows, n, eps, momentum, n / (n - 1) if unbiased else 1.0)
    z, packed = launch_batch_norm_apply(x, scale, shift, relu, residual, bits, (*tensors, *numbers), constants)
    return z, packed, statistics


@operation(
    definition=batch_norm_backward_ref,
    library=functools.partial(
        batch_norm_backward_ref, apply=functools.partial(compiled, batch_norm_input_gradient_ref)
    ),
)
def batch_norm_backward(
    du: Tensor,
    x: Tensor,
    sums_MT2C: Tensor,
    statistics: BatchStatistics,
    gamma: Tensor,
    *,
    count: int,
    per_member: bool = False,
    residual: Tensor | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dx, of du's type, and dγ and dβ, of gamma's shape.

    Args:
        du, x, residual: see `batch_norm_input_gradient`.
        sums_MT2C, statistics, gamma, count, per_member: see `batch_norm_coefficients`.
        counters: zeros, int32 of `num_counters(C, G)` or more, which this launch uses up; None for two launches.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    if counters is None or not FUSED:
        dgamma, dbeta, coefficients_G3C = batch_norm_coefficients(
            sums_MT2C, statistics, gamma, count=count, per_member=per_member
        )
        return batch_norm_input_gradient(du, x, coefficients_G3C, residual=residual), dgamma, dbeta
    check_coefficients(sums_MT2C, statistics, gamma, count, per_member)
    check_input_gradient(du, x, residual)
    (G, rows, n), shares, constants = _finishing(sums_MT2C, gamma, count, per_member, counters)
    dgamma_GC, dbeta_GC, coefficients_G3C = empty_coefficients(G, x.shape[-1], x.device)
    tensors = (sums_MT2C, statistics.mean, statistics.rstd, gamma, dgamma_GC, dbeta_GC, shares, counters)
    dx = launch_batch_norm_input_gradient(du, x, coefficients_G3C, residual, (*tensors, rows, n), constants)
    return dx, *of_gamma(dgamma_GC, dbeta_GC, gamma)

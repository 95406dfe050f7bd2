"""BatchNorm at WRN-28-4's shapes, E = 4 and B = 128 in bf16: `pytest bench/ops/bench_batch_norm.py --benchmark-only`.

The kernels beside the plain PyTorch of their references, eagerly and compiled, and beside them the library's whole
forward, F.batch_norm with ReLU. A call works through several sets of inputs, together four times the L2 cache.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bench.harness.kernel_timing import measure
from ensdistill.kernels.norm.apply import batch_norm_apply, batch_norm_apply_ref
from ensdistill.kernels.norm.channels import num_counters
from ensdistill.kernels.norm.fused import batch_norm_backward
from ensdistill.kernels.norm.gradient import (
    batch_norm_coefficients,
    batch_norm_coefficients_ref,
    batch_norm_input_gradient,
    batch_norm_input_gradient_ref,
)
from ensdistill.kernels.norm.statistics import BatchStatistics, batch_norm_statistics, batch_norm_statistics_ref

pytestmark = pytest.mark.gpu
E, B = 4, 128
LAYERS = [(32, 64), (16, 128), (8, 256)]
PROVIDERS = ["triton", "eager", "compiled"]
CACHE = 200e6


def inputs(size: int, C: int, tensors: int) -> list[list[torch.Tensor]]:
    """Sets of `tensors` activations, together larger than `CACHE`."""
    shape = (E, B, size, size, C)
    sets = max(1, round(CACHE / (2 * tensors * E * B * size * size * C)))
    device = torch.device("cuda")
    return [[torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(tensors)] for _ in range(sets)]


def vectors(C: int) -> list[torch.Tensor]:
    return [torch.rand(1, C, device="cuda") + 0.5 for _ in range(3)]


def partial_sums(size: int, C: int) -> torch.Tensor:
    """Random partial sums, as many as tiles of 128 pixels leave."""
    return torch.rand(E, B * size * size // 128, 2, C, device="cuda") * 100


def provided(provider, kernel, ref):
    """Choose the function that `provider` runs."""
    if provider == "triton":
        return kernel
    return ref if provider == "eager" else torch.compile(ref, dynamic=False)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("size", "C"), LAYERS)
def bench_statistics(benchmark, size, C, provider):
    sums, gamma, beta = partial_sums(size, C), torch.rand(C, device="cuda"), torch.rand(C, device="cuda")
    mean, var = torch.zeros(C, device="cuda"), torch.ones(C, device="cuda")
    run = provided(provider, batch_norm_statistics, batch_norm_statistics_ref)

    def call():
        return run(sums, gamma, beta, count=B * size * size, running_mean=mean, running_var=var)

    measure(benchmark, call, flops=2 * sums.numel(), bytes=4 * sums.numel())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("size", "C"), LAYERS)
def bench_coefficients(benchmark, size, C, provider):
    sums, (mean, rstd, gamma) = partial_sums(size, C), vectors(C)
    statistics = BatchStatistics(mean, rstd, mean, rstd)
    run = provided(provider, batch_norm_coefficients, batch_norm_coefficients_ref)

    def call():
        return run(sums, statistics, gamma[0], count=B * size * size)

    measure(benchmark, call, flops=2 * sums.numel(), bytes=4 * sums.numel())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("block_end", [False, True], ids=["relu", "residual-relu-bits"])
@pytest.mark.parametrize(("size", "C"), LAYERS)
def bench_apply(benchmark, size, C, block_end, provider):
    sets, (scale, shift, _) = inputs(size, C, 3 if block_end else 2), vectors(C)
    run = provided(provider, batch_norm_apply, batch_norm_apply_ref)

    def call():
        for x, *other in sets:
            run(x, scale, shift, residual=other[0] if block_end else None, bits=E if block_end else 0)

    values = len(sets) * sets[0][0].numel()
    measure(benchmark, call, flops=values * (4 if block_end else 3), bytes=values * (2 * len(sets[0]) + block_end / 8))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("size", "C"), LAYERS)
def bench_input_gradient(benchmark, size, C, residual, provider):
    sets = inputs(size, C, 4 if residual else 3)
    coefficients = torch.rand(1, 3, C, device="cuda")
    run = provided(provider, batch_norm_input_gradient, batch_norm_input_gradient_ref)

    def call():
        for du, x, *other in sets:
            run(du, x, coefficients, residual=other[0] if residual else None)

    values = len(sets) * sets[0][0].numel()
    measure(benchmark, call, flops=values * (5 if residual else 4), bytes=values * 2 * len(sets[0]))


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize(("size", "C"), LAYERS)
def bench_backward(benchmark, size, C, launches):
    """Times the backward from partial sums to dx, by one pass or two; zeroing counters is a launch more."""
    sets, sums, (mean, rstd, gamma) = inputs(size, C, 3), partial_sums(size, C), vectors(C)
    statistics = BatchStatistics(mean, rstd, mean, rstd)

    def call():
        counters = torch.zeros(len(sets), num_counters(C), dtype=torch.int32, device="cuda")
        for (du, x, _), own in zip(sets, counters, strict=True):
            own = own if launches == 1 else None
            batch_norm_backward(du, x, sums, statistics, gamma[0], count=B * size * size, counters=own)

    values = len(sets) * sets[0][0].numel()
    measure(benchmark, call, flops=4 * values, bytes=6 * values + len(sets) * 4 * sums.numel())


@pytest.mark.parametrize(("size", "C"), LAYERS)
def bench_library_forward(benchmark, size, C):
    """F.batch_norm and ReLU of all members at once. It reads x twice; the kernels find a convolution's sums."""
    sets, gamma, beta = inputs(size, C, 2), torch.rand(C, device="cuda"), torch.rand(C, device="cuda")

    def call():
        for x, _ in sets:
            F.batch_norm(x.flatten(0, 1).permute(0, 3, 1, 2), None, None, gamma, beta, training=True).relu_()

    values = len(sets) * sets[0][0].numel()
    measure(benchmark, call, flops=6 * values, bytes=4 * values)

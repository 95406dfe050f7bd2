"""Global pooling at WRN-28-4's shape: `pytest bench/ops/bench_pool.py --benchmark-only`.

E = 4, B = 128, 256 channels at 8x8 in bf16. The kernels beside the plain PyTorch of their references, eagerly and
compiled; the forward plain or with BatchNorm and ReLU before it, the gradient with BatchNorm's mask and sums (training)
or with packed bits (frozen networks).
"""

from __future__ import annotations

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.norm.pool import global_pool, global_pool_ref
from ensdistill.kernels.norm.pool_gradient import global_pool_gradient, global_pool_gradient_ref

pytestmark = pytest.mark.gpu
E, B, SIZE, C = 4, 128, 8, 256
VALUES = E * B * SIZE * SIZE * C
SETS = 8
"""Sets of inputs that a call works through: more than the L2 cache holds."""
PROVIDERS = ["triton", "eager", "compiled"]


def inputs() -> list[torch.Tensor]:
    return [torch.randn(E, B, SIZE, SIZE, C, dtype=torch.bfloat16, device="cuda") for _ in range(SETS)]


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(1, C, device="cuda") + 0.5, torch.randn(1, C, device="cuda")


def provided(provider, kernel, ref):
    """Choose the function that `provider` runs."""
    if provider == "triton":
        return kernel
    return ref if provider == "eager" else torch.compile(ref, dynamic=False)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "norm-relu"])
def bench_pool(benchmark, prologue, provider):
    sets, ab = inputs(), vectors()
    run = provided(provider, global_pool, global_pool_ref)

    def call():
        for x in sets:
            run(x, prologue=ab if prologue else None)

    measure(benchmark, call, flops=SETS * VALUES * (4 if prologue else 1), bytes=SETS * 2 * (VALUES + E * B * C))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mask", ["bits", "norm"])
def bench_gradient(benchmark, mask, provider):
    sets, ab = inputs(), vectors()
    df = torch.randn(E, B, C, dtype=torch.bfloat16, device="cuda")
    bits = torch.randint(0, 256, (SETS, E, B, SIZE, SIZE, C // 8), dtype=torch.uint8, device="cuda")
    run = provided(provider, global_pool_gradient, global_pool_gradient_ref)

    def call():
        for i, x in enumerate(sets):
            options = {"norm": (x, *ab)} if mask == "norm" else {"bits": bits[i]}
            run(df, size=(SIZE, SIZE), dtype=torch.bfloat16, **options)

    moved = SETS * VALUES * (4 if mask == "norm" else 2 + 1 / 8)
    measure(benchmark, call, flops=SETS * VALUES * (7 if mask == "norm" else 2), bytes=moved)

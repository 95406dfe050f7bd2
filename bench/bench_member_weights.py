"""Members' weights and their gradient at WRN-28-4's layers, E = 4: `pytest bench/bench_member_weights.py`.

Triton's kernels, the reference as it stands, and compiled. Layers are megabytes and are read from the L2 cache, as in
a training step: a share of the floor, which counts memory's bandwidth, may be above 1.
"""

from __future__ import annotations

import functools

import pytest
import torch
from kernel_timing import measure

from ensdistill.kernels.member_weights import (
    member_weights,
    member_weights_gradient,
    member_weights_gradient_ref,
    member_weights_ref,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
E = 4
LAYERS = [(16, 3, 3), (64, 64, 3), (128, 64, 1), (128, 128, 3), (256, 256, 3), (100, 256, 1)]  # CO, CI, k
PROVIDERS = pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])


def operands(CO, CI, k):
    weight = torch.randn(CO, CI, k, k, device="cuda").contiguous(memory_format=torch.channels_last)
    return weight, torch.randn(E, CI, device="cuda"), torch.randn(E, CO, device="cuda")


@PROVIDERS
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_member_weights(benchmark, layer, provider):
    given = operands(*layer)
    fn = {"triton": member_weights, "eager": member_weights_ref, "compiled": torch.compile(member_weights_ref)}[
        provider
    ]
    n = given[0].numel()
    measure(benchmark, functools.partial(fn, *given, dtype=torch.bfloat16), flops=2 * E * n, bytes=(4 + 2 * E) * n)


@PROVIDERS
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_member_weights_gradient(benchmark, layer, provider):
    weight, r, s = operands(*layer)
    dw = torch.randn(E, *weight.permute(2, 3, 1, 0).shape, device="cuda")
    reference = member_weights_gradient_ref
    fn = {"triton": member_weights_gradient, "eager": reference, "compiled": torch.compile(reference)}[provider]
    n = weight.numel()
    measure(benchmark, functools.partial(fn, dw, weight, r, s), flops=8 * E * n, bytes=(4 * E + 8) * n)

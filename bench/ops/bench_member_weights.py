"""Members' weights and gradients of all of WRN-28-4's layers, E = 4: `pytest bench/ops/bench_member_weights.py`.

Our kernels, for all layers in one launch and two, beside the definitions, layer by layer, as they stand and compiled.
The splits are those of a step with B = 128.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.weights.gradient import (
    GradientParts,
    member_weights_gradient,
    member_weights_gradient_by_layers,
    member_weights_gradient_ref,
)
from ensdistill.kernels.weights.layout import Layer
from ensdistill.kernels.weights.member_weights import (
    WeightSlots,
    member_weights,
    member_weights_by_layers,
    member_weights_ref,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
E = 4
# how many, (CO, CI, k), splits
LAYERS = [(1, (16, 3, 3), 128), (8, (64, 64, 3), 33), (8, (128, 128, 3), 8), (8, (256, 256, 3), 2)]
PROVIDERS = pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])


def network() -> tuple[list[Layer], list[int]]:
    """Make the layers and their splits."""
    layers, splits = [], []
    for count, (CO, CI, k), S in LAYERS:
        for _ in range(count):
            weight = torch.randn(CO, CI, k, k, device="cuda").contiguous(memory_format=torch.channels_last)
            layers.append(Layer(weight, torch.randn(E, CI, device="cuda"), torch.randn(E, CO, device="cuda")))
            splits.append(S)
    return layers, splits


def function(provider, kernel, by_layers, definition):
    """Choose the function that `provider` runs."""
    if provider == "triton":
        return functools.partial(kernel, tables={})
    return functools.partial(by_layers, definition=definition if provider == "eager" else torch.compile(definition))


@PROVIDERS
def bench_member_weights(benchmark, provider):
    layers, _ = network()
    out, n = WeightSlots(layers, E, dtype=torch.bfloat16), sum(layer.weight.numel() for layer in layers)
    fn = function(provider, member_weights, member_weights_by_layers, member_weights_ref)
    measure(benchmark, functools.partial(fn, out, [layers], E=E), flops=2 * E * n, bytes=(4 + 2 * E) * n)


@PROVIDERS
def bench_member_weights_gradient(benchmark, provider):
    layers, splits = network()
    parts = GradientParts(layers, E, splits, dtype=torch.float32)
    parts.flat.normal_()
    fn = function(
        provider,
        member_weights_gradient,
        member_weights_gradient_by_layers,
        member_weights_gradient_ref,
    )
    sizes = [layer.weight.numel() for layer in layers]
    flops = sum((8 + S) * E * n for S, n in zip(splits, sizes, strict=True))
    measure(
        benchmark, functools.partial(fn, parts, [layers], E=E), flops=flops, bytes=parts.flat.nbytes + 8 * sum(sizes)
    )

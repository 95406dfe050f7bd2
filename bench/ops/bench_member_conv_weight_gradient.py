"""Weight gradient at WRN-28-4's shapes, E = 4, B = 128, bf16: `pytest bench/ops/bench_member_conv_weight_gradient.py`.

Triton's kernel with its default tile and with every other candidate, cuDNN a member, and the same compiled by
torch.compile; x and dy together are larger than the L2 cache except at 256 channels.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.conv.weight_gradient.operation import (
    member_conv_weight_gradient,
    member_conv_weight_gradient_ref,
    weight_gradient_tiles,
)
from ensdistill.kernels.conv.weight_gradient.tiles import rows_width

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
E, B = 4, 128
LAYERS = [  # H, CI, CO, kernel, stride, shared x
    (32, 3, 16, 3, 1, True),
    (32, 16, 64, 3, 1, False),
    (32, 64, 64, 3, 1, False),
    (32, 64, 128, 3, 2, False),
    (32, 64, 128, 1, 2, False),
    (16, 128, 128, 3, 1, False),
    (16, 128, 256, 3, 2, False),
    (8, 256, 256, 3, 1, False),
    (1, 256, 100, 1, 1, False),
]


def problem(layer):
    """(x, dy, keyword arguments, FLOPs, bytes) of a layer."""
    H, CI, CO, kernel, stride, shared = layer
    OH = (H + 2 * (kernel // 2) - kernel) // stride + 1
    x = torch.randn((B, H, H, CI) if shared else (E, B, H, H, CI), device="cuda").bfloat16()
    dy = torch.randn(E, B, OH, OH, CO, device="cuda").bfloat16()
    flops = 2 * dy.numel() * kernel**2 * CI
    moved = 2 * (x.numel() + dy.numel()) + 4 * E * kernel**2 * CI * CO
    return x, dy, {"kernel": kernel, "stride": stride}, flops, moved


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("provider", ["triton", "library", "compiled"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_member_conv_weight_gradient(benchmark, layer, provider, prologue):
    x, dy, options, flops, moved = problem(layer)
    if prologue:
        options["prologue"] = tuple(torch.randn(1, x.shape[-1], device="cuda") for _ in range(2))
    fn = member_conv_weight_gradient if provider == "triton" else member_conv_weight_gradient_ref
    if provider == "compiled":
        fn = torch.compile(fn)
    measure(benchmark, functools.partial(fn, x, dy, **options), flops=flops, bytes=moved)


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("provider", ["tiles"])
def bench_tiles(benchmark, provider, layer, index):
    """Every candidate, in the order of the guess that chooses the default."""
    x, dy, options, flops, moved = problem(layer)
    H, CI, CO, kernel, stride, shared = layer
    groups, columns = (1, E * CO) if shared else (E, CO)
    width = 0 if shared else rows_width(x.device, kernel, stride, H)
    pixels = dy.shape[1:4].numel()
    tiles = weight_gradient_tiles(groups, pixels, kernel**2 * CI, columns, x.dtype, width=width)
    if index >= len(tiles):
        pytest.skip("fewer candidates")
    benchmark.extra_info["tile"] = str(tuple(tiles[index]))
    fn = functools.partial(member_conv_weight_gradient, x, dy, tile=tiles[index], **options)
    measure(benchmark, fn, flops=flops, bytes=moved)

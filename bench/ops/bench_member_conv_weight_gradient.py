"""Weight gradient at WRN-28-4's shapes and ResNet-50's stem: `pytest bench/ops/bench_member_conv_weight_gradient.py`.

E = 4, B = 128, bf16.
Triton's kernel with its default tile and with every other candidate, cuDNN a member, and the same compiled by
torch.compile; x and dy together are larger than the L2 cache except at 256 channels.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.conv.weight_gradient import member_conv_weight_gradient
from ensdistill.kernels.conv.weight_gradient_tiles import rows_width, weight_gradient_tiles

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
    (224, 3, 64, 7, 2, True),
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


def plain_weight_gradient(x, dy, *, kernel, stride, prologue=None):
    """The weight gradient in plain PyTorch, for torch.compile to take whole."""
    if prologue is not None:
        x = (prologue[0] * x.float() + prologue[1]).relu().to(x.dtype)
    w_OIKK = x.new_empty((dy.shape[-1], x.shape[-1], kernel, kernel))  # only its shape is read
    options = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1, [False, True, False])
    members = [
        torch.ops.aten.convolution_backward(dy_BCHW, x_BCHW, w_OIKK, None, *options)[1]
        for x_BCHW, dy_BCHW in zip(
            x.expand(E, *x.shape[-4:]).permute(0, 1, 4, 2, 3), dy.permute(0, 1, 4, 2, 3), strict=True
        )
    ]
    return torch.stack(members).permute(0, 3, 4, 2, 1).float().contiguous()


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("provider", ["triton", "library", "compiled"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_member_conv_weight_gradient(benchmark, layer, provider, prologue):
    x, dy, options, flops, moved = problem(layer)
    if prologue:
        options["prologue"] = tuple(torch.randn(1, x.shape[-1], device="cuda") for _ in range(2))
    fn = {
        "triton": member_conv_weight_gradient,
        "library": member_conv_weight_gradient.library,
        "compiled": torch.compile(plain_weight_gradient),
    }[provider]
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

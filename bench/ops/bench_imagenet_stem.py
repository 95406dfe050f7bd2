"""ResNet-50's first layers at 224 pixels: `pytest bench/ops/bench_imagenet_stem.py --benchmark-only`.

E = 4, B = 128, bf16: the 7×7 convolution of the images, its gradient for two members by parities of pixels and by
patches of them, and the 3×3 max-pool with its gradient, behind a norm as in training or plain as in frozen networks.
The convolution's weight gradient is in `bench_member_conv_weight_gradient.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness.kernel_timing import measure
from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.norm.max_pool import max_pool, max_pool_ref
from ensdistill.kernels.norm.max_pool_gradient import max_pool_gradient, max_pool_gradient_ref

pytestmark = pytest.mark.gpu
E, B, SIZE, C = 4, 128, 224, 64
PROVIDERS = ["triton", "eager", "compiled"]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def vectors() -> tuple[Tensor, Tensor]:
    return random(1, C, dtype=torch.float32), random(1, C, dtype=torch.float32)


@pytest.mark.parametrize("provider", ["triton", "library", "grouped"])
@pytest.mark.parametrize("use", ["teacher", "student"])
def bench_forward(benchmark, use, provider):
    x, w = random(B, SIZE, SIZE, 3), random(E, 7, 7, 3, C) * 0.1
    options: dict[str, Any] = {"bias": random(E, C, dtype=torch.float32), "relu": True, "bits": 2}
    if use == "student":
        options = {"sums": True}
    fn: Any = {
        "triton": member_conv,
        "library": member_conv.library,
        "grouped": functools.partial(member_conv.library, grouped=True),
    }[provider]
    outputs = E * B * (SIZE // 2) ** 2 * C
    moved = 2 * (x.numel() + w.numel() + outputs)
    run = functools.partial(fn, x, w, stride=2, **options)
    measure(benchmark, run, flops=2 * 147 * outputs, bytes=moved)


@pytest.mark.parametrize("provider", ["parities", "patches", "library", "grouped"])
def bench_image_gradient(benchmark, provider):
    M = 2
    dy, w = random(M, B, SIZE // 2, SIZE // 2, C), random(E, 7, 7, 3, C) * 0.1
    members = torch.arange(M, device="cuda")
    shape = (1, B, SIZE, SIZE, 3, C, 7, 2, dy.dtype)
    found = tiles.input_gradient_tiles(*shape, forms=(tiles.POINTERS,), patches=provider == "patches")
    library = functools.partial(member_conv_input_gradient.library, grouped=provider == "grouped")
    ours = functools.partial(member_conv_input_gradient, tile=found[0])
    run = functools.partial(
        library if provider in ("library", "grouped") else ours,
        *(dy, w),
        size=(SIZE, SIZE),
        stride=2,
        members=members,
        shared=True,
        out_dtype=torch.float32,
    )
    measure(benchmark, run, flops=2 * 147 * dy.numel(), bytes=2 * dy.numel() + 4 * B * SIZE * SIZE * 3)


def provided(provider: str, kernel: Any, ref: Any) -> Any:
    """Choose the function that `provider` runs."""
    if provider == "triton":
        return kernel
    return ref if provider == "eager" else torch.compile(ref, dynamic=False)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("use", ["teacher", "student"])
def bench_max_pool(benchmark, use, provider):
    x = random(E, B, SIZE // 2, SIZE // 2, C)
    options: dict[str, Any] = {"positions": 2} if use == "teacher" else {"positions": E, "prologue": vectors()}
    run = functools.partial(provided(provider, max_pool, max_pool_ref), x, **options)
    outputs = x.numel() // 4
    moved = 2 * (x.numel() + outputs) + outputs * options["positions"] // E
    measure(benchmark, run, flops=outputs * (9 if use == "teacher" else 36), bytes=moved)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("use", ["teacher", "student"])
def bench_max_pool_gradient(benchmark, use, provider):
    M = 2 if use == "teacher" else E
    x = random(M, B, SIZE // 2, SIZE // 2, C)
    _, positions = max_pool(x, positions=M)
    assert positions is not None
    dy = random(*positions.shape)
    bits = torch.randint(0, 256, (*x.shape[:-1], C // 8), dtype=torch.uint8, device="cuda")
    options: dict[str, Any] = {"bits": bits} if use == "teacher" else {"norm": (x, *vectors())}
    fn = provided(provider, max_pool_gradient, max_pool_gradient_ref)
    run = functools.partial(fn, dy, positions, size=(SIZE // 2, SIZE // 2), **options)
    read = bits.numel() if use == "teacher" else 2 * x.numel()
    moved = 3 * dy.numel() + 2 * x.numel() + read
    measure(benchmark, run, flops=x.numel() * (2 if use == "teacher" else 7), bytes=moved)

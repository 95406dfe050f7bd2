"""Member-batched convolutions of WRN-28-4 (E 4, B 128), bf16: `pytest bench/ops/bench_member_conv.py --benchmark-only`.

Each shape and use is timed as the kernel (`triton`: its default tile), as the library's convolution a member with the
compiled epilogue (`library`), and as the whole reference compiled (`compiled`). The floor counts each tensor once. What
a call reads is the same every time: it comes from L2 where it fits (256 channels), as a layer's input does in the step.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness.kernel_timing import measure
from ensdistill.kernels.conv.forward import member_conv, member_conv_ref
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient, member_conv_input_gradient_ref
from ensdistill.kernels.epilogue import conv_epilogue_ref, input_gradient_epilogue_ref, pack_bits_ref

pytestmark = pytest.mark.gpu
E, B = 4, 128
SHAPES = [  # CI, CO, size of the input, stride
    (16, 64, 32, 1),
    (64, 64, 32, 1),
    (64, 128, 32, 2),
    (128, 128, 16, 1),
    (128, 256, 16, 2),
    (256, 256, 8, 1),
]
PROVIDERS = ["triton", "library", "compiled"]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def vectors(C: int) -> tuple[Tensor, Tensor]:
    return random(E, C, dtype=torch.float32), random(E, C, dtype=torch.float32)


def library_forward(x: Tensor, w: Tensor, epilogue: Any, stride: int, members: Tensor, **options: Any) -> Any:
    """cuDNN a member, then the compiled epilogue."""
    v = member_conv_ref(x, w, stride=stride, members=members).y
    return epilogue(v, members=members, **options)


def library_input_gradient(
    dy: Tensor, w: Tensor, epilogue: Any, size: tuple[int, int], stride: int, members: Tensor, **options: Any
) -> Any:
    """cuDNN a member, then the compiled epilogue."""
    v, _ = member_conv_input_gradient_ref(dy, w, size=size, stride=stride, members=members)
    return epilogue(v, members=members, **options)


def bytes_of(*trees: Any) -> int:
    """Bytes of the tensors in nested tuples and dictionaries, each once."""
    total = 0
    for tree in trees:
        if isinstance(tree, Tensor):
            total += tree.numel() * tree.element_size()
        elif isinstance(tree, dict):
            total += bytes_of(*tree.values())
        elif isinstance(tree, tuple):
            total += bytes_of(*tree)
    return total


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("use", ["plain", "teacher", "student"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward(benchmark, shape, use, provider):
    CI, CO, size, stride = shape
    out = size // stride
    x, w, members = random(E, B, size, size, CI), random(E, 3, 3, CI, CO) * 0.05, torch.arange(E, device="cuda")
    uses: dict[str, dict[str, Any]] = {
        "plain": {},
        # the second conv of a frozen block: its shortcut, the next block's normalised input, bits for members a and b
        "teacher": {
            "bias": vectors(CO)[0],
            "residual": random(E, B, out, out, CO),
            "second": vectors(CO),
            "bits": 2,
        },
        # a conv of the student in training: what it gives is normalised by sums over the batch
        "student": {"residual": random(E, B, out, out, CO), "sums": True},
    }
    options = uses[use]
    run = {
        "triton": functools.partial(member_conv, x, w, stride=stride, members=members, **options),
        "library": functools.partial(
            library_forward, x, w, torch.compile(conv_epilogue_ref), stride, members, **options
        ),
        "compiled": functools.partial(torch.compile(member_conv_ref), x, w, stride=stride, members=members, **options),
    }[provider]
    flops = 2 * E * B * out * out * 9 * CI * CO
    measure(benchmark, run, flops=flops, bytes=bytes_of(x, w, options, tuple(run())))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("use", ["plain", "teacher", "student"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def bench_input_gradient(benchmark, shape, use, provider):
    CI, CO, size, stride = shape
    out = size // stride
    dy, w, members = random(E, B, out, out, CO), random(E, 3, 3, CI, CO) * 0.05, torch.arange(E, device="cuda")
    x = random(E, B, size, size, CI)
    uses: dict[str, dict[str, Any]] = {
        "plain": {},
        "teacher": {"bits": pack_bits_ref(x), "scale": vectors(CI)[0], "after": random(E, B, size, size, CI)},
        "student": {"norm": (x, *vectors(CI))},
    }
    options = uses[use]
    run = {
        "triton": functools.partial(
            member_conv_input_gradient, dy, w, size=(size, size), stride=stride, members=members, **options
        ),
        "library": functools.partial(
            library_input_gradient,
            dy,
            w,
            torch.compile(input_gradient_epilogue_ref),
            (size, size),
            stride,
            members,
            **options,
        ),
        "compiled": functools.partial(
            torch.compile(member_conv_input_gradient_ref),
            dy,
            w,
            size=(size, size),
            stride=stride,
            members=members,
            **options,
        ),
    }[provider]
    flops = 2 * E * B * out * out * 9 * CI * CO
    measure(benchmark, run, flops=flops, bytes=bytes_of(dy, w, options, tuple(run())))

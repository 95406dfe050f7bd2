"""The perturbation's step, with x' normalised in bf16: `pytest bench/ops/bench_perturb.py --benchmark-only`.

The kernel, and the plain definition eager and compiled, on batches of CIFAR's and ImageNet's size in NHWC memory.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.images.augment import normalise_ref
from ensdistill.kernels.images.perturb import perturb, perturb_ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = torch.device("cuda")
SHAPES = [(128, 32, 32, 3), (256, 224, 224, 3)]


def perturb_and_normalise(x_BHWC, g_BHWC, mean_C, std_C):
    y_BHWC = perturb_ref(x_BHWC, g_BHWC)
    return y_BHWC, normalise_ref(y_BHWC, mean_C, std_C, torch.bfloat16)


@pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_perturb(benchmark, shape, provider):
    x_BHWC, g_BHWC = torch.rand(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    mean_C, std_C = torch.rand(3, device=DEVICE), torch.rand(3, device=DEVICE) + 1
    if provider == "triton":

        def fn():
            return perturb(x_BHWC, g_BHWC, normalise=(mean_C, std_C))

    else:
        reference = torch.compile(perturb_and_normalise) if provider == "compiled" else perturb_and_normalise

        def fn():
            return reference(x_BHWC, g_BHWC, mean_C, std_C)

    measure(benchmark, fn, flops=10 * x_BHWC.numel(), bytes=(4 + 4 + 4 + 2) * x_BHWC.numel())

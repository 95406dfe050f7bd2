"""Augmentation, uint8 -> [0, 1] and normalised bf16: `pytest bench/ops/bench_augment.py --benchmark-only`.

The kernel, and the plain definition eager and compiled, on batches of CIFAR's and ImageNet's size. Seed and step are
read on the device, as in the captured step.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.images.augment import augment, augment_ref, normalise_ref
from ensdistill.kernels.philox import counter_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = torch.device("cuda")
SHAPES = [(128, 32, 32, 3), (256, 224, 224, 3)]


def augment_and_normalise(x_BHWC, counter, mean_C, std_C):
    y_BHWC = augment_ref(x_BHWC, counter)
    return y_BHWC, normalise_ref(y_BHWC, mean_C, std_C, torch.bfloat16)


@pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_augment(benchmark, shape, provider):
    x_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    counter, mean_C, std_C = counter_of(1, 2, 3, DEVICE), torch.rand(3, device=DEVICE), torch.rand(3, device=DEVICE) + 1
    if provider == "triton":

        def fn():
            return augment(x_BHWC, counter, normalise=(mean_C, std_C))

    else:
        reference = torch.compile(augment_and_normalise) if provider == "compiled" else augment_and_normalise

        def fn():
            return reference(x_BHWC, counter, mean_C, std_C)

    measure(benchmark, fn, flops=2 * x_BHWC.numel(), bytes=(1 + 4 + 2) * x_BHWC.numel())

"""Gaussian noise, with x' normalised in bf16: `pytest bench/ops/bench_noise.py --benchmark-only`.

The kernel, and the plain definition eager and compiled, on batches of CIFAR's and ImageNet's size in NHWC memory. Seed,
step and row are read on the device, as in the captured step.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.images.augment import normalise_ref
from ensdistill.kernels.images.noise import add_noise, add_noise_ref
from ensdistill.kernels.philox import counter_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = torch.device("cuda")
SHAPES = [(128, 32, 32, 3), (256, 224, 224, 3)]


def add_noise_and_normalise(x_BCHW, counter, mean_C, std_C):
    y_BCHW = add_noise_ref(x_BCHW, counter)
    return y_BCHW, normalise_ref(y_BCHW.permute(0, 2, 3, 1), mean_C, std_C, torch.bfloat16)


@pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_noise(benchmark, shape, provider):
    x_BCHW = torch.rand(shape, device=DEVICE).permute(0, 3, 1, 2)
    counter, mean_C, std_C = counter_of(1, 2, 3, DEVICE), torch.rand(3, device=DEVICE), torch.rand(3, device=DEVICE) + 1
    if provider == "triton":

        def fn():
            return add_noise(x_BCHW, counter, normalise=(mean_C, std_C))

    else:
        reference = torch.compile(add_noise_and_normalise) if provider == "compiled" else add_noise_and_normalise

        def fn():
            return reference(x_BCHW, counter, mean_C, std_C)

    torch.testing.assert_close(fn()[0], add_noise_ref(x_BCHW, counter), rtol=0, atol=1.2e-7)
    measure(benchmark, fn, flops=60 * x_BCHW.numel(), bytes=(4 + 4 + 2) * x_BCHW.numel())

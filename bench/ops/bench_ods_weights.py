"""The weights of ODS: `pytest bench/ops/bench_ods_weights.py --benchmark-only`.

The kernel, and the plain definition eager and compiled, at CIFAR-100's and ImageNet's number of classes.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.images.ods_weights import ods_weights, ods_weights_ref
from ensdistill.kernels.philox import counter_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])
@pytest.mark.parametrize(("B", "K"), [(128, 100), (256, 1000)])
def bench_ods_weights(benchmark, B, K, provider):
    counter = counter_of(1, 2, 3, DEVICE)
    if provider == "triton":

        def fn():
            return ods_weights(counter, B, K)

    else:
        reference = torch.compile(ods_weights_ref) if provider == "compiled" else ods_weights_ref

        def fn():
            return reference(counter, B, K)

    assert torch.equal(fn(), ods_weights_ref(counter, B, K))
    measure(benchmark, fn, flops=20 * B * K, bytes=4 * B * K)

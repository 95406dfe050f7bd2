"""The distillation loss with its gradient, and the divergence's seeds: `pytest bench/ops/bench_distil.py`.

The kernels, and the plain definitions eager and compiled, on bf16 logits of E = 4 members: CIFAR-100's classes,
ImageNet's and those of its 21,841-class version.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness.kernel_timing import measure
from ensdistill.kernels.loss.distil import distil, distil_output_ref
from ensdistill.kernels.loss.seeds import divergence_seeds, divergence_seeds_ref

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = torch.device("cuda")
E, TAU, ALPHA = 4, 4.0, 0.9
SHAPES = [(128, 100), (256, 1000), (128, 21_841)]


def divergence(a_BK, b_BK):
    return divergence_seeds_ref(a_BK, b_BK).to(a_BK.dtype)


@pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])
@pytest.mark.parametrize(("B", "K"), SHAPES)
def bench_distil(benchmark, B, K, provider):
    s_EBK = torch.randn(E, B, K, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    t_EBK, labels_B = torch.randn_like(s_EBK, requires_grad=False), torch.randint(0, K, (B,), device=DEVICE)
    reference = torch.compile(distil_output_ref) if provider == "compiled" else distil_output_ref

    def fn():
        if provider == "triton":
            return distil(s_EBK, t_EBK, labels_B, TAU, ALPHA)  # with the gradient
        out = reference(s_EBK, t_EBK, labels_B, TAU, ALPHA)
        return out, *torch.autograd.grad(out.loss, s_EBK)

    measure(benchmark, fn, flops=30 * s_EBK.numel(), bytes=3 * 2 * s_EBK.numel())


@pytest.mark.parametrize("provider", ["triton", "eager", "compiled"])
@pytest.mark.parametrize(("B", "K"), SHAPES)
def bench_divergence_seeds(benchmark, B, K, provider):
    a_BK, b_BK = (torch.randn(B, K, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    reference = torch.compile(divergence) if provider == "compiled" else divergence

    def fn():
        return divergence_seeds(a_BK, b_BK, dtype=a_BK.dtype) if provider == "triton" else reference(a_BK, b_BK)

    measure(benchmark, fn, flops=10 * a_BK.numel(), bytes=3 * 2 * a_BK.numel())

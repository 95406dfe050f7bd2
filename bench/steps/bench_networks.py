"""Passes over whole networks, by who computes them: `pytest bench/steps/bench_networks.py --benchmark-only`.

    teachers        E forwards, no gradient
    perturbation    teachers a and b and members a and b forward, a's back to the images: 6 F
    student         all members forward and back to the parameters

`modules` are PyTorch's, channels_last and under autocast; `compiled` the same by torch.compile in max-autotune mode
(minutes a case); `library`, `triton` and `auto` the backends of a run. All of them are
timed as CUDA graphs, but those that cannot be captured (`captured` in extra_info). `roofline` there is the floor of
ensdistill.roofline divided by the median.

`NETWORK`, `BATCH` and `SIZE` in the environment choose the problem: by default wrn28x4, 128, 32 in bf16 on a GPU, and
wrn10x1, 4, 16 in fp32 on a CPU, where modules and library run. E = 4, K = 100. `PROVIDERS` chooses among the five.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness.calibrated import calibrated, random_images
from bench.harness.compiled_networks import compiled, divergence_gradient, loop_forward
from bench.harness.context import forward_cost
from bench.harness.kernel_timing import measure
from ensdistill.costs.floor import Work, whole
from ensdistill.costs.network import NetworkCost
from ensdistill.engine.networks import Networks, make_networks
from ensdistill.engine.operations import Backend
from ensdistill.models.students import Student
from ensdistill.runtime.devices import Device, find_device, installed_gpu
from ensdistill.runtime.environment import Precision, autocast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
NETWORK = os.environ.get("NETWORK", "wrn28x4" if ON_GPU else "wrn10x1")
B, SIZE = int(os.environ.get("BATCH", 128 if ON_GPU else 4)), int(os.environ.get("SIZE", 32 if ON_GPU else 16))
E, K, METHOD = 4, 100, "latentbe+tdiv-sdiv"
PRECISION: Precision = "bf16" if ON_GPU else "fp32"
PAIR = (0, E - 1)
ON_GPU_ALONE = ("compiled", "triton", "auto")
PROVIDERS = [
    pytest.param(name, marks=[pytest.mark.gpu] if name in ON_GPU_ALONE else [])
    for name in ("modules", "compiled", "library", "triton", "auto")
]


@functools.cache
def cost() -> NetworkCost:
    return forward_cost(NETWORK, SIZE, K)


@functools.cache
def device_rates() -> Device | None:
    """Give the GPU's rates, if they are known; a CPU's are measured."""
    return installed_gpu() if ON_GPU else find_device("cpu")


def images() -> Tensor:
    return random_images(B, SIZE, DEVICE)


def networks_of(provider: Any) -> Networks:
    backend: Backend = "reference" if provider in ("modules", "compiled") else provider
    teachers, student = calibrated(NETWORK, METHOD, E=E, K=K, size=SIZE, device=DEVICE)
    networks = make_networks(backend, teachers, student, PRECISION, DEVICE)
    assert not networks.notes, networks.notes
    return networks


def timed(benchmark: Any, run: Callable[[], object], work: Work) -> None:
    """Time `run`, which does `work`, and relate it to the floor."""
    rates = device_rates()
    element_bytes = 2 if PRECISION == "bf16" else 4
    info = measure(benchmark, run, flops=work.flops(B), bytes=work.bytes(B, element_bytes))
    info["problem"] = f"{NETWORK}, B {B}, {SIZE} px, {PRECISION}"
    if rates is not None and benchmark.stats is not None:
        floor = work.floor(B, rates)
        info["floor microseconds"] = round(1e6 * floor, 2)
        info["roofline"] = round(floor / benchmark.stats.stats.median, 3)


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_teachers(benchmark, provider):
    networks, x_BCHW = networks_of(provider), images()
    assert networks.teachers is not None
    forward = compiled(loop_forward(networks.teachers)) if provider == "compiled" else networks.teacher_logits
    timed(benchmark, functools.partial(forward, x_BCHW), whole(cost(), forward=E))


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_perturbation(benchmark, provider):
    networks, x_BCHW = networks_of(provider), images()
    assert networks.teachers is not None
    gradient = functools.partial(networks.divergence_gradient, pair=PAIR, with_student=True)
    if provider == "compiled":
        gradient = compiled(divergence_gradient(networks.teachers, networks.student, PAIR, PRECISION))
    timed(benchmark, functools.partial(gradient, x_BCHW), whole(cost(), forward=4, input_backward=2))


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_student(benchmark, provider):
    networks, x_BCHW = networks_of(provider), images()
    logits = compiled_student(networks.student) if provider == "compiled" else networks.student_logits
    parameters = list(networks.student.parameters())
    seeds_MBK = torch.randn(E, B, K, device=DEVICE)

    def run() -> object:
        logits_MBK = logits(x_BCHW)
        return torch.autograd.grad(logits_MBK, parameters, seeds_MBK.to(logits_MBK.dtype))

    timed(benchmark, run, whole(cost(), forward=E, backward=E))


def compiled_student(student: Student) -> Callable[[Tensor], Tensor]:
    student.train()

    def forward(x_BCHW: Tensor) -> Tensor:
        with autocast(x_BCHW.device, PRECISION):
            return student(x_BCHW)

    return compiled(forward)

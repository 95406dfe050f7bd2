"""The training step of every method, by everyone who can compute it: `pytest bench/steps/bench_step.py`.

Who: bench/rivals. Each is checked against the fp32 definition over two steps before it is timed. One round is STEPS
steps of B images of random pixels, E = 4 members, queued one behind the other as in training; what is reported is
seconds a step. Those that a CPU has no use for run on a GPU alone. For two of them side by side in turns:
`python -m bench --parts step`.

`NETWORK`, `SIZE` and `BATCH` in the environment choose another problem (default wrn16x2, 32, 32: about a second a step
on two CPU cores); `PROVIDERS=pruned,auto` some of the providers.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from bench.harness.calibrated import calibrated
from bench.harness.context import floor_seconds
from bench.rivals import PROVIDERS, Problem, agreement, bounds
from ensdistill.config.methods import Method
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.timing import clock
from ensdistill.training.step import StepConfig

NETWORK = os.environ.get("NETWORK", "wrn16x2")
SIZE, B = int(os.environ.get("SIZE", 32)), int(os.environ.get("BATCH", 32))
E, K = 4, 100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 10 if DEVICE.type == "cuda" else 1
CASES = [
    pytest.param(name, precision, marks=[pytest.mark.gpu] if provider.needs_gpu else [])
    for name, provider in PROVIDERS.items()
    for precision in provider.precisions
]


def make_problem(method: str, precision: Precision) -> Problem:
    teachers, student = calibrated(NETWORK, method, E=E, K=K, size=SIZE, device=DEVICE)
    config = StepConfig(method=Method.parse(method), seed=0)
    needed = teachers if config.method.needs_teachers else None
    return Problem(teachers=needed, student=student, config=config, precision=precision)


def make_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images_BHWC = torch.randint(0, 256, (B, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
    return images_BHWC.to(DEVICE), torch.randint(0, K, (B,), generator=generator).to(DEVICE)


@pytest.mark.benchmark(timer=partial(clock, DEVICE))
@pytest.mark.parametrize("method", ["ce", "kd", "latentbe", "latentbe+tdiv-sdiv"])
@pytest.mark.parametrize(("provider", "precision"), CASES)
def bench_step(benchmark, provider, method, precision):
    problem = make_problem(method, precision)
    run, reference = PROVIDERS[provider].make(problem), PROVIDERS["pruned"].make(make_problem(method, "fp32"))
    difference = agreement(run, reference, [make_batch(1), make_batch(2)])
    assert difference.within(bounds(problem)), difference
    del reference
    batch = make_batch(3)
    losses = []

    def step():
        losses.append(run(*batch)["loss"])

    benchmark.group = f"{method} {NETWORK} {SIZE} px B {B}"
    benchmark.pedantic(step, warmup_rounds=2, rounds=7, iterations=STEPS)
    assert 0 < losses[-1].item() < 1e3
    info = benchmark.extra_info
    info["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    info["problem"], info["precision"] = f"{method}, {NETWORK}, B {B}, {SIZE} px", precision
    floor = floor_seconds(NETWORK, Method.parse(method), E=E, B=B, size=SIZE, K=K)
    if floor is not None and benchmark.stats is not None:
        info["floor microseconds"] = round(1e6 * floor, 2)
        info["roofline"] = round(floor / benchmark.stats.stats.median, 3)

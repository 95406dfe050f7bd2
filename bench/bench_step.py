"""The training step of every method, by every backend, in fp32 and bf16: `pytest bench/bench_step.py --benchmark-only`.

One step of B images of random pixels, E = 4 members, on the GPU where there is one; `triton` and `auto` run there
alone. `NETWORK`, `SIZE` and `BATCH` in the environment choose another problem (default wrn16x2, 32, 32: at most 0.7 s a
step on two CPU cores).
"""

from __future__ import annotations

import os

import pytest
import torch

from ensdistill.methods import Method
from ensdistill.models import Classifier, build
from ensdistill.networks import make_networks
from ensdistill.step import State, StepConfig, make_optimizer, train_step
from ensdistill.students import build_student
from ensdistill.teachers import Teachers

NETWORK = os.environ.get("NETWORK", "wrn16x2")
SIZE, B = int(os.environ.get("SIZE", 32)), int(os.environ.get("BATCH", 32))
E, K, MEAN, STD = 4, 100, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [
    "reference",
    "library",
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("auto", marks=pytest.mark.gpu),
]


def make_classifier(seed: int) -> Classifier:
    return Classifier(build(NETWORK, num_classes=K, image_size=SIZE, seed=seed), MEAN, STD)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["ce", "kd", "latentbe", "latentbe+tdiv-sdiv"])
@pytest.mark.parametrize("backend", BACKENDS)
def bench_step(benchmark, backend, method, precision):
    student = build_student(Method.parse(method), make_classifier, E=E, seed=0).to(DEVICE)
    teachers = Teachers([make_classifier(1 + t) for t in range(E)], K).to(DEVICE) if method != "ce" else None
    state = State(
        networks=make_networks(backend, teachers, student, precision, DEVICE),
        optimizer=make_optimizer(student, 5e-4),
    )
    config = StepConfig(method=Method.parse(method), seed=0)
    images = torch.randint(0, 256, (B, SIZE, SIZE, 3), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(0, K, (B,), device=DEVICE)

    def step():
        measures = train_step(state, config, images, labels, lr=1e-3)
        return measures["loss"].item()  # waits for the device

    loss = benchmark.pedantic(step, warmup_rounds=2, rounds=7)
    assert 0 < loss < 1e3

"""A step of four teachers, together or one after another: `pytest bench/steps/bench_teachers_together.py`.

`NETWORK`, `SIZE` and `BATCH` in the environment choose the problem (wrn16x2, 32, 32 a teacher); K = 100. Steps are not
captured: on a GPU this shows what the launches cost, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ensdistill.config.methods import Method
from ensdistill.engine.networks import make_networks
from ensdistill.engine.operations import Backend, make_operations
from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.philox import counter_of
from ensdistill.models import Classifier, build
from ensdistill.models.students import PlainStudent
from ensdistill.runtime.environment import Precision, autocast
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, train_step
from ensdistill.training.together import TeachersInTraining, member_losses

NETWORK = os.environ.get("NETWORK", "wrn16x2")
SIZE, B = int(os.environ.get("SIZE", 32)), int(os.environ.get("BATCH", 32))
E, K, MEAN, STD, LR = 4, 100, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1e-3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [
    "reference",
    "library",
    pytest.param("triton", marks=pytest.mark.gpu),
    pytest.param("auto", marks=pytest.mark.gpu),
]


def make_classifier(seed: int) -> Classifier:
    return Classifier(build(NETWORK, num_classes=K, image_size=SIZE, seed=seed), MEAN, STD).to(DEVICE)


def one_after_another(
    backend: Backend, precision: Precision, images_EBHWC: Tensor, labels_EB: Tensor
) -> Callable[[], Tensor]:
    """Make a function that does a step of every teacher, one after another, and gives the sum of the losses."""
    students = [PlainStudent(make_classifier(t)) for t in range(E)]
    states = [
        State(
            networks=make_networks(backend, None, student, precision, DEVICE), optimizer=make_optimizer(student, 5e-4)
        )
        for student in students
    ]
    configs = [StepConfig(method=Method.parse("ce"), seed=t) for t in range(E)]

    def step() -> Tensor:
        rows = zip(states, configs, images_EBHWC, labels_EB, strict=True)
        return torch.stack([train_step(*row, lr=LR)["loss_ce"] for row in rows]).sum()

    return step


def together(backend: Backend, precision: Precision, images_EBHWC: Tensor, labels_EB: Tensor) -> Callable[[], Tensor]:
    """Make a function that does a step of all teachers as one network, and gives the sum of the losses."""
    operations = make_operations(backend, DEVICE)
    teachers = TeachersInTraining([make_classifier(t) for t in range(E)], for_kernels=operations is not None).train()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    passes = None if operations is None else teachers.passes(dtype=dtype, operations=operations)
    optimizer = make_optimizer(teachers, 5e-4)
    kernel = False if operations is None else operations.kernel
    done = 0

    def step() -> Tensor:
        nonlocal done
        counters = [counter_of(t, done, 0, DEVICE) for t in range(E)]
        rows = [augment(*given, kernel=kernel)[0] for given in zip(images_EBHWC, counters, strict=True)]
        x_EBCHW = torch.stack(rows).permute(0, 1, 4, 2, 3)
        if passes is None:
            with autocast(DEVICE, precision):
                logits_EBK = teachers(x_EBCHW)
        else:
            logits_EBK = passes(teachers.normalised(x_EBCHW))
        losses = member_losses(logits_EBK, labels_EB, teachers.parameters())
        losses.loss.backward()
        for group in optimizer.param_groups:
            group["lr"].fill_(LR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return losses.loss.detach()

    return step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", [one_after_another, together])
@pytest.mark.parametrize("backend", BACKENDS)
def bench_four_teachers(benchmark, backend, way, precision):
    images = torch.randint(0, 256, (E, B, SIZE, SIZE, 3), dtype=torch.uint8, device=DEVICE)
    step = way(backend, precision, images, torch.randint(0, K, (E, B), device=DEVICE))

    loss = benchmark.pedantic(lambda: step().item(), warmup_rounds=2, rounds=7)
    assert 0 < loss < 1e3

"""Speed of this machine at a job's networks, by a few seconds of their own forwards and training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.config.updates import Optimizer
from ensdistill.costs.data_size import DataSize
from ensdistill.models import Classifier
from ensdistill.models.students import Student, build_student
from ensdistill.runtime.environment import Precision, autocast
from ensdistill.runtime.timing import seconds_of

CALIBRATION_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds that this machine takes."""

    forward: float
    """Forward of the plain network in evaluation mode, an image."""
    step: float
    """Forward, backward and update of the plain network, an image."""
    member_step: float
    """Forward, backward and update of the BatchEnsemble student, an image and member."""
    images: int
    """Rows a step of the calibration."""
    where: str
    """Device, threads and precision that were timed."""


def calibrate(
    classifier: Classifier,
    size: DataSize,
    methods: Sequence[Method],
    *,
    B: int,
    device: torch.device,
    precision: Precision,
    optimizer: Optimizer = "sgd",
) -> Calibration:
    """Time one forward, one training step of the plain network, and one of a BatchEnsemble student if there is any.

    On random images, at the largest batch up to B that the time allows (4 s in all, for networks of which two images
    take less than that). The student has two members: rows count, not members. `classifier` is trained a few steps.
    """
    with_factors = any(method.student in ("latentbe", "be") for method in methods)
    budget = CALIBRATION_SECONDS / (3 if with_factors else 2)
    H, W, C = size.image_shape

    def images(rows: int) -> Tensor:
        return torch.rand(rows, C, H, W, device=device).to(memory_format=torch.channels_last)

    def time_step(method: Method, members: int) -> tuple[float, int]:
        student = build_student(method, lambda seed: classifier, E=members, seed=0).to(device)
        step = _training_step(student, size.num_classes, precision, optimizer)
        return _seconds_a_row(step, images, device, B=B, members=members, budget=budget)

    member_seconds = time_step(Method(student="latentbe"), 2)[0] if with_factors else None
    step_seconds, rows = time_step(Method(student="ce"), 1)
    classifier.eval()

    @torch.no_grad()
    def forward(x_BCHW: Tensor) -> None:
        with autocast(device, precision):
            classifier(x_BCHW)

    forward_seconds, _ = _seconds_a_row(forward, images, device, B=B, members=1, budget=budget)
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Calibration(
        forward=forward_seconds,
        step=step_seconds,
        member_step=step_seconds if member_seconds is None else member_seconds,
        images=rows,
        where=f"{where}, {precision}",
    )


def _training_step(
    student: Student, num_classes: int, precision: Precision, kind: Optimizer
) -> Callable[[Tensor], None]:
    optimizer: torch.optim.Optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    def step(x_BCHW: Tensor) -> None:
        with autocast(x_BCHW.device, precision):
            s_MBK = student.train()(x_BCHW)
        labels = torch.arange(s_MBK[..., 0].numel(), device=x_BCHW.device) % num_classes
        nn.functional.cross_entropy(s_MBK.flatten(0, 1).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _seconds_a_row(
    run: Callable[[Tensor], None],
    images: Callable[[int], Tensor],
    device: torch.device,
    *,
    B: int,
    members: int,
    budget: float,
) -> tuple[float, int]:
    """(median seconds a row, rows): doubles the batch, up to B images, while a few more runs fit into `budget` s.

    `members`: rows that the network makes of an image.
    """
    end = time.perf_counter() + budget

    def seconds(x_BCHW: Tensor) -> float:
        return seconds_of(lambda: run(x_BCHW), device)

    size = min(B, max(1, 2 // members))  # training's normalisation wants two rows
    x_BCHW = images(size)
    last = seconds(x_BCHW)
    if 2 * last < budget:  # the first run also builds what later ones reuse
        last = seconds(x_BCHW)
    while size < B and time.perf_counter() + 6 * last < end:
        size = min(2 * size, B)
        x_BCHW = images(size)
        seconds(x_BCHW)
        last = seconds(x_BCHW)
    measured = [last]
    while len(measured) < 5 and time.perf_counter() + last < end:
        measured.append(seconds(x_BCHW))
    return statistics.median(measured) / (size * members), size * members

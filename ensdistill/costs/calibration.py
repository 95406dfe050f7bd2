"""How fast this machine is at a job's networks: a few seconds of its own forwards and training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.costs.job_size import JobSize
from ensdistill.models import Classifier
from ensdistill.models.students import Student, build_student
from ensdistill.runtime.environment import autocast
from ensdistill.runtime.timing import seconds_of

CALIBRATION_SECONDS = 4.0
_CE = Method(student="ce")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds that this machine took."""

    forward: float
    """An image: forward of the plain network in evaluation mode."""
    step: float
    """An image: forward, backward and update of the plain network."""
    member_step: float
    """An image and member: the same of the BatchEnsemble student."""
    images: int
    """Rows a step of the calibration."""
    where: str
    """Device, threads and precision."""


def calibrate(job: JobSize, classifier: Classifier) -> Calibration:
    """Time one forward, one training step of the plain network, and one of a BatchEnsemble student if there is any.

    On random images, at the largest batch up to the job's that the time allows (4 s in all, for networks of which two
    images take less than that). The student has two members: rows count, not members. `classifier` is trained a few
    steps.
    """
    device = torch.device(job.device)
    with_factors = any(method.student in ("latentbe", "be") for method in job.methods)
    budget = CALIBRATION_SECONDS / (3 if with_factors else 2)

    def images(rows: int) -> Tensor:
        x_BCHW = torch.rand(rows, job.in_channels, job.image_size, job.image_size, device=device)
        return x_BCHW.to(memory_format=torch.channels_last)

    def time_step(method: Method, members: int) -> tuple[float, int]:
        student = build_student(method, lambda seed: classifier, E=members, seed=0).to(device)
        step = _training_step(job, student)
        return _seconds_a_row(step, images, device, B=job.student_batch_size, members=members, budget=budget)

    member_seconds = time_step(Method(student="latentbe"), 2)[0] if with_factors else None
    step_seconds, rows = time_step(_CE, 1)
    classifier.eval()

    @torch.no_grad()
    def forward(x_BCHW: Tensor) -> None:
        with autocast(device, job.precision):
            classifier(x_BCHW)

    B = job.student_batch_size
    forward_seconds, _ = _seconds_a_row(forward, images, device, B=B, members=1, budget=budget)
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Calibration(
        forward=forward_seconds,
        step=step_seconds,
        member_step=step_seconds if member_seconds is None else member_seconds,
        images=rows,
        where=f"{where}, {job.precision}",
    )


def _training_step(job: JobSize, student: Student) -> Callable[[Tensor], None]:
    device = torch.device(job.device)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def step(x_BCHW: Tensor) -> None:
        with autocast(device, job.precision):
            s_MBK = student.train()(x_BCHW)
        labels = torch.arange(s_MBK[..., 0].numel(), device=x_BCHW.device) % job.num_classes
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

"""Speed of this machine at a job's networks, by a few seconds of their own forwards and training steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.config.updates import Optimizer
from ensdistill.costs.data_size import DataSize
from ensdistill.engine.cpu.crew import Crew
from ensdistill.engine.cpu.side_by_side import SideBySideNetworks
from ensdistill.engine.networks import Networks
from ensdistill.models import Classifier
from ensdistill.models.students import build_student
from ensdistill.runtime.environment import Precision, autocast
from ensdistill.runtime.timing import seconds_of

CALIBRATION_SECONDS = 4.0
BUSY = 1.3
"""Slowest over fastest repeat from which a machine is taken for busy; an idle one stays below 1.2."""


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
    fastest: float = 1.0
    """Shortest of a measurement's repeats over their median, of the measurement where they differ most."""
    slowest: float = 1.0
    """Longest of them over their median."""

    @property
    def is_busy(self) -> bool:
        """True where repeats differ by more than an idle machine's do: something else was at work on it."""
        return self.slowest > BUSY * self.fastest


def calibrate(
    classifier: Classifier,
    size: DataSize,
    methods: Sequence[Method],
    *,
    B: int,
    device: torch.device,
    precision: Precision,
    optimizer: Optimizer = "sgd",
    crew: Crew | None = None,
) -> Calibration:
    """Time one forward, one training step of the plain network, and one of a BatchEnsemble student if there is any.

    On random images, at the largest batch up to B that the time allows (4 s in all, for networks of which two images
    take less than that). The student has two members: rows count, not members. `classifier` is trained a few steps.

    Args:
        crew: who computes on a CPU, as in the training.
    """
    with_factors = any(method.student in ("latentbe", "be") for method in methods)
    budget = CALIBRATION_SECONDS / (3 if with_factors else 2)
    H, W, C = size.image_shape

    def images(rows: int) -> Tensor:
        return torch.rand(rows, C, H, W, device=device).to(memory_format=torch.channels_last)

    def time_step(method: Method, members: int) -> _Timing:
        student = build_student(method, lambda seed: classifier, E=members, seed=0).to(device)
        networks = Networks(None, student, precision)
        if crew is not None:
            networks = SideBySideNetworks(None, student, precision, crew, images(max(2, crew.threads)))
        step = _training_step(networks, size.num_classes, optimizer)
        return _timed(step, images, device, B=B, members=members, budget=budget)

    of_members = [time_step(Method(student="latentbe"), 2)] if with_factors else []
    of_step = time_step(Method(student="ce"), 1)
    classifier.eval()

    def part(x_BCHW: Tensor) -> None:
        with autocast(device, precision), torch.no_grad():
            classifier(x_BCHW)

    def forward(x_BCHW: Tensor) -> None:
        if crew is None:
            part(x_BCHW)
        else:
            crew.run([partial(part, rows) for rows in x_BCHW.tensor_split(crew.threads) if len(rows)])

    of_forward = _timed(forward, images, device, B=B, members=1, budget=budget)
    differing = max([*of_members, of_step, of_forward], key=lambda timing: timing.slowest / timing.fastest)
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Calibration(
        forward=of_forward.a_row,
        step=of_step.a_row,
        member_step=(of_members or [of_step])[0].a_row,
        images=of_step.rows,
        where=f"{where}, {precision}",
        fastest=differing.fastest,
        slowest=differing.slowest,
    )


class _Timing(NamedTuple):
    """Repeats of one measurement."""

    a_row: float
    """Median seconds a row."""
    rows: int
    """Rows of a repeat."""
    fastest: float
    """Shortest over median."""
    slowest: float
    """Longest over median."""


def _training_step(networks: Networks, num_classes: int, kind: Optimizer) -> Callable[[Tensor], None]:
    student = networks.student
    optimizer: torch.optim.Optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    def step(x_BCHW: Tensor) -> None:
        s_MBK = networks.student_logits(x_BCHW)
        labels = torch.arange(s_MBK[..., 0].numel(), device=x_BCHW.device) % num_classes
        nn.functional.cross_entropy(s_MBK.flatten(0, 1).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _timed(
    run: Callable[[Tensor], None],
    images: Callable[[int], Tensor],
    device: torch.device,
    *,
    B: int,
    members: int,
    budget: float,
) -> _Timing:
    """Time a row: doubles the batch, up to B images, while a few more runs fit into `budget` seconds.

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
    while len(measured) < 2 or (len(measured) < 7 and time.perf_counter() + last < end):
        measured.append(seconds(x_BCHW))
    median = statistics.median(measured)
    return _Timing(median / (size * members), size * members, min(measured) / median, max(measured) / median)

"""What every provider of a training step is given, and what it has to show for it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ensdistill.engine.networks import Networks
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import BatchEnsembleStudent, PlainStudent, Student
from ensdistill.runtime.environment import Precision
from ensdistill.training.step import StepConfig

SHOWN = ("clean", "tdiv", "tdiv-sdiv")
"""Kinds of data shown that every provider computes."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One student before its first step. Providers copy what they change, so that all of them start alike."""

    teachers: Teachers | None
    """Teachers; None for `ce`."""
    student: Student
    """Student, plain or BatchEnsemble, on the device that computes."""
    config: StepConfig
    """Configuration of the step."""
    precision: Precision = "fp32"
    """Arithmetic of convolutions and linear layers."""
    lr: float = 0.01
    """Learning rate of every step."""
    device: torch.device = field(init=False)
    """Device of the student."""

    def __post_init__(self) -> None:
        if not isinstance(self.student, PlainStudent | BatchEnsembleStudent):
            raise ValueError(f"student: expected a plain one or a BatchEnsemble, got {type(self.student).__name__}")
        if self.config.method.shown not in SHOWN:
            raise ValueError(f"config: expected a method shown one of {SHOWN}, got {self.config.method}")
        if (self.teachers is not None) != self.config.method.needs_teachers:
            raise ValueError(f"teachers: got {self.teachers and self.teachers.E} for the method {self.config.method}")
        object.__setattr__(self, "device", next(self.student.parameters()).device)

    def copies(self, memory_format: torch.memory_format) -> tuple[Teachers | None, Student]:
        """Copy teachers and student, convolutions' weights in `memory_format`."""
        copies = copy.deepcopy((self.teachers, self.student))
        for module in copies:
            if module is not None:
                module.to(memory_format=memory_format)  # type: ignore[call-overload]  # not among torch's overloads
        return copies


class Run(ABC):
    """A provider at work on a problem."""

    student: Student
    """Network in training, with its parameters and statistics after the steps so far."""
    shown: Tensor
    """Images x' (B, C, H, W) of the latest step."""

    @abstractmethod
    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Do one training step on uint8 images and int64 labels.

        Returns:
            `loss`, `loss_ce`, `loss_wd`, `acc1` and, with teachers, `loss_kd`: scalars on the device, before the
            update.
        """

    def remember_images(self, networks: Networks) -> None:
        """Have `shown` be the images that the student of `networks` was last given."""
        student_logits = networks.student_logits

        def remembering(x_BCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
            self.shown = x_BCHW
            return student_logits(x_BCHW, z_BHWC)

        networks.student_logits = remembering  # type: ignore[method-assign]


def weight_decay_loss(student: Student) -> Tensor:
    """Compute ½ Σ‖θ‖² + ½ Σ(‖1 − r‖² + ‖1 − s‖²) / E, differentiable; the factors are stored as r − 1 and s − 1."""
    shared = sum(parameter.square().sum() for parameter in student.shared())
    factors = sum(parameter.square().sum() for parameter in student.factors())
    return torch.as_tensor(shared + factors / student.E) / 2

"""One training step: a function of (state, batch), for every method.

    x  = augment(images)                       kernels/augment.py
    x' = show(x)                               perturbation.py, evaluation mode, 0 to 6 F
    loss = (1 − α) · CE(student(x'), labels) + α · KD(student(x'), teachers(x')) + λ · loss_wd
    Nesterov SGD, momentum 0.9

loss_wd = ½ Σ‖θ‖² + ½ Σ(‖1 − r‖² + ‖1 − s‖²) / E, and the gradient of r and s is multiplied by E. Storing ρ = r − 1
makes both a parameter group of the ordinary optimizer: learning rate E · lr, weight decay λ / E. Nothing here
synchronises with the device: measures leave as tensors, the pair and the learning rate are functions of the step, which
the host counts.
Source: Nam et al. 2022, algorithm 1, as the official code runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensdistill.kernels.augment import augment
from ensdistill.kernels.distil import distil
from ensdistill.methods import Method
from ensdistill.networks import Networks
from ensdistill.perturbation import show
from ensdistill.students import Student

MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step computes; constant over a run."""

    method: Method
    """Student and data shown."""
    seed: int
    """Key of every random draw."""
    tau: float = 4.0
    """Temperature τ of the distillation."""
    alpha: float = 1.0
    """Weight α of the distillation; 1 − α is that of the labels. Ignored by `ce`."""
    weight_decay: float = 5e-4
    """λ."""
    pad: int = 4
    """Zero pixels a side before the random crop."""
    flip: bool = True
    """Whether images are flipped with probability ½."""


@dataclass(kw_only=True)
class State:
    """What a step changes."""

    networks: Networks
    """The student in training and its frozen teachers, and what computes them."""
    optimizer: torch.optim.SGD
    """From `make_optimizer`."""
    step: int = 0
    """Updates done so far."""

    @property
    def student(self) -> Student:
        """The network in training."""
        return self.networks.student


def make_optimizer(student: Student, weight_decay: float, factor_rate: float = 1.0) -> torch.optim.SGD:
    """Nesterov SGD; the factors' group has learning rate `factor_rate` · E · lr and weight decay λ / E.

    `rate_scale` of a group multiplies the schedule's rate (see `train_step`).
    """
    groups = [{"params": student.shared(), "rate_scale": 1.0, "weight_decay": weight_decay}]
    if factors := student.factors():
        groups.append(
            {"params": factors, "rate_scale": factor_rate * student.E, "weight_decay": weight_decay / student.E}
        )
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True)


def train_step(
    state: State, config: StepConfig, images_BHWC: Tensor, labels_B: Tensor, lr: float, *, first_row: int = 0
) -> dict[str, Tensor]:
    """Augment, perturb, distil, update: `state` is advanced by one step.

    Args:
        images_BHWC: uint8.
        labels_B: int64 in [0, K).
        lr: the schedule's learning rate of this step.
        first_row: the global row of the batch's first image.

    Returns:
        The step's measures before its update, as scalar tensors on the device: see `update`.
    """
    networks = state.networks
    draw: dict[str, Any] = {"seed": config.seed, "step": state.step, "first_row": first_row}
    crop: dict[str, Any] = {"pad": config.pad, "flip": config.flip, "kernel": networks.kernel}
    z_BHWC = None
    if networks.normalise is None:
        x_BHWC = augment(images_BHWC, **draw, **crop)
    else:
        x_BHWC, z_BHWC = augment(images_BHWC, **draw, **crop, normalise=networks.normalise, dtype=networks.dtype)
    x_BCHW = x_BHWC.permute(0, 3, 1, 2)  # channels_last
    x_BCHW, z_BHWC = show(config.method.shown, x_BCHW, networks, **draw, tau=config.tau, z_BHWC=z_BHWC)
    return update(state, config, x_BCHW, labels_B, lr, z_BHWC=z_BHWC)


def update(
    state: State, config: StepConfig, x_BCHW: Tensor, labels_B: Tensor, lr: float, *, z_BHWC: Tensor | None = None
) -> dict[str, Tensor]:
    """The update on images that are shown as they are, (B, C, H, W) in [0, 1]; `z_BHWC`: see `Networks`.

    Returns:
        Scalar tensors: `loss`, `loss_ce`, `loss_kd` (not for `ce`), `loss_wd`, and `acc1`, the share of the M·B rows
        that are classified right.
    """
    student, networks = state.student, state.networks
    needs_teachers = config.method.needs_teachers
    t_EBK = networks.teacher_logits(x_BCHW, z_BHWC) if needs_teachers else None
    s_MBK = networks.student_logits(x_BCHW, z_BHWC)
    alpha = config.alpha if needs_teachers else 0.0
    out = distil(s_MBK, t_EBK, labels_B, config.tau, alpha, kernel=networks.kernel)
    measures = {"loss_ce": out.loss_ce, "acc1": out.acc1, "loss_wd": _weight_decay_loss(student)}
    if out.loss_kd is not None:
        measures["loss_kd"] = out.loss_kd
    loss = out.loss
    measures["loss"] = loss.detach() + config.weight_decay * measures["loss_wd"]
    # Weight decay is the optimizer's, so the backward is of the loss without it.
    loss.backward()
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["rate_scale"]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return {name: value.detach() for name, value in measures.items()}


@torch.no_grad()
def _weight_decay_loss(student: Student) -> Tensor:
    shared = torch.stack(torch._foreach_norm(tuple(student.shared()))).square().sum()
    if factors := student.factors():
        shared = shared + torch.stack(torch._foreach_norm(tuple(factors))).square().sum() / student.E
    return shared / 2

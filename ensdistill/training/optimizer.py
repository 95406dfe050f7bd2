"""Nesterov SGD over the student's parameter groups, and its learning rate: linear warm-up, then one cosine to 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ensdistill.models.students import Student


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`schedule(step)` is the learning rate of the update at `step`, the first being 0."""

    peak: float
    """Learning rate at the end of the warm-up."""
    warmup_steps: int
    """Steps from 0 to the peak."""
    total_steps: int
    """Steps after which the rate is 0."""

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


MOMENTUM = 0.9


def make_optimizer(student: Student, weight_decay: float, factor_rate: float = 1.0) -> torch.optim.SGD:
    """Nesterov SGD; the factors' group has learning rate `factor_rate` · E · lr and weight decay λ / E.

    `rate_scale` of a group multiplies the schedule's rate (see `train_step`), which every group holds as a tensor of
    its own. Momentum is there from the start, as zeros, which makes the same first update: a captured graph would
    repeat the branch that a first step takes.
    """
    groups: list[dict[str, Any]] = [{"params": student.shared(), "rate_scale": 1.0, "weight_decay": weight_decay}]
    if factors := student.factors():
        groups.append(
            {"params": factors, "rate_scale": factor_rate * student.E, "weight_decay": weight_decay / student.E}
        )
    device = groups[0]["params"][0].device
    for group in groups:
        # the fused update reads a float32 on the GPU; elsewhere it takes the number, for which float64 rounds nothing
        cuda = device.type == "cuda"
        group["lr"] = torch.zeros((), dtype=torch.float32 if cuda else torch.float64, device=device if cuda else "cpu")
    fused = True if device.type in ("cpu", "cuda") else None
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=fused)
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.SGD, stored: dict[str, Any]) -> None:
    """Take the momentum from a `state_dict`, into the tensors that hold it: a graph and a fused update know no others.

    Raises:
        ValueError, KeyError: `stored` is of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    given = [stored["state"][i]["momentum_buffer"] for i in range(len(stored["state"]))]
    if [x.shape for x in momenta] != [x.shape for x in given]:
        raise ValueError(f"the optimizer has {len(momenta)} parameters, {len(given)} or other ones are stored")
    for momentum, value in zip(momenta, given, strict=True):
        momentum.copy_(value)

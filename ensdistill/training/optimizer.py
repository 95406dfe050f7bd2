"""The optimizer over the student's parameter groups, and its learning rate: linear warm-up, then one cosine to 0.

With the learning rate η of the step and the weight decay λ, of every parameter θ, norms and biases among them, and of
the deviation ρ = r − 1 of a factor of E members, which alone has another rate:

    Nesterov SGD   g = ∂L/∂θ + λ·θ,        m ← 0.9 m + g,   θ ← θ − η · (g + 0.9 m)
                   g = ∂L/∂ρ + (λ/E)·ρ,    m ← 0.9 m + g,   ρ ← ρ − E η · (g + 0.9 m)
    AdamW          θ ← θ − η · (λ·θ + u),        u = m̂ / (√v̂ + 1e-8) of ∂L/∂θ, betas 0.9 and 0.999
                   ρ ← ρ − η · (λ·ρ + E · u)     (Loshchilov and Hutter 2019)

Either decay draws factors to 1 as it draws other parameters to 0. The method multiplies the gradient of the factors by
E: AdamW's u does not depend on that, and the E of the learning rate is what stays of it. Where the factors learn at
another rate (`factor_rate`), both terms of theirs are scaled by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensdistill.config.updates import Optimizer
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


def make_optimizer(
    student: Student, weight_decay: float, factor_rate: float = 1.0, kind: Optimizer = "sgd"
) -> torch.optim.Optimizer:
    """The optimizer of `student`; the factors' group has learning rate `factor_rate` · E · lr and weight decay λ / E.

    `rate_scale` of a group multiplies the schedule's rate (see `train_step`), which every group holds as a tensor of
    its own. What it remembers of gradients is there from the start, as zeros, which makes the same first update: a
    captured graph would repeat the branch that a first step takes.
    """
    groups: list[dict[str, Any]] = [{"params": student.shared(), "rate_scale": 1.0, "weight_decay": weight_decay}]
    if factors := student.factors():
        groups.append(
            {"params": factors, "rate_scale": factor_rate * student.E, "weight_decay": weight_decay / student.E}
        )
    device = groups[0]["params"][0].device
    cuda = device.type == "cuda"
    for group in groups:
        # the fused update reads a float32 on the GPU; elsewhere it takes the number, for which float64 rounds nothing
        group["lr"] = torch.zeros((), dtype=torch.float32 if cuda else torch.float64, device=device if cuda else "cpu")
    fused = True if device.type in ("cpu", "cuda") else None
    optimizer: torch.optim.Optimizer
    moments: tuple[str, ...]
    if kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=fused)
        moments = ("momentum_buffer",)
    else:
        # `capturable` asks for nothing that `fused` does not do; without it a capture is refused
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=fused, capturable=cuda)
        moments = ("exp_avg", "exp_avg_sq")
    for group in groups:
        for parameter in group["params"]:
            slots = optimizer.state[parameter]
            slots.update({name: torch.zeros_like(parameter) for name in moments})
            if kind == "adamw":
                slots["step"] = torch.zeros((), device=device)
    return optimizer


def remembered(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """List every tensor that `optimizer` keeps from update to update: moments, and counts of updates."""
    return [value for slots in optimizer.state.values() for value in slots.values()]


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Take what a `state_dict` remembers into the tensors that hold it: a graph and a fused update know no others.

    Raises:
        ValueError, KeyError: `stored` is of other parameters, or of another kind of optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = [optimizer.state[parameter] for parameter in parameters]
    given = [stored["state"][i] for i in range(len(stored["state"]))]
    expected, found = ([{name: x.shape for name, x in one.items()} for one in some] for some in (slots, given))
    if expected != found:
        raise ValueError(f"the optimizer has {len(slots)} parameters, {len(given)} or other ones are stored")
    for mine, theirs in zip(slots, given, strict=True):
        for name, value in theirs.items():
            mine[name].copy_(value)

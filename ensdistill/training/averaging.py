"""Averages of a network's weights over time, kept beside it: an exponential moving average, or the mean of last epochs.

Both are copies of the student as it is in training, factors and members included, so that each becomes what the student
becomes: averaged over members, kept as an ensemble, taken apart into teachers that trained together.

    EMA    ā ← ā + w (θ − ā) after every step,   w = max(1 − decay, 9 / (10 + n)) at the n-th, the first being 0
    SWA    ā ← the mean of θ after each of the last N epochs (Izmailov et al. 2018)

w is the warm-up that TensorFlow's `ExponentialMovingAverage` made usual: without it a run of fewer steps than some
multiples of 1 / (1 − decay) would end with much of the weights that it was drawn with. It is read on the device, where
one captured graph serves every step: PyTorch's `get_ema_multi_avg_fn` has one weight for all steps.
Running statistics of norms take part in the EMA like weights, for it is validated while it trains; SWA's are
measured anew, once, in the end (`measure_statistics`). Whatever else a network holds is copied as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn, update_bn

from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.philox import counter_of
from ensdistill.models.students import Student
from ensdistill.models.synced_norm import gather_statistics, scatter_statistics
from ensdistill.runtime.ranks import Ranks
from ensdistill.training.module_draws import seed_modules

if TYPE_CHECKING:
    from ensdistill.data.feed import Feed
    from ensdistill.training.step import StepConfig


class Ema:
    """Exponential moving average of the weights and running statistics of `student`, updated after every step."""

    def __init__(self, student: Student, decay: float) -> None:
        self.student = copy.deepcopy(student).requires_grad_(False)
        """Network of the averages; a student like any other, which nothing trains."""
        self.decay = decay
        self.updates = torch.zeros((), dtype=torch.float64, device=next(student.parameters()).device)
        """Number of updates done so far, on the device."""

    def tensors(self) -> list[Tensor]:
        """List everything that an update changes."""
        return [*self.student.parameters(), *self.student.buffers(), self.updates]

    @torch.no_grad()
    def update(self, student: Student) -> None:
        """Move towards what `student` is now; nothing synchronises."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # of one type they are one launch
        for average, value, is_averaged in _pairs(self.student, student):
            mine, theirs = (averages, values) if is_averaged else copies.setdefault(average.dtype, ([], []))
            mine.append(average)
            theirs.append(value.detach())
        for mine, theirs in copies.values():
            torch._foreach_copy_(mine, theirs)
        weight = (9 / (self.updates + 10)).clamp_(min=1 - self.decay)
        steps = torch._foreach_sub(values, averages)
        torch._foreach_mul_(steps, weight.to(averages[0].dtype))  # of their type it is one launch for many tensors
        torch._foreach_add_(averages, steps)
        self.updates.add_(1)

    def stored(self, ranks: Ranks) -> dict[str, Any]:
        """What a checkpoint keeps; all ranks call it."""
        statistics = gather_statistics(self.student, ranks)
        return {"student": self.student.state_dict(), "statistics": statistics, "updates": self.updates}

    def restore(self, stored: dict[str, Any], ranks: Ranks) -> None:
        """Become what `stored` gave.

        Raises:
            UserError: that was of another number of processes.
            RuntimeError, ValueError, KeyError: that was of another network.
        """
        self.student.load_state_dict(stored["student"])
        scatter_statistics(self.student, stored["statistics"], ranks)
        self.updates.copy_(stored["updates"])


class Swa:
    """Mean of the weights of `student` after each of the last `epochs` epochs; its running statistics mean nothing."""

    def __init__(self, student: Student, epochs: int) -> None:
        self.student = copy.deepcopy(student).requires_grad_(False)
        """Network of the mean; a student like any other, which nothing trains."""
        self.epochs = epochs
        self.taken = 0
        """Number of epochs whose weights are in the mean."""

    @torch.no_grad()
    def update(self, student: Student) -> None:
        """Take in what `student` is now."""
        averages, values = list(self.student.parameters()), [value.detach() for value in student.parameters()]
        get_swa_multi_avg_fn()(averages, values, self.taken)
        for mine, theirs in zip(self.student.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
        self.taken += 1

    def stored(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"student": self.student.state_dict(), "taken": self.taken}

    def restore(self, stored: dict[str, Any]) -> None:
        """Become what `stored` gave.

        Raises:
            RuntimeError, ValueError, KeyError: that was of another network, or of more epochs.
        """
        taken = stored["taken"]
        if type(taken) is not int or not 0 <= taken <= self.epochs:
            raise ValueError(f"SWA: {taken!r} epochs are averaged, expected 0 to {self.epochs}")
        self.student.load_state_dict(stored["student"])
        self.taken = taken


def _pairs(average: Student, student: Student) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Every parameter and buffer of the two, and whether it is averaged; looked up anew: modules may replace one."""
    for weight, value in zip(average.parameters(), student.parameters(), strict=True):
        yield weight, value, True
    for (name, mine), theirs in zip(average.named_buffers(), student.buffers(), strict=True):
        yield mine, theirs, name.rpartition(".")[2] in ("running_mean", "running_var")


def measure_statistics(network: nn.Module, feed: Feed, config: StepConfig) -> None:
    """Replace the BatchNorm statistics of `network` by its own: the mean over one epoch of augmented batches.

    A network whose weights are an average, over members or over time, runs on statistics that belong to others.
    Measuring its own is what stochastic weight averaging does (Izmailov et al. 2018).

    Args:
        network: takes images (B, C, H, W) in [0, 1], as a classifier does, or a student with all its members.
        feed: training images; its first epoch is seen.
        config: its seed, crop and flip augment them; they are not perturbed.
    """
    device = next(network.parameters()).device

    def augmented(step: int, images: Tensor) -> Tensor:
        seed_modules(config.seed, step, 0, device)
        counter = counter_of(config.seed, step, 0, device)
        return augment(images.to(device), counter, pad=config.pad, flip=config.flip)[0].permute(0, 3, 1, 2)

    with feed.epoch(0) as batches:
        update_bn((augmented(step, images) for step, (images, _) in enumerate(batches)), network)

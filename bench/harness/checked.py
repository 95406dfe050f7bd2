"""A provider's run that has shown that it computes the step: nobody is timed on wrong numbers.

The memory of a run is what it adds at its peak to what lay on the GPU before: while it is made, and in its first step,
warm-up, choice of kernels and capture included, for a graph's replays allocate nothing that could be seen.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from bench.harness.context import FAILED, WRONG, Batches
from bench.rivals import Agreement, Run, agreement

R = TypeVar("R", bound=Run)


class Checked(Generic[R]):
    """A run and what its check found; a call with a number does the step on the batch of that number."""

    def __init__(
        self,
        make: Callable[[], R],
        make_reference: Callable[[], Run],
        bounds: Agreement,
        batches: Batches,
        device: torch.device,
    ) -> None:
        """Make a run and its reference, which start alike, and compare them over two steps.

        Args:
            bounds: what they may differ by.
            batches: for these steps, and for those to come.
        """
        self._batches = batches
        self._loss: Tensor | None = None
        gc.collect()  # runs refer to themselves: an earlier one's memory shall not go while this one's is watched
        reference = make_reference()
        watch = _Watch(device)
        self.run = make()
        self.difference = agreement(_FirstStep(self.run, watch), reference, [batches[-1], batches[-2]])
        """Difference from the definition over those two steps."""
        self.peak_gb = watch.peak_gb
        """Peak memory of the run in GB; None on a CPU."""
        self._wrong = ""
        if not self.difference.within(bounds):
            self._wrong = f"{WRONG}: {self.difference} from the fp32 definition, expected at most {bounds}"

    def __call__(self, i: int) -> None:
        """Do one step on batch i."""
        self._loss = self.run(*self._batches[i])["loss"]

    @property
    def wrong(self) -> str:
        """Description of what is wrong with its numbers, those of the latest step included; empty where nothing is."""
        if self._wrong or self._loss is None or math.isfinite(loss := self._loss.item()):
            return self._wrong
        return f"{WRONG}: the loss of the last step is {loss}"


def why_not(error: ValueError | RuntimeError) -> str:
    """Write the note for a provider that could not be made; by a `ValueError` it does not stand for the problem."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, ValueError) else f"{FAILED}: {type(error).__name__}: {text}"


class _Watch:
    """Watches the GPU's memory for what is made after it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._peak = self._own = self._others = 0
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._others = torch.cuda.memory_allocated(self._device)

    def made(self) -> None:
        """Note that what is watched has been made; others may allocate until `stepping`."""
        if self._device is not None:
            self._peak = torch.cuda.max_memory_allocated(self._device) - self._others
            self._own = torch.cuda.memory_allocated(self._device) - self._others

    def stepping(self) -> None:
        """Note that what is watched begins a step."""
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._others = torch.cuda.memory_allocated(self._device) - self._own

    def stepped(self) -> None:
        """Note that it has done the step."""
        if self._device is not None:
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device) - self._others)

    @property
    def peak_gb(self) -> float | None:
        """Peak memory of what is watched, in GB; None on a CPU."""
        return None if self._device is None else self._peak / 1e9


class _FirstStep(Run):
    """A run that has just been made, whose first step is watched."""

    def __init__(self, run: Run, watch: _Watch) -> None:
        self._run, self._watch, self._is_first = run, watch, True
        self.student = run.student
        watch.made()

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        if self._is_first:
            self._watch.stepping()
        measures = self._run(images_BHWC, labels_B)
        if self._is_first:
            self._watch.stepped()
            self._is_first = False
        self.shown = self._run.shown
        return measures

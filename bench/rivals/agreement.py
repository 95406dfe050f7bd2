"""Comparison of what two providers compute: the same training, or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from bench.rivals.problem import Problem, Run


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Largest relative differences to another provider over some steps from the same start."""

    shown: float
    """Difference of the perturbed images: ‖x' − x'_ref‖ over the length of all images' steps, √(B·D) / 255."""
    loss: float
    """Difference of the loss and its parts."""
    parameters: float
    """Difference of a parameter tensor's change since the start, in its norm."""
    statistics: float
    """Difference of a tensor of running statistics' change since the start, in its norm."""

    def within(self, bounds: Agreement) -> bool:
        """Tell whether every difference is at most the one of `bounds`; NaN is not."""
        return all(ours <= bound for ours, bound in zip(astuple(self), astuple(bounds), strict=True))


def agreement(run: Run, reference: Run, batches: Sequence[tuple[Tensor, Tensor]]) -> Agreement:
    """Compare two runs, which both do a step on every (images, labels) of `batches`."""
    before = _state(reference)
    shown, losses = [], []
    for images_BHWC, labels_B in batches:
        ours, theirs = run(images_BHWC, labels_B), reference(images_BHWC, labels_B)
        if ours.keys() != theirs.keys():
            raise ValueError(f"run: expected the measures {sorted(theirs)}, got {sorted(ours)}")
        losses += [_relative(ours[name], theirs[name]) for name in theirs if name.startswith("loss")]
        length = reference.shown.numel() ** 0.5 / 255
        shown.append((run.shown - reference.shown).double().norm().item() / length)
    ours, theirs = _state(run), _state(reference)
    changes = {name: _relative(ours[name] - value, theirs[name] - value) for name, value in before.items()}
    is_statistic = {name: "running_" in name for name in changes}
    return Agreement(
        shown=_largest(shown),
        loss=_largest(losses),
        parameters=_largest([change for name, change in changes.items() if not is_statistic[name]]),
        statistics=_largest([change for name, change in changes.items() if is_statistic[name]]),
    )


def _state(run: Run) -> dict[str, Tensor]:
    """Copy parameters and statistics, in float64."""
    state = run.student.state_dict()
    return {name: x.double().clone() for name, x in state.items() if not name.endswith("num_batches_tracked")}


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).double().norm() / theirs.double().norm().clamp_min(1e-30)).item()


def _largest(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).max().item()  # NaN if one is


_FP32 = Agreement(shown=1e-2, loss=5e-5, parameters=3e-2, statistics=3e-3)
_ROUNDED = Agreement(shown=0.4, loss=1e-2, parameters=0.8, statistics=0.4)


def bounds(problem: Problem) -> Agreement:
    """Give what two steps of `problem` may differ by from the fp32 definition, before anybody is timed on it.

    Each is some ten times, in bf16 two to four times, the largest difference that was measured on a CPU: over WRN-28-4
    at B 8 and WRN-16-2 at B 32, 32 px, 7e-4, 3e-6, 3e-3, 2e-4 in fp32 (the perturbation normalises a small gradient,
    and a ReLU next to 0 may fall on the other side) and 0.11, 2e-4, 0.11, 0.10 in bf16; over WRN-10-1 at B 5, whose
    worst tensors are small, 0.15, 2e-3, 0.42, 8e-3 in bf16. A GPU may round operands of fp32 convolutions to TF32.
    """
    return _FP32 if problem.precision == "fp32" and problem.device.type == "cpu" else _ROUNDED

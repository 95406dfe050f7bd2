"""How kernels are judged: against float64, beside their reference in their own type, on memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_accurate(got: Tensor, reference: Tensor, truth: Tensor, floor: float) -> None:
    """`got` is off by at most twice the reference's plus `floor`, in parts of the largest true value, or of 1."""
    assert got.shape == reference.shape and got.dtype == reference.dtype, (got.dtype, reference.dtype)
    got, reference, truth = (x.detach().cpu().double() for x in (got, reference, truth))
    scale = max(1.0, truth.abs().max().item())
    error, allowed = ((x - truth).abs().max().item() / scale for x in (got, reference))
    assert error <= 2 * allowed + floor, f"error {error:.3g}, the reference's {allowed:.3g}, floor {floor:.3g}"


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN, and the largest integer: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def error(x: Tensor, truth: Tensor) -> float:
    """The largest error, as a share of the largest value."""
    assert x.shape == truth.shape
    worst = ((x.double() - truth.double()).abs().max() / truth.double().abs().max()).item()
    return float("inf") if worst != worst else worst


def agrees(x: Tensor, ref: Tensor, truth: Tensor, floor: float) -> None:
    """At most twice the reference's error in the same type, plus `floor`."""
    assert x.dtype == ref.dtype and truth.dtype == torch.float64
    assert error(x, truth) <= 2 * error(ref, truth) + floor


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]

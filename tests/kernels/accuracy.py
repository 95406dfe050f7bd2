"""How kernels are judged: against float64, beside their reference in their own type, on memory that starts as NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


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


def assert_launches_alike_on_meta(
    function: Callable[..., Any], *args: Any, writes: Sequence[Tensor] = (), **options: Any
) -> None:
    """On `meta`, where nothing is computed, results have the shapes, types and strides of those on a device.

    On the device `function` changes the arguments `writes` and no other, and gives none of them back.
    """
    given = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
    before = [x.clone() for x in given]
    out = tree_leaves(function(*args, **options))
    changed = [id(x) for x, old in zip(given, before, strict=True) if not torch.equal(x, old)]
    assert changed == [id(x) for x in given if any(x is written for written in writes)]
    places = {x.untyped_storage().data_ptr() for x in given if x.numel()}
    assert not any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in places for x in out)

    def without_values(x: Any) -> Any:
        is_tensor = isinstance(x, Tensor)
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if is_tensor else x

    on_meta = tree_leaves(function(*tree_map(without_values, args), **tree_map(without_values, options)))
    for x, y in zip(out, on_meta, strict=True):
        assert type(x) is type(y)
        if isinstance(x, Tensor):
            assert y.is_meta and (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def order(x: Tensor) -> list[int]:
    """List the strides that matter, those of axes longer than 1."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]

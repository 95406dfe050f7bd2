"""A CUDA graph's stand-in on the CPU: the operations of the dispatcher, recorded once and repeated on the same tensors.

What Python decided while it was recorded stays decided, and results lie where they lay: a step that reads anything but
tensors gives other numbers when it is repeated, as it would in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::lift_fresh")
"""What makes the host wait for a GPU, or copies from it: a capture fails on these."""


class RecordedGraph(TorchDispatchMode):
    """A `stepper.Graph`."""

    def __init__(self, warm_ups: int = 2) -> None:
        super().__init__()
        self.warm_ups = warm_ups
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def capture(self, work):
        self.calls = []
        for _ in range(self.warm_ups):
            work()
        with self:
            work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} cannot be captured")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
        if new or func._schema.is_mutable:  # else a view, which stays one
            self.calls.append((func, args, kwargs, new))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, new in self.calls:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            out = func(*args, **kwargs)
            again = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
            for old, value in zip(new, again, strict=True):
                old.copy_(value)

"""A CUDA graph of a whole training step, for every provider that can be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ensdistill.runtime.timing import WARM_UPS, capture


class Captured:
    """Replays `step(*inputs)` as a graph, over inputs of its own.

    The outputs are written anew by every call. Changes that the warm-up makes in the tensors `state`, which need no
    gradient, are undone.
    """

    def __init__(
        self, step: Callable[..., dict[str, Tensor]], inputs: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        self.inputs = [x.clone() for x in inputs]
        before = [x.clone() for x in state]

        def warm_up() -> None:
            for _ in range(WARM_UPS):
                step(*self.inputs)
            for x, value in zip(state, before, strict=True):
                x.copy_(value)

        self._replay = capture(lambda: step(*self.inputs), warm_up=warm_up)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x, non_blocking=True)
        return self._replay()


def momentum(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """List the buffers that an update changes beside the parameters."""
    return [slot["momentum_buffer"] for slot in optimizer.state.values()]


@contextmanager
def cudnn(*, tf32: bool | None = None) -> Iterator[None]:
    """Let cuDNN choose the fastest algorithms; `tf32`: whether it may round operands of fp32 convolutions."""
    flags = torch.backends.cudnn
    before = flags.benchmark, flags.allow_tf32
    flags.benchmark, flags.allow_tf32 = True, before[1] if tf32 is None else tf32
    try:
        yield
    finally:
        flags.benchmark, flags.allow_tf32 = before

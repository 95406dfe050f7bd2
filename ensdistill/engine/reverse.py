"""The reverse pass over a network's values, for frozen networks and for training.

    v = mask ∘ (convᵀ(dy) + before)        dx = scale ∘ v + after        sums = Σ v, Σ v·x

Every layer that reads a value gives a share of its gradient. The first shares are added up by the kernel that computes
the next one (`before`); the last one's also takes along what lies between the value and the layer that wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ensdistill.engine.operations import Operations
from ensdistill.engine.structure import Conv, FrozenConv, MaxPool, Norm
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.epilogue import input_gradient_epilogue_ref
from ensdistill.kernels.norm.max_pool_gradient import max_pool_gradient
from ensdistill.kernels.norm.pool_gradient import global_pool_gradient

Share = Callable[..., tuple[Tensor, Tensor | None]]
"""Computes a share with the options of an input gradient's epilogue, and the norm's sums where those ask for them."""


class Reverse:
    """Gradients by value, from the logits back; `take` hands each out once it is complete."""

    def __init__(
        self,
        operations: Operations,
        readers: Counter[int],
        last_share: Callable[[int], tuple[int, dict[str, Any]]],
        *,
        dtype: torch.dtype,
        members: Tensor | None = None,
    ) -> None:
        """Start with no gradients.

        Args:
            readers: how many layers read each value, the pool included.
            last_share: from a value, the value whose gradient its complete one becomes or joins, and the options of the
                epilogue that makes it so (`epilogue.input_gradient_epilogue_ref`), but for `before` and `after`.
            dtype: type of the gradients.
            members: int64 (M,): the slots of the weights and scales, all of them by default.
        """
        self.operations, self.dtype, self.members = operations, dtype, members
        self.gradients: dict[int, Tensor] = {}
        """Gradients (M, B, H, W, C) by value, as far as shares have come."""
        self.sums: dict[int, Tensor] = {}
        """Sums Σ v and Σ v·x (M, T, 2, C) by value, where the last share's kernel took them."""
        self._waiting = Counter(readers)
        self._last_share = last_share

    def features(self, value: int, dy: Tensor, w_EKKIO: Tensor, size: tuple[int, int]) -> None:
        """Give the pooled `value` of `size` (H, W) its share, from the gradient dy (M, B, 1, 1, K) of the logits."""
        df, _ = self.operations(member_conv_input_gradient)(dy, w_EKKIO, size=(1, 1), members=self.members)

        def pooled(**epilogue: Any) -> tuple[Tensor, Tensor | None]:
            members = self.members if "scale" in epilogue else None
            pool_gradient = self.operations(global_pool_gradient)
            return pool_gradient(df[:, :, 0, 0, :], size=size, members=members, dtype=self.dtype, **epilogue)

        self._give(value, pooled)

    def take(self, layer: Conv | Norm | MaxPool | FrozenConv) -> Tensor:
        """Hand out the complete gradient of the target of `layer`."""
        return self.gradients.pop(layer.target)

    def residual(self, layer: Conv | Norm | FrozenConv, dy: Tensor) -> None:
        """Give the residual of `layer`, if it has one, its share: the gradient dy of the target itself."""
        if layer.residual is not None:
            self.whole(layer.residual, dy)

    def whole(self, value: int, dy: Tensor) -> None:
        """Give `value` a share that is at hand."""

        def identity(before: Tensor | None = None, **epilogue: Any) -> tuple[Tensor, Tensor | None]:
            if not epilogue:
                return (dy if before is None else before + dy), None
            # a residual that was its value's first reader: no convolution's epilogue is left
            return input_gradient_epilogue_ref(dy, members=self.members, before=before, **epilogue)

        self._give(value, identity)

    def conv(
        self, layer: Conv | FrozenConv, dy: Tensor, w_EKKIO: Tensor, size: tuple[int, int], *, shared: bool = False
    ) -> None:
        """Give the source of `layer`, which is of `size` (H, W), its share from the gradient dy of the target.

        `shared`: all members read the one source; its gradient is their sum (B, H, W, C).
        """

        def gradient(**epilogue: Any) -> tuple[Tensor, Tensor | None]:
            if shared and "norm" in epilogue:
                x_1BHWC, *affine = epilogue["norm"]
                epilogue["norm"] = (x_1BHWC[0], *affine)
            return self.operations(member_conv_input_gradient)(
                dy, w_EKKIO, size=size, stride=layer.stride, members=self.members, shared=shared, **epilogue
            )

        self._give(layer.source, gradient)

    def max_pool(self, layer: MaxPool, dy: Tensor, positions: Tensor, size: tuple[int, int]) -> None:
        """Give the source of `layer`, which is of `size` (H, W), its share; `positions` are the forward's."""

        def gradient(**epilogue: Any) -> tuple[Tensor, Tensor | None]:
            members = self.members if "scale" in epilogue else None
            return self.operations(max_pool_gradient)(dy, positions, size=size, members=members, **epilogue)

        self._give(layer.source, gradient)

    def norm(self, layer: Norm, gradient: Callable[[Tensor | None], Tensor]) -> None:
        """Give the source of `layer` its share, which `gradient` adds to those before."""
        self._give(layer.source, lambda before=None: (gradient(before), None))

    def _give(self, value: int, share: Share) -> None:
        self._waiting[value] -= 1
        target, epilogue = self._last_share(value) if self._waiting[value] == 0 else (value, {})
        if value in self.gradients:
            epilogue["before"] = self.gradients.pop(value)
        if target != value and target in self.gradients:
            epilogue["after"] = self.gradients[target]
        self.gradients[target], sums = share(**epilogue)
        if sums is not None:
            self.sums[target] = sums

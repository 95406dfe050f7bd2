"""What the convolutions of a training pass read of the layers' parameters, and whose the gradients are.

`SharedParameters`: one network, whose weights the members share up to rank-one factors: a BatchEnsemble student, or a
plain network, the case of one member without factors. `OwnParameters`: a network a member, all of one structure, their
parameters stacked. Either is made anew for a forward and serves it and its backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.dispatch import Operations
from ensdistill.folding import member_factors


class MemberParameters(ABC):
    """Weights and biases of E members, by the layer's name. `modules`: every convolution and the linear layer."""

    own_norms: bool
    """Whether every member has norms of its own: γ, β and running statistics (E, C), and statistics of its own rows."""

    def __init__(self, modules: Mapping[str, nn.Module], E: int, *, dtype: torch.dtype, operations: Operations) -> None:
        self.modules: dict[str, Any] = dict(modules)
        self.E, self.dtype, self.operations = E, dtype, operations

    @abstractmethod
    def weights(self, name: str) -> Tensor:
        """(E, k, k, CI, CO) of `dtype`, contiguous; maybe the parameter itself."""

    @abstractmethod
    def bias(self, name: str) -> Tensor | None:
        """(E, CO) or, where members share it, (1, CO)."""

    @abstractmethod
    def gradients(self, name: str, dw_EKKIO: Tensor, dy_EBHWC: Tensor) -> dict[int, Tensor]:
        """The gradients of the layer's parameters by their ids, from those of its weights and of its output."""


class SharedParameters(MemberParameters):
    """W ∘ r sᵀ; the norms are everybody's."""

    own_norms = False

    def __init__(self, modules: Mapping[str, nn.Module], E: int, *, dtype: torch.dtype, operations: Operations) -> None:
        super().__init__(modules, E, dtype=dtype, operations=operations)
        self.factors = member_factors(modules)

    def weights(self, name: str) -> Tensor:
        r, s = self.factors[name]
        weight = self.modules[name].weight.detach()
        return self.operations.member_weights(weight, r, s, E=self.E, dtype=self.dtype)

    def bias(self, name: str) -> Tensor | None:
        bias = self.modules[name].bias
        if bias is None:
            return None
        s = self.factors[name][1]
        return bias.detach()[None] if s is None else bias.detach() * s

    def gradients(self, name: str, dw_EKKIO: Tensor, dy_EBHWC: Tensor) -> dict[int, Tensor]:
        module = self.modules[name]
        r, s = self.factors[name]
        dweight, dr, ds = self.operations.member_weights_gradient(dw_EKKIO, module.weight.detach(), r, s)
        gradients = {id(module.weight): dweight}
        if module.bias is not None:
            db_EC = _over_pixels(dy_EBHWC)
            gradients[id(module.bias)] = db_EC.sum(0) if s is None else (s * db_EC).sum(0)
            ds = None if ds is None else ds + module.bias.detach() * db_EC
        if dr is not None and ds is not None:
            gradients[id(module.rho_r)] = dr
            gradients[id(module.rho_s)] = ds
        return gradients


class OwnParameters(MemberParameters):
    """Weights (E, CO, CI, k, k) or (E, CO, CI), biases (E, CO).

    Neither weights nor gradients are rearranged where the weights lie in memory as the convolutions read them, CO
    fastest (`as_read`): in fp32 nothing is copied, in bf16 a cast is all.
    """

    own_norms = True

    def weights(self, name: str) -> Tensor:
        weight = self.modules[name].weight.detach()
        w_EOIKK = weight if weight.ndim == 5 else weight[..., None, None]
        return w_EOIKK.permute(0, 3, 4, 2, 1).to(self.dtype).contiguous()

    def bias(self, name: str) -> Tensor | None:
        bias = self.modules[name].bias
        return None if bias is None else bias.detach()

    def gradients(self, name: str, dw_EKKIO: Tensor, dy_EBHWC: Tensor) -> dict[int, Tensor]:
        module = self.modules[name]
        gradients = {id(module.weight): dw_EKKIO.permute(0, 4, 3, 1, 2).view_as(module.weight)}
        if module.bias is not None:
            gradients[id(module.bias)] = _over_pixels(dy_EBHWC)
        return gradients


def as_read(stack: Tensor) -> Tensor:
    """A stack (E, …) in the memory order of the convolutions: CO fastest, where it is of weights."""
    if stack.ndim not in (3, 5):
        return stack
    taps = range(3, stack.ndim)
    return stack.permute(0, *taps, 2, 1).contiguous().permute(0, -1, -2, *(axis - 2 for axis in taps))


def _over_pixels(dy_EBHWC: Tensor) -> Tensor:
    """Sum over each member's images and pixels, (E, C), at least fp32."""
    return dy_EBHWC.sum((1, 2, 3), dtype=torch.promote_types(dy_EBHWC.dtype, torch.float32))

"""Weights of the members for one training pass, made of the layers' parameters, and the way back for the gradients.

`SharedParameters`: one network, whose weights the members share up to rank-one factors: a BatchEnsemble student, or a
plain network, the case of one member without factors. `OwnParameters`: a network a member, all of one structure, their
parameters stacked. `SeparateParameters`: the same, but each network has its parameters to itself. Any is made anew for
a forward and serves it and its backward: weights of all layers in one launch before it, gradients of all parameters in
two behind it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.engine.operations import Operations
from ensdistill.kernels.weights.gradient import GradientParts, member_weights_gradient
from ensdistill.kernels.weights.layout import Layer, Network, NormVectors, Tables
from ensdistill.kernels.weights.member_weights import WeightSlots, member_weights


def layer_of(module: Any, norm: Any = None, second: Any = None) -> Layer:
    """Describe a convolution or linear layer, of a student or plain, with the norms behind it that are to be folded."""
    rhos = getattr(module, "rho_r", None), getattr(module, "rho_s", None)
    return Layer(module.weight, *rhos, module.bias, _vectors(norm), _vectors(second))


def _vectors(norm: Any) -> NormVectors | None:
    return None if norm is None else NormVectors(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


class MemberParameters(ABC):
    """Weights, biases and norms of E members, by the layer's name, and then the gradients of the parameters.

    `weighted`: every convolution and the linear layer, `norms`: every norm, each of the one network, or of each of E.
    `tables`: of the caller, who keeps them for later passes.
    """

    own_norms: bool
    """True where every member has norms of its own: γ, β and running statistics (E, C), statistics of its own rows."""

    def __init__(
        self,
        weighted: Sequence[Mapping[str, nn.Module]],
        norms: Sequence[Mapping[str, nn.Module]],
        E: int,
        *,
        dtype: torch.dtype,
        operations: Operations,
        tables: Tables,
    ) -> None:
        self.weighted, self.norms = weighted, norms
        self.E, self.operations, self.tables = E, operations, tables
        self.index = {name: i for i, name in enumerate(weighted[0])}
        self.networks = self._networks()
        self.members = E // len(self.networks)
        self.slots = WeightSlots(self.networks[0], E, dtype=dtype)
        operations(member_weights)(self.slots, self.networks, E=self.members, tables=tables)
        self.parts: GradientParts | None = None
        self._gradients: dict[int, Tensor] = {}
        self._own: list[Tensor] = []
        self._updated: list[Tensor] = []
        """Copies of the running statistics `_own`."""

    @abstractmethod
    def _networks(self) -> Sequence[Network]:
        """Describe each network's layers, of whose parameters the weights are made."""

    def norm(self, name: str) -> NormVectors:
        """Vectors of the norm `name`, running statistics to be updated in place: (C,), or (E, C) with `own_norms`."""
        norm: Any = self.norms[0][name]
        gamma, beta = norm.weight.detach(), norm.bias.detach()
        return NormVectors(gamma, beta, norm.running_mean, norm.running_var, norm.eps)

    def keep_statistics(self) -> None:
        """Have the norms keep the running statistics that a forward has updated, where `norm` gives copies."""
        if self._own:
            torch._foreach_copy_(self._own, self._updated)

    def weights(self, name: str) -> Tensor:
        """Weights (E, k, k, CI, CO) of the layer `name`."""
        return self.slots.weights[self.index[name]]

    def bias(self, name: str) -> Tensor | None:
        """Bias (E, CO) of the layer `name`."""
        return self.slots.bias[self.index[name]]

    def expect_gradients(self, splits: Mapping[str, int]) -> None:
        """Make room for the gradients of the members' weights, each in as many parts as `splits` says."""
        in_order = [splits[name] for name in self.index]
        self.parts = GradientParts(self.networks[0], self.E, in_order, dtype=self.slots.vectors.dtype)

    def gradient_parts(self, name: str) -> Tensor:
        """Buffer (splits, E, k, k, CI, CO) for the gradient of the layer's weights."""
        assert self.parts is not None
        return self.parts.weights[self.index[name]]

    def give_output_gradient(self, name: str, dy_EBHWC: Tensor) -> None:
        """Take a bias's share of the gradient of the layer's output."""
        assert self.parts is not None
        if (db_EC := self.parts.bias[self.index[name]]) is not None:
            torch.sum(dy_EBHWC, (1, 2, 3), dtype=db_EC.dtype, out=db_EC)

    def give_norm_gradient(self, name: str, dgamma: Tensor, dbeta: Tensor) -> None:
        """Take the gradients of a norm's γ and β."""
        self._give(self.norms, name, {"weight": dgamma, "bias": dbeta})

    def gradients(self) -> dict[int, Tensor]:
        """Compute the parameters' gradients by their ids, once all layers' have come."""
        assert self.parts is not None
        found = self.operations(member_weights_gradient)(self.parts, self.networks, E=self.members, tables=self.tables)
        self.parts = None
        for name, gradients in zip(self.index, found, strict=True):
            self._give(self.weighted, name, gradients._asdict())
        return self._gradients

    def _give(self, modules: Sequence[Mapping[str, Any]], name: str, found: Mapping[str, Tensor | None]) -> None:
        for parameter, gradient in found.items():
            if gradient is not None:
                rows = [gradient] if len(modules) == 1 else gradient.unbind()
                for of_one, row in zip(modules, rows, strict=True):
                    self._gradients[id(getattr(of_one[name], parameter))] = row


class SharedParameters(MemberParameters):
    """Weights W ∘ r sᵀ of one network; the members share its norms."""

    own_norms = False

    def _networks(self) -> Sequence[Network]:
        return [[layer_of(module) for module in self.weighted[0].values()]]


class OwnParameters(MemberParameters):
    """Stacked weights (E, CO, CI, k, k) or (E, CO, CI) and biases (E, CO): a network each.

    Accesses are fast where the weights lie in memory as the convolutions read them, CO fastest (`as_read`), and where
    they lie as a network's do.
    """

    own_norms = True

    def _networks(self) -> Sequence[Network]:
        modules: Any = self.weighted[0].values()
        stacks = [(m.weight.unbind(), m.bias.unbind() if m.bias is not None else None) for m in modules]
        return [[Layer(w[e], bias=b and b[e]) for w, b in stacks] for e in range(self.E)]


class SeparateParameters(MemberParameters):
    """Weights and norms of E networks, each with parameters of its own in memory of its own.

    Kernels find weights by their addresses; the norms' vectors, kilobytes, are copied together.
    """

    own_norms = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._stacks: dict[str, NormVectors] = {}
        """Copies (E, C) of the norms' vectors."""
        of_all: dict[str, list[Any]] = {name: [norms[name] for norms in self.norms] for name in self.norms[0]}
        names = ("weight", "bias", "running_mean", "running_var")
        vectors = [getattr(norm, vector).detach() for norms in of_all.values() for vector in names for norm in norms]
        flat = torch.cat(vectors) if vectors else torch.empty(0)
        for name, norms in of_all.items():
            size = len(names) * self.E * norms[0].num_features
            gamma, beta, mean, var = flat[:size].view(len(names), self.E, -1).unbind()
            flat = flat[size:]
            self._stacks[name] = NormVectors(gamma, beta, mean, var, norms[0].eps)
            self._own += [vector for norm in norms for vector in (norm.running_mean, norm.running_var)]
            self._updated += [vector for e in range(self.E) for vector in (mean[e], var[e])]

    def _networks(self) -> Sequence[Network]:
        return [[layer_of(module) for module in modules.values()] for modules in self.weighted]

    def norm(self, name: str) -> NormVectors:
        return self._stacks[name]


def as_read(stack: Tensor) -> Tensor:
    """Copy a stack (E, …) of weights into the memory order of the convolutions, CO fastest; others stay as they are."""
    if stack.ndim not in (3, 5):
        return stack
    taps = range(3, stack.ndim)
    return stack.permute(0, *taps, 2, 1).contiguous().permute(0, -1, -2, *(axis - 2 for axis in taps))

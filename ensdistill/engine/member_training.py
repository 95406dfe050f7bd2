"""Training of all members over member-batched kernels, as one autograd function.

What is known of a network before it runs is here; a forward and its backward are in member_run.py. Weights and norms
(member_parameters.py) are those of a student, of which a plain network is the case of one member without factors, or
those of E networks that train beside each other (`stacked`, or each by itself).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.engine.member_parameters import (
    MemberParameters,
    OwnParameters,
    SeparateParameters,
    SharedParameters,
)
from ensdistill.engine.member_run import MemberRun
from ensdistill.engine.operations import Operations, Reader
from ensdistill.engine.structure import (
    Conv,
    MaxPool,
    Norm,
    NotExpressible,
    Structure,
    cut,
    only_convolutions_read,
    readers,
    shape_of,
    structure_of,
)
from ensdistill.kernels.norm.max_pool import pooled
from ensdistill.kernels.weights.layout import Tables
from ensdistill.runtime.streams import SideStream


class MemberTraining:
    """Training passes of `network`, whose parameters and running statistics it uses in place.

    `stacked`: they have a leading axis of E members, which share nothing; else `network` is a student of E members. Or
    it is E networks of one structure. `structure`: what `structure_of` gives for it, or a stretch of that. `trunk`: the
    passes of the stretch before, of one member, whose result all members are given.

    A norm with a ReLU and no residual is applied where the next convolutions load its tile, or in a pass of its own:
    `operations` says which for each. The last one is always applied by the pool, and one that a max-pool alone reads by
    that.

    Raises:
        NotExpressible: the network has no such form.
    """

    def __init__(
        self,
        network: nn.Module | Sequence[nn.Module],
        E: int,
        *,
        dtype: torch.dtype,
        operations: Operations,
        stacked: bool = False,
        structure: Structure | None = None,
        trunk: MemberTraining | None = None,
    ) -> None:
        networks = [network] if isinstance(network, nn.Module) else network
        self.E, self.dtype, self.operations, self.trunk = E, dtype, operations, trunk
        several = SeparateParameters if len(networks) > 1 else SharedParameters
        self.kind: type[MemberParameters] = OwnParameters if stacked else several
        """Whose the parameters are."""
        self.exact = torch.promote_types(dtype, torch.float32)
        self.side = SideStream(next(networks[0].parameters()).device)
        self.structure = structure_of(networks[0]) if structure is None else structure
        self.folded_norms: frozenset[str] | None = None
        """Names of the norms that convolutions apply; chosen by the first forward."""
        layers, linear = self.structure.layers, self.structure.linear
        self.readers = readers(layers, self.structure.features)
        self.pools = [layer for layer in layers if isinstance(layer, MaxPool)]
        self.norms = [layer for layer in layers if isinstance(layer, Norm)]
        weighted = [layer.name for layer in layers if isinstance(layer, Conv)] + ([] if linear is None else [linear])
        self.weighted = [{name: one.get_submodule(name) for name in weighted} for one in networks]
        self.normalising = [{layer.name: one.get_submodule(layer.name) for layer in self.norms} for one in networks]
        self.modules: dict[str, Any] = self.weighted[0] | self.normalising[0]
        """Modules of the first network, by name."""
        modules: list[Any] = [m for of_one in (*self.weighted, *self.normalising) for m in of_one.values()]
        self.parameters: list[nn.Parameter] = [] if trunk is None else list(trunk.parameters)
        self.parameters += [parameter for module in modules for parameter in module.parameters()]
        if len({id(parameter) for parameter in self.parameters}) < len(self.parameters):
            raise NotExpressible(f"{type(networks[0]).__name__}: two layers have one parameter")
        norms: list[Any] = [norm for of_one in self.normalising for norm in of_one.values()]
        self.counters = [norm.num_batches_tracked for norm in norms]
        self.tables: Tables = {}
        self.splits: dict[tuple[torch.Size, torch.device], dict[str, int]] = {}
        """Parts of each layer's weight gradient, by shape and device of the images."""
        self.norm_to = {layer.target: layer for layer in self.norms}
        self.summed = {layer.source for layer in self.norms}
        """Values of which norms want the sums."""
        given = self.structure.given
        self.shares_given = only_convolutions_read(given, layers, self.structure.features)
        """True where the members read the one value that a trunk hands over; else each has a copy."""
        if trunk is not None and given in self.summed:
            trunk.summed.add(given)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (E, B, K) fp32 of normalised images (B, H, W, C), all members', or (E, B, H, W, C), each one's own.

        They are differentiable in the parameters. Running statistics advance.
        """
        return _Train.apply(self, x, *self.parameters)

    def member_parameters(self) -> MemberParameters:
        """Make the weights that one forward and its backward read, of the parameters as they are now."""
        how: dict[str, Any] = {"dtype": self.dtype, "operations": self.operations, "tables": self.tables}
        return self.kind(self.weighted, self.normalising, self.E, **how)

    def is_folded(self, norm: Norm) -> bool:
        """Say whether the convolutions (or the pool, or the max-pool) that read `norm` apply it."""
        if not self._can_fold(norm):
            return False
        assert self.folded_norms is not None
        by_pool = norm.target == self.structure.features or self._is_max_pooled(norm)
        return by_pool or norm.name in self.folded_norms

    def _is_max_pooled(self, norm: Norm) -> bool:
        return any(pool.source == norm.target for pool in self.pools)

    def choose_folded(self, x: Tensor) -> None:
        """Choose the norms that convolutions apply, if that has not been done, for given values like `x`."""
        if self.folded_norms is None:
            self.folded_norms = self._choose_folded(x)

    def _can_fold(self, norm: Norm) -> bool:
        if norm.residual is not None or not norm.relu or any(x.residual == norm.target for x in self.structure.layers):
            return False
        if norm.target == self.structure.features and self.structure.linear is None:  # what is handed over is stored
            return False
        # a pool folds what it alone reads
        pools = norm.target == self.structure.features or self._is_max_pooled(norm)
        return not pools or self.readers[norm.target] == 1

    def _choose_folded(self, x: Tensor) -> frozenset[str]:
        """Ask `operations` about every norm that can be folded, with tensors that have shapes alone."""
        sizes = {self.structure.given: (x.shape[-3], x.shape[-2])}

        def value(number: int, C: int) -> Tensor:
            return torch.empty(self.E, x.shape[-4], *sizes[number], C, dtype=self.dtype, device="meta")

        loaders: dict[int, list[Reader]] = {}
        for layer in self.structure.layers:
            H, W = sizes[layer.source]
            if isinstance(layer, Norm):
                sizes[layer.target] = H, W
                continue
            if isinstance(layer, MaxPool):
                sizes[layer.target] = pooled(H), pooled(W)
                continue
            sizes[layer.target] = -(-H // layer.stride), -(-W // layer.stride)
            conv: Any = self.modules[layer.name]
            CO, CI = conv.out_channels, conv.in_channels
            dy = value(layer.target, CO)
            vector = torch.empty(self.E, CO, device="meta")
            options: dict[str, Any] = {
                "stride": layer.stride,
                "bias": None if conv.bias is None else vector,
                "residual": None if layer.residual is None else dy,
                "sums": layer.target in self.summed,
            }
            w_EKKIO = torch.empty(self.E, layer.kernel, layer.kernel, CI, CO, dtype=self.dtype, device="meta")
            loaders.setdefault(layer.source, []).append(Reader(w_EKKIO, dy, options))
        return frozenset(
            norm.name
            for norm in self.norm_to.values()
            if norm.target in loaders
            and self._can_fold(norm)
            and self.operations.folds_norm(
                value(norm.target, loaders[norm.target][0].w_EKKIO.shape[3]), loaders[norm.target], x.device
            )
        )


def trunk_and_heads(networks: Sequence[nn.Module], **how: Any) -> MemberTraining:
    """Training passes of heads behind a trunk; `how` as in `MemberTraining`.

    Args:
        networks: for each head the trunk, one and the same, and the head, in an `nn.Sequential`.

    Raises:
        NotExpressible: they have no such form, or the heads differ.
    """
    structures = [structure_of(network) for network in networks]
    shapes = [shape_of(*of_one) for of_one in zip(networks, structures, strict=True)]
    # gradients of all heads come as one stack
    strides = [[parameter.stride() for parameter in network.parameters()] for network in networks]
    if any(each != alike[0] for alike in (shapes, strides) for each in alike):
        raise NotExpressible("its heads differ")
    first, heads = cut(structures[0], "0.", "1.")
    trunk = MemberTraining(networks[0], 1, structure=first, **how)
    return MemberTraining(networks, len(networks), structure=heads, trunk=trunk, **how)


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, training: MemberTraining, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = MemberRun(training)
        return ctx.run.forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        run, ctx.run = ctx.run, None
        assert run is not None, "a training forward can be gone back through once"
        gradients = run.backward(grads[0])
        return None, None, *(gradients.get(id(parameter)) for parameter in run.training.parameters)

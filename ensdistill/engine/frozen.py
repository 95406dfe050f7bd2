"""Frozen networks of one structure, run together: logits, and the gradient of the images.

Each network has a slot; a launch runs any members of the slots, named by a device tensor, as one member-batched pass.
Every norm is folded into the weights of the convolution before it or is its second output relu(a·y + b), which is
stored, or applied where the next convolution loads y. The forward keeps one bit an activation for the members whose
image gradient is wanted, of a max-pool's outputs a byte, and nothing else. In F: a forward of one member is 1 F, its
input gradient 1 F.

Slots take plain networks (teachers) and the members of a BatchEnsemble student in evaluation mode, whose rank-one
factors fold in with the norms: W_m = W ∘ r_m (s_m ∘ a)ᵀ. Or they take heads behind a trunk, which has one slot and runs
once for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.engine.member_parameters import layer_of
from ensdistill.engine.operations import Call, Operations
from ensdistill.engine.reverse import Reverse
from ensdistill.engine.structure import FrozenConv, MaxPool, Structure, frozen_layers, only_convolutions_read, readers
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.norm.max_pool import max_pool, pooled
from ensdistill.kernels.norm.pool import global_pool
from ensdistill.kernels.weights.layout import Network, Tables
from ensdistill.kernels.weights.member_weights import WeightSlots, member_weights


@dataclass(kw_only=True)
class Kept:
    """The activations' bits and sizes that the input gradient of a forward's first members needs."""

    bits: dict[int, Tensor] = field(default_factory=dict)
    """ReLU bits by the value that the ReLU wrote."""
    positions: dict[int, Tensor] = field(default_factory=dict)
    """Places of the maxima by the value that a max-pool wrote."""
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Height and width (H, W) of every value."""
    is_shared: bool = True
    """True where all members read the same images."""
    trunk: Kept | None = None
    """What the trunk's input gradient needs."""
    handed: Tensor | None = None
    """What the trunk handed over (1, B, H, W, C), where norms read it: the mask of their ReLUs is taken of it."""


class FrozenNetworks:
    """Slots for networks of one structure; a pass runs any of them together.

    `forward` and `input_gradient` allocate what they return and launch, nothing else.
    """

    def __init__(
        self,
        network: nn.Module,
        slots: int,
        *,
        structure: Structure,
        dtype: torch.dtype,
        operations: Operations,
        trunk: FrozenNetworks | None = None,
    ) -> None:
        """Make room for networks that have the structure and the channels of `network`; slots are empty until `load`.

        Args:
            structure: what `structure_of` gives for `network`, or a stretch of that.
            trunk: the stretch before, of one slot, whose result all slots are given.

        Raises:
            NotExpressible: the network has no form in evaluation mode.
        """
        self.structure = structure
        self.layers = frozen_layers(structure)
        self._convs = [layer for layer in self.layers if isinstance(layer, FrozenConv)]
        self.operations, self.dtype, self.slots, self.trunk = operations, dtype, slots, trunk
        self.exact = torch.promote_types(dtype, torch.float32)
        """Type of biases, scales, logits and image gradients."""
        self._readers = readers(self.layers, structure.features)
        self._shares_given = only_convolutions_read(structure.given, self.layers, structure.features)
        self._entries: dict[str, Any] = {}
        """Layers for the vectors of the entries alone: no convolution before them could bring those along."""
        for norm in structure.entries:
            gamma: Any = network.get_submodule(norm.name).weight
            self._entries[norm.name] = SimpleNamespace(weight=gamma.detach().new_zeros(len(gamma), 1), bias=None)
        self._writers: dict[int, FrozenConv] = {}
        for conv in self._convs:
            self._writers |= {value: conv for value in (conv.target, conv.second_target) if value is not None}
        self._folded: dict[Any, frozenset[str]] = {}
        """Names of the convolutions with a folded second output, by the shapes of a pass."""
        self._slots = WeightSlots(self._network(network), slots, dtype=dtype)
        self._tables: Tables = {}
        linear = [] if structure.linear is None else [structure.linear]
        names = [*(layer.conv for layer in self._convs), *self._entries, *linear]
        self.weights = dict(zip(names, self._slots.weights, strict=True))
        """Folded weights (slots, k, k, CI, CO) by the name of the layer."""
        self.bias = dict(zip(names, self._slots.bias, strict=True))
        """Folded biases (slots, CO) by the name of the layer; None without."""
        self.second = dict(zip(names, self._slots.second, strict=True))
        """Vectors a and b of the second output, (slots, CO) each, by the name of the layer; an entry's by its own."""

    def _network(self, network: nn.Module) -> Network:
        """The layers in order, each with the norms that fold into it, the entries and the linear layer."""

        def module(name: str | None) -> nn.Module | None:
            return None if name is None else network.get_submodule(name)

        folded = [layer_of(module(layer.conv), module(layer.norm), module(layer.second)) for layer in self._convs]
        entries = [layer_of(blank, second=module(name)) for name, blank in self._entries.items()]
        linear = module(self.structure.linear)
        return [*folded, *entries, *([] if linear is None else [layer_of(linear)])]

    @torch.no_grad()
    def load(self, network: nn.Module | Sequence[nn.Module], first: int) -> int:
        """Fold `network` into the slots from `first` on: one slot for a plain network, E for a BatchEnsemble student.

        Of several networks, all plain, each has a slot; the trunk, if there is one, is the first one's.

        Returns: the slot after the last one written.
        """
        networks = [network] if isinstance(network, nn.Module) else network
        if self.trunk is not None:
            self.trunk.load(networks[0], 0)
        layers = [self._network(one) for one in networks]
        E = max((len(layer.rho_r) for layer in layers[0] if layer.rho_r is not None), default=1)
        self.operations(member_weights)(self._slots, layers, E=E, first=first, tables=self._tables)
        return first + E * len(networks)

    @torch.no_grad()
    def forward(self, x: Tensor, members: Tensor | None = None, bits: int = 0) -> tuple[Tensor, Kept]:
        """Compute the logits (M, B, K) fp32 of the slots that `members` (M,) names, of all by default.

        Args:
            x: normalised images, (B, H, W, C) if all members read the same, else (M, B, H, W, C).
            bits: the number of members, from the first on, whose input gradient will be asked for.
        """
        assert self.structure.linear is not None
        features, kept = self._run_layers(x, members, bits)
        f_MBC = self.operations(global_pool)(features, out_dtype=self.dtype)
        out = self.operations(member_conv)(
            f_MBC[:, :, None, None, :],
            self.weights[self.structure.linear],
            members=members,
            bias=self.bias[self.structure.linear],
            out_dtype=self.exact,
        )
        assert out.y is not None
        return out.y[:, :, 0, 0, :], kept

    def _run_layers(self, x: Tensor, members: Tensor | None, bits: int) -> tuple[Tensor, Kept]:
        """Compute the features (M, B, H, W, C)."""
        kept, given = Kept(is_shared=x.ndim == 4), self.structure.given
        if self.trunk is not None:
            handed_1BHWC, kept.trunk = self.trunk._run_layers(x, None, min(bits, 1))
            kept.handed = handed_1BHWC if bits and self._entries else None
            M = self.slots if members is None else len(members)
            x = handed_1BHWC[0] if self._shares_given else handed_1BHWC.expand(M, -1, -1, -1, -1).contiguous()
        values = {given: x.to(self.dtype)}
        # by the value of a second output that is not stored, or of an entry: a and b of the readers' prologue
        prologues = self._entry_prologues()
        values |= dict.fromkeys(prologues, values[given])
        folded = self._folded_for(x, members, bits)
        kept.sizes = dict.fromkeys(values, (x.shape[-3], x.shape[-2]))
        waiting = self._readers.copy()

        def read(value: int) -> Tensor:
            waiting[value] -= 1
            return values[value] if waiting[value] else values.pop(value)

        for layer in self.layers:
            if isinstance(layer, MaxPool):
                y, positions = self.operations(max_pool)(read(layer.source), positions=bits)
                values[layer.target], kept.sizes[layer.target] = y, (y.shape[2], y.shape[3])
                if positions is not None:
                    kept.positions[layer.target] = positions
                continue
            second = self.second[layer.conv]
            is_folded = second is not None and layer.conv in folded
            packed = bits if layer.relu or second is not None else 0
            out = self.operations(member_conv)(
                read(layer.source),
                self.weights[layer.conv],
                stride=layer.stride,
                members=members,
                prologue=prologues.get(layer.source),
                bias=self.bias[layer.conv],
                residual=None if layer.residual is None else read(layer.residual),
                relu=layer.relu,
                second=None if is_folded and not packed else second,
                keep_y=layer.is_read,
                keep_z=not is_folded,
                bits=packed,
            )
            ends_in_relu = layer.target if layer.second_target is None else layer.second_target
            if out.bits is not None:
                kept.bits[ends_in_relu] = out.bits
            if is_folded and layer.second_target is not None and second is not None:
                prologues[layer.second_target] = second
            for value, tensor in ((layer.target, out.y), (layer.second_target, out.y if is_folded else out.z)):
                if value is not None and tensor is not None:
                    values[value] = tensor
                    kept.sizes[value] = (tensor.shape[2], tensor.shape[3])
        return read(self.structure.features), kept

    def _entry_prologues(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Vectors a and b of the entries by their values, which convolutions apply where they load the given one."""
        vectors = {norm.target: self.second[norm.name] for norm in self.structure.entries}
        return {value: second for value, second in vectors.items() if second is not None}

    def _folded_for(self, x: Tensor, members: Tensor | None, bits: int) -> frozenset[str]:
        """Name the convolutions whose second output is applied by its readers: `operations` decides, once a shape.

        It can be where y is stored too, for a residual: the readers then read y in its place.
        """
        key = (tuple(x.shape), None if members is None else len(members), bits)
        if key not in self._folded:
            M = self.slots if members is None else len(members)
            self._folded[key] = frozenset(self._choose_folded(x, M, members, bits))
        return self._folded[key]

    def _choose_folded(self, x: Tensor, M: int, members: Tensor | None, bits: int) -> Iterator[str]:
        prologues = self._entry_prologues()
        given = torch.empty(x.shape, dtype=self.dtype, device="meta")
        values = dict.fromkeys((self.structure.given, *prologues), given)
        calls: dict[str, Call] = {}
        for layer in self.layers:
            if isinstance(layer, MaxPool):
                _, B, H, W, C = values[layer.source].shape
                values[layer.target] = values[layer.source].new_empty(M, B, pooled(H), pooled(W), C)
                continue
            source, weight, second = values[layer.source], self.weights[layer.conv], self.second[layer.conv]
            H, W = (-(-side // layer.stride) for side in source.shape[-3:-1])
            y = torch.empty(M, source.shape[-4], H, W, weight.shape[-1], dtype=self.dtype, device="meta")
            values |= {value: y for value in (layer.target, layer.second_target) if value is not None}
            calls[layer.conv] = Call(
                source,
                weight,
                {
                    "stride": layer.stride,
                    "members": members,
                    "prologue": prologues.get(layer.source),
                    "bias": self.bias[layer.conv],
                    "residual": None if layer.residual is None else y,
                    "relu": layer.relu,
                    "second": second,
                    "keep_y": layer.is_read,
                    "bits": bits if layer.relu or second is not None else 0,
                },
            )
        for layer in self._convs:
            value, second = layer.second_target, self.second[layer.conv]
            readers = [calls[other.conv] for other in self._convs if other.source == value]
            others = value == self.structure.features or any(other.residual == value for other in self._convs)
            others = others or any(isinstance(other, MaxPool) and other.source == value for other in self.layers)
            if value is None or not layer.is_read or others:
                continue
            call = calls[layer.conv]
            without = {"keep_z": False} if call.options["bits"] else {"second": None}
            folded = [call._replace(options=call.options | without)]
            folded += [reader._replace(options=reader.options | {"prologue": second}) for reader in readers]
            if self.operations.folds_second([call, *readers], folded, x.device):
                yield layer.conv

    @torch.no_grad()
    def input_gradient(
        self, kept: Kept, dlogits_MBK: Tensor, members: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Go back from the gradient of the logits (M, B, K) to that of the normalised images.

        Args:
            members: the slots (M,) of the forward's first M members; without it M must be all slots.
            scale: fp32 (1, C): multiplies the result.

        Returns: (B, H, W, C) fp32, the sum over members, if they shared their images; else (M, B, H, W, C).
        """
        assert self.structure.linear is not None
        reverse, features = self._begin_backward(kept, members), self.structure.features
        dy = dlogits_MBK.to(self.dtype)[:, :, None, None, :]
        reverse.features(features, dy, self.weights[self.structure.linear], kept.sizes[features])
        return self._run_layers_backward(reverse, kept, members, scale)

    def _begin_backward(self, kept: Kept, members: Tensor | None) -> Reverse:
        last_share = functools.partial(self._last_share, kept)
        return Reverse(self.operations, self._readers, last_share, dtype=self.dtype, members=members)

    def _last_share(self, kept: Kept, value: int) -> tuple[int, dict[str, Any]]:
        """Go through the ReLU; a second output joins its convolution's target, an entry what was handed over."""
        given = self.structure.given
        if value == given and self.trunk is not None:
            assert kept.trunk is not None
            return self.trunk._last_share(kept.trunk, value)
        if (entry := self._entry_prologues().get(value)) is not None:
            return given, {"norm": (kept.handed, *entry), "scale": entry[0]}
        writer = self._writers.get(value)
        if writer is None:  # a max-pool
            return value, {}
        if value != writer.second_target:
            return value, {"bits": kept.bits[value]} if writer.relu else {}
        second = self.second[writer.conv]
        assert second is not None
        return writer.target, {"bits": kept.bits[value], "scale": second[0]}

    def _run_layers_backward(
        self, reverse: Reverse, kept: Kept, members: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        for layer in reversed(self.layers):
            dy = reverse.take(layer)
            if isinstance(layer, MaxPool):
                reverse.max_pool(layer, dy, kept.positions[layer.target], kept.sizes[layer.source])
                continue
            reverse.residual(layer, dy)
            if layer.source == self.structure.given and self.trunk is None:
                return self.operations(member_conv_input_gradient)(
                    dy,
                    self.weights[layer.conv],
                    size=kept.sizes[layer.source],
                    stride=layer.stride,
                    members=members,
                    shared=kept.is_shared,
                    scale=scale,
                    out_dtype=self.exact,
                )[0]
            reverse.conv(layer, dy, self.weights[layer.conv], kept.sizes[layer.source])
        assert self.trunk is not None and kept.trunk is not None, "no layer reads the images"
        ((value, dy),) = reverse.gradients.items()
        assert len(dy) == 1, "one member alone goes back through a trunk"
        before = self.trunk._begin_backward(kept.trunk, None)
        before.gradients[value] = dy
        return self.trunk._run_layers_backward(before, kept.trunk, None, scale)

"""Norms and rank-one factors of a whole network in as few launches as there are kinds of them, not layers.

A step folds the student anew each time. Layer by layer that would be some ten tiny launches a layer, hundreds a step;
here the layers' vectors lie side by side, are computed at once, and each layer gets its view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.batch_ensemble import BatchEnsembleLayer
from ensdistill.structure import FrozenConv

Factors = tuple[Tensor | None, Tensor | None]


def member_factors(modules: Mapping[str, nn.Module]) -> dict[str, Factors]:
    """(r (E, CI), s (E, CO)) of every layer that has members, contiguous; (None, None) of the others."""
    layers: dict[str, Any] = {name: m for name, m in modules.items() if isinstance(m, BatchEnsembleLayer)}
    factors: dict[str, Factors] = {name: (None, None) for name in modules}
    if layers:
        rhos = [rho.detach() for layer in layers.values() for rho in (layer.rho_r, layer.rho_s)]
        views = _views(1 + torch.cat([rho.flatten() for rho in rhos]), [rho.shape for rho in rhos])
        factors.update(dict(zip(layers, zip(views[::2], views[1::2], strict=True), strict=True)))
    return factors


def _views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]


class FoldedVectors:
    """The frozen networks' biases and second outputs, (slots, CO) each, in one buffer; and what is folded into weights.

    `bias[conv]` and `second[conv]` are views that stay where they are.
    """

    def __init__(self, network: nn.Module, layers: Sequence[FrozenConv], linear: str, slots: int, dtype: torch.dtype):
        self.layers = layers
        self.convs: dict[str, Any] = {layer.conv: network.get_submodule(layer.conv) for layer in layers}
        self.convs[linear] = network.get_submodule(linear)
        self.norm_names = [name for layer in layers for name in (layer.norm, layer.second) if name is not None]
        norms: list[Any] = [network.get_submodule(name) for name in self.norm_names]
        channels = [norm.num_features for norm in norms]
        first_of = dict(zip(self.norm_names, _starts(channels), strict=True))
        num_channels = sum(channels)
        weight = self.convs[linear].weight
        self.device = weight.device
        self.eps = torch.cat([torch.full((C,), norm.eps, dtype=dtype) for norm, C in zip(norms, channels, strict=True)])
        self.eps = self.eps.to(self.device)
        # (conv, which vector, channels, where its values start in [a, b] of all norms; None: computed by itself)
        wanted: list[tuple[str, str, int, int | None]] = []
        self.scale_from: dict[str, int] = {}
        for layer in layers:
            CO = self.convs[layer.conv].weight.shape[0]
            if layer.norm is not None:
                self.scale_from[layer.conv] = first_of[layer.norm]
            if self.convs[layer.conv].bias is not None:
                wanted.append((layer.conv, "bias", CO, None))
            elif layer.norm is not None:
                wanted.append((layer.conv, "bias", CO, num_channels + first_of[layer.norm]))
            if layer.second is not None:
                wanted.append((layer.conv, "a", CO, first_of[layer.second]))
                wanted.append((layer.conv, "b", CO, num_channels + first_of[layer.second]))
        if self.convs[linear].bias is not None:
            wanted.append((linear, "bias", self.convs[linear].weight.shape[0], None))
        sizes = [slots * CO for _, _, CO, _ in wanted]
        self.flat = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        vectors: dict[tuple[str, str], Tensor] = {}
        self.copied: list[tuple[int, int, int]] = []  # (start in flat, channels, start in [a, b])
        for (conv, which, CO, source), start in zip(wanted, _starts(sizes), strict=True):
            vectors[conv, which] = self.flat[start : start + slots * CO].view(slots, CO)
            if source is not None:
                self.copied.append((start, CO, source))
        self.bias = {conv: vectors.get((conv, "bias")) for conv in self.convs}
        self.second = {
            conv: (vectors[conv, "a"], vectors[conv, "b"]) if (conv, "a") in vectors else None for conv in self.convs
        }
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._scales: dict[tuple[str, ...], Tensor] = {}

    def load(self, network: nn.Module, first: int) -> tuple[int, dict[str, Factors]]:
        """Write the slots from `first` on.

        Returns: their number, and for each layer the (r, s) to fold into its weight. A norm that is folded is in s:
        W ∘ r (s ∘ a)ᵀ.
        """
        convs: dict[str, Any] = {name: network.get_submodule(name) for name in self.convs}
        a, b = self._affine([network.get_submodule(name) for name in self.norm_names])
        factors = member_factors(convs)
        E = max((r.shape[0] for r, _ in factors.values() if r is not None), default=1)
        if self.copied:
            targets, sources = self._copies(first, E)
            self.flat.index_copy_(0, targets, torch.cat([a, b]).index_select(0, sources))
        scaled = self._scaled(factors, a, E)
        for name, conv in convs.items():
            if conv.bias is not None:
                s = factors[name][1]
                bias = conv.bias.to(self.flat.dtype) if s is None else conv.bias * s
                if name in self.scale_from:
                    own = slice(self.scale_from[name], self.scale_from[name] + conv.weight.shape[0])
                    bias = a[own] * bias + b[own]
                target = self.bias[name]
                assert target is not None
                target[first : first + E] = bias
        return E, scaled

    def _affine(self, norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """a, b of all norms side by side: in evaluation mode a norm is a·y + b."""
        parts = [(n.weight.detach(), n.bias.detach(), n.running_mean, n.running_var) for n in norms]
        gamma, beta, mean, var = (torch.cat(vectors) for vectors in zip(*parts, strict=True))
        a = gamma * (var + self.eps).rsqrt()
        return a, beta - a * mean

    def _copies(self, first: int, E: int) -> tuple[Tensor, Tensor]:
        """Where a and b go: indices into `flat` and into [a, b]."""
        if (first, E) not in self._places:
            targets, sources = [], []
            for start, CO, source in self.copied:
                targets.append(torch.arange(start + first * CO, start + (first + E) * CO))
                sources.append(torch.arange(source, source + CO).repeat(E))
            self._places[first, E] = torch.cat(targets).to(self.device), torch.cat(sources).to(self.device)
        return self._places[first, E]

    def _scaled(self, factors: dict[str, Factors], a: Tensor, E: int) -> dict[str, Factors]:
        with_members = tuple(name for name, (_, s) in factors.items() if s is not None and name in self.scale_from)
        folded = dict(factors)
        if with_members:
            all_s = [s for name in with_members if (s := factors[name][1]) is not None]
            if with_members not in self._scales:
                places = [
                    torch.arange(self.scale_from[name], self.scale_from[name] + s.shape[1]).repeat(s.shape[0])
                    for name, s in zip(with_members, all_s, strict=True)
                ]
                self._scales[with_members] = torch.cat(places).to(self.device)
            product = torch.cat([s.flatten() for s in all_s]) * a.index_select(0, self._scales[with_members])
            for name, s in zip(with_members, _views(product, [s.shape for s in all_s]), strict=True):
                folded[name] = factors[name][0], s
        for name, start in self.scale_from.items():
            if name not in with_members:
                own = a[None, start : start + self.convs[name].weight.shape[0]]
                folded[name] = None, own.expand(E, -1).contiguous()  # no copy where E is 1
        return folded


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]

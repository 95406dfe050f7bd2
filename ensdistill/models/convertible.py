"""Which layers of a network can take a BatchEnsemble member's rank-one factors, which stay shared, what is refused.

A layer can take factors where scaling its input and output equals scaling its weight and bias:
`s ∘ layer(r ∘ x; W, b) = layer(x; W ∘ s rᵀ, b ∘ s)`. The plain conv and linear layers can; subclasses are tried out.
`ensdistill.models.batch_ensemble` lists in words what follows.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import inspect
import operator
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from ensdistill.runtime.errors import UserError, nearest

ConvertibleLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fold_factors(layer: ConvertibleLayer, r_CI: Tensor, s_CO: Tensor) -> None:
    """Set weight ← weight ∘ s rᵀ, bias ← bias ∘ s, in place; weight is (CO, CI / groups, …)."""
    weight, bias = layer.weight, layer.bias
    groups = getattr(layer, "groups", 1)
    r_CO_CI = r_CI.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    factors = (s_CO[:, None] * r_CO_CI).view(*r_CO_CI.shape, *[1] * (weight.ndim - 2))
    weight.copy_(weight.double() * factors)  # copy_ keeps type and memory format
    if bias is not None:
        bias.copy_(bias.double() * s_CO)


def _label(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} '{name}'" if name else type(module).__name__


def refuse_unsound(module: nn.Module, keep_shared: Sequence[str] = ()) -> None:
    """Raise UserError for a layer that can neither be converted nor left shared."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        wrappers = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
        if isinstance(child, wrappers) or hasattr(child, "_orig_mod"):
            raise UserError(
                f"{_label(name, child)} is scripted, compiled or data-parallel: convert the network inside, then wrap"
            )
        if any(base.__module__.startswith(("torch.ao.", "torchao.")) for base in type(child).__mro__):
            raise UserError(f"{_label(name, child)} is quantised: convert the network before it is quantised")
        for own_name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            if nn.parameter.is_lazy(parameter) or parameter.is_meta:
                raise UserError(
                    f"{_label(name, child)} has no values yet: run one batch through it or load its weights"
                )
            owners.setdefault(id(parameter), []).append((f"{name}.{own_name}".lstrip("."), child))
        if isinstance(child, CONVERTIBLE):
            weight = child._parameters.get("weight")
            if weight is None or hasattr(child, "parametrizations"):
                raise UserError(
                    f"{_label(name, child)} computes its weight (parametrized, weight or spectral norm, pruned): "
                    f"make it a plain parameter first, as torch.nn.utils.parametrize.remove_parametrizations does"
                )
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise UserError(
                    f"{_label(name, child)} has a weight of {type(weight).__name__} {weight.dtype}: "
                    f"expected a plain floating-point parameter; convert before quantising or sharding"
                )
    layers = convertible_layers(module, keep_shared).values()
    for places in owners.values():
        if len(places) > 1 and any(place in layers for _, place in places):
            raise UserError(
                f"tied weights: {' and '.join(repr(name) for name, _ in places)} are one parameter, which cannot "
                f"take factors in each place; untie them by a copy, use one module in both, or name it in keep_shared"
            )


def convertible_layers(module: nn.Module, keep_shared: Sequence[str] = ()) -> dict[str, ConvertibleLayer]:
    """Find the conv and linear layers of `module` that take factors, by name, but for the patterns in `keep_shared`."""
    shared = set(why_shared(module))
    for pattern in keep_shared:
        layers = [name for name, layer in module.named_modules() if isinstance(layer, CONVERTIBLE)]
        matches = fnmatch.filter(layers, pattern)
        if not matches:
            raise UserError(
                f"keep_shared: '{pattern}' fits no conv or linear layer of {type(module).__name__}"
                f"{nearest(pattern, layers)}: expected names such as {', '.join(map(repr, layers[:3]))}, or '*.fc1'"
            )
        shared.update(matches)
    return {n: m for n, m in module.named_modules() if isinstance(m, CONVERTIBLE) and n not in shared}


def why_shared(module: nn.Module) -> dict[str, str]:
    """Find the conv and linear layers of `module` that stay shared: {name: reason}."""
    by_parents: dict[int, str] = {}
    for name, parent in module.named_modules():
        for path in _weights_read_by(cast(Any, type(parent))):
            child = _follow(parent, path)
            if isinstance(child, nn.Module):
                by_parents[id(child)] = f"its weight is read by {_label(name, parent)} without calling it"
        if name and _takes_numbers_alone(cast(Any, type(parent))):
            for child in parent.modules():
                by_parents.setdefault(id(child), f"{_label(name, parent)} is given numbers, not images")
        attention = (m for m in parent.children() if isinstance(m, nn.MultiheadAttention) and not m.batch_first)
        if next(attention, None) is not None:
            for child in parent.modules():
                if isinstance(child, nn.Linear):
                    by_parents.setdefault(id(child), f"the batch is on the second axis in {_label(name, parent)}")
    reasons = {}
    for name, layer in module.named_modules():
        if isinstance(layer, CONVERTIBLE):
            reason = by_parents.get(id(layer)) or _why_not_foldable(layer)
            if reason:
                reasons[name] = f"{_label(name, layer)}: {reason}"
    return reasons


@functools.cache
def _takes_numbers_alone(cls: type[nn.Module]) -> bool:
    """Say whether `forward` of `cls` declares numbers and nothing else: its layers see one row, not one an image."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):  # a generated forward
        return False
    kinds = {getattr(parameter.annotation, "__name__", parameter.annotation) for parameter in parameters}
    return bool(kinds) and kinds <= {"int", "float", "bool"}


def _follow(module: nn.Module, path: str) -> Any:
    try:
        return operator.attrgetter(path)(module)
    except AttributeError:
        return None


# `self.layer.weight`, but where only its type or size is asked for.
_READS_WEIGHT = re.compile(
    r"\bself\.([\w.]+)\.weight\b(?!\.(?:dtype|device|shape|ndim|requires_grad|is_cuda|size|numel|dim)\b)"
)
_NOT_FORWARD = re.compile(r"^set_|init|reset|reparam|load|fuse(?!d)", re.IGNORECASE)


@functools.cache
def _weights_read_by(cls: type[nn.Module]) -> frozenset[str]:
    """Find each `path` such that the source of a method of `cls` reads `self.<path>.weight`, initialisation apart.

    What `nn.TransformerEncoderLayer` reads is left out: that is its fast path, which a student has switched off. A
    method without source (a generated class) is left to `check_members`.
    """
    paths: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            is_fast_path = base is nn.TransformerEncoderLayer
            if inspect.isfunction(function) and not is_fast_path and not _NOT_FORWARD.search(name):
                with suppress(OSError):
                    paths.update(_READS_WEIGHT.findall(inspect.getsource(function)))
    return frozenset(paths)


def _why_not_foldable(layer: ConvertibleLayer) -> str | None:
    """Say why scaling before and after `layer` is not scaling its weight; None where it is. Subclasses are tried."""
    if "forward" in vars(layer):
        return "its forward is replaced on the instance"
    if type(layer) in CONVERTIBLE:
        return None
    try:
        return None if _folds(layer) else "factors do not fold into its weight"
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"trying it gave {type(error).__name__}: {' '.join(str(error).split())}"


@torch.no_grad()
def _folds(layer: ConvertibleLayer) -> bool:
    """Try a copy of `layer` in float64 with random parameters: do factors folded in give what applied ones give?"""
    trial = copy.deepcopy(layer).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for parameter in trial.parameters():  # a gain or an adapter that starts at zero would hide what it does
        parameter.copy_(draw(*parameter.shape))
    weight = trial.weight
    r, s = draw(weight.shape[1] * getattr(trial, "groups", 1)), draw(weight.shape[0])
    if isinstance(trial, nn.Linear):
        x, along = draw(3, len(r)), [-1]
    else:
        sizes = zip(weight.shape[2:], cast(Any, trial.dilation), cast(Any, trial.stride), strict=True)
        x = draw(2, len(r), *(dilation * (kernel - 1) + stride + 2 for kernel, dilation, stride in sizes))
        along = [-1, *[1] * (weight.ndim - 2)]
    # `forward` and not a call: hooks are its owner's and see no trial
    expected = trial.forward(x * r.view(along)) * s.view(along)
    fold_factors(trial, r, s)
    folded = trial.forward(x)
    return folded.shape == expected.shape and torch.allclose(folded, expected, rtol=1e-6, atol=1e-9)

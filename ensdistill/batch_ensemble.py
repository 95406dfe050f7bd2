"""Turn any network into a BatchEnsemble student, and its average back into a plain network.

Every conv and linear layer keeps its weight W and bias b, which all members share, and gains two rank-one factors per
member, r over input channels and s over output channels (Wen, Tran and Ba, "BatchEnsemble", ICLR 2020):

    y_m = s_m ∘ (W * (r_m ∘ x_m) + b),    r = 1 + rho_r (E, in),    s = 1 + rho_s (E, out),    rho = 0 at the start.

The rows of an input are blockwise: rows [m·B, (m+1)·B) belong to member m. The average takes the mean of r and the mean
of s, each by itself, and folds them: W ∘ s̄ r̄ᵀ and b ∘ s̄ (Nam et al., ICML 2022, arXiv 2206.15047).

A layer is converted by giving the instance a subclass of its own class whose `forward` scales before and after the
original one. So padding, hooks, attributes and state_dict keys stay as they are (`rho_r` and `rho_s` are added), and
averaging restores the class.

What stays shared by all members, which is sound; `shared_parameters` names each with its reason:

- norms, embeddings, class and position tokens, layer scales, recurrent layers, transposed convs, raw parameters;
- a conv or linear subclass into which the factors do not fold, found by trying: weight standardisation (timm's
  `StdConv2d`, `ScaledStdConv2d`), constant padding other than zero, low-rank adapters;
- a layer whose weight another module reads instead of calling it, as far as that module's methods spell it out
  (`self.qkv.weight`): `nn.MultiheadAttention.out_proj`, the `qkv` of timm's BEiT, EVA and Swin v2;
- linear layers beside an `nn.MultiheadAttention` that has the batch on the second axis (`nn.TransformerEncoderLayer`
  unless `batch_first=True`, CLIP's blocks): their rows are tokens, not images.

What is refused by name (`UserError`): tied weights (one parameter in two layers, one of which would take factors; one
module used in several places is fine), parametrized and weight- or spectral-normed layers, quantised, lazy, scripted,
compiled and data-parallel modules, students, and networks without a layer that can take factors.

Of timm: a fused `qkv` linear takes s over its 3·dim outputs; `Mlp`, `ConvMlp`, `Conv2dSame`, `MixedConv2d`, depthwise
and grouped convs are converted, `BatchNormAct2d`, `LayerNorm2d` and `CondConv2d` (raw weights) stay shared.

What cannot be seen from outside: operations other than norms that mix images of a batch, code that moves the batch off
the first axis, weights read through a local name. `check_members` runs the student and finds them.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ensdistill.errors import UserError

CONVERTIBLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class _Swapped(nn.Module):
    """First base of the classes made here; knows the class an instance had before."""

    plain_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Such a class has no importable name: copies and pickles make it again from its two halves.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin = next(base for base in type(self).__mro__ if "plain_class" not in vars(base))
        return (_new_instance, (mixin, self.plain_class), *state)


class _Members:
    """Which members the rows of a student's input belong to: one object, held by all its layers."""

    def __init__(self) -> None:
        self.selected: Tensor | None = None  # indices (M,); None: all E in order


class BatchEnsembleLayer(_Swapped):
    """What a converted conv or linear layer does beside its own class: factors before and after its forward."""

    weight: Tensor
    rho_r: Tensor
    rho_s: Tensor
    ensemble_members: _Members

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows of `x` are blockwise by member: (M·B, in, …) for a conv, (M·B, …, in) for a linear layer.

        M is E, or the number of members that `select_members` names. Raises ValueError for other row counts.
        """
        rho_r, rho_s, selected = self.rho_r, self.rho_s, self.ensemble_members.selected
        if selected is not None:
            rho_r, rho_s = rho_r.index_select(0, selected), rho_s.index_select(0, selected)
        is_linear = isinstance(self, nn.Linear)
        M, rows = rho_r.shape[0], x.shape[0]
        if rows % M or (x.ndim < 2 if is_linear else x.ndim != self.weight.ndim):
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)} for {M} members: expected "
                f"{'(rows, …, in)' if is_linear else '(rows, in, …)'} with {M}·B rows, member by member"
            )
        axis = -1 if is_linear else 1
        x = x * _row_factors(rho_r, rows // M, axis, x)
        y = super().forward(x, *args, **kwargs)
        return y * _row_factors(rho_s, rows // M, axis, y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, members={self.rho_r.shape[0]}"


def _row_factors(rho_MC: Tensor, B: int, axis: int, like: Tensor) -> Tensor:
    """1 + rho for each of the M·B rows, in the type of `like` and with its channels on `axis`.

    One factor a row keeps the activation four-dimensional: its memory format survives, and the backward is several
    times as fast as over an (M, B, …) view. The cast comes last so that gradients are summed over rows in rho's type.
    """
    factors = (1 + rho_MC).repeat_interleave(B, dim=0).to(like.dtype)
    shape = [1] * like.ndim
    shape[0], shape[axis] = factors.shape
    return factors.view(shape)


class _SlowEncoderLayer(_Swapped):
    """An `nn.TransformerEncoderLayer` without its fast path, which reads the weights and would skip the factors."""

    activation_relu_or_gelu = property(lambda self: 0)


class _SlowEncoder(_Swapped):
    """An `nn.TransformerEncoder` that makes no nested tensors, which only the fast path of its layers can read."""

    use_nested_tensor = property(lambda self: False)


@functools.cache
def _subclass(mixin: type[_Swapped], plain: type[nn.Module]) -> type[_Swapped]:
    attributes = {"plain_class": plain, "__module__": __name__}
    return types.new_class(f"BatchEnsemble{plain.__name__}", (mixin, plain), exec_body=lambda ns: ns.update(attributes))


def _new_instance(mixin: type[_Swapped], plain: type[nn.Module]) -> nn.Module:
    cls = _subclass(mixin, plain)
    return cls.__new__(cls)


def to_batch_ensemble(module: nn.Module, members: int) -> nn.Module:
    """A BatchEnsemble student made of a copy of `module`, with `members` (E >= 1) members that all equal it.

    The student takes (E·B, …) and gives (E·B, …), blockwise by member. Its factors live where the weights live, in
    their type, and need a gradient where the weight does. Raises UserError for what the module's docstring says is
    refused.
    """
    if members < 1:
        raise UserError(f"members: got {members}, expected a whole number of at least 1")
    _refuse_unsound(module)
    if not _convertible_layers(module):
        raise UserError(
            f"{type(module).__name__} has no conv or linear layer that can take factors: "
            f"convert a network with at least one ({'; '.join(_why_shared(module).values()) or 'it has none at all'})"
        )
    try:
        student = copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{type(module).__name__} cannot be copied: {message}; drop what it has cached") from error
    shared_state = _Members()
    for layer in _convertible_layers(student).values():
        weight = layer.weight
        num_in = weight.shape[1] * getattr(layer, "groups", 1)
        for name, size in (("rho_r", num_in), ("rho_s", weight.shape[0])):
            rho = torch.zeros(members, size, dtype=weight.dtype, device=weight.device)
            layer.register_parameter(name, nn.Parameter(rho, requires_grad=weight.requires_grad))
        layer.__class__ = _subclass(BatchEnsembleLayer, type(layer))
        cast(BatchEnsembleLayer, layer).ensemble_members = shared_state
    for child in student.modules():
        for base, mixin in ((nn.TransformerEncoderLayer, _SlowEncoderLayer), (nn.TransformerEncoder, _SlowEncoder)):
            if isinstance(child, base) and any(isinstance(layer, BatchEnsembleLayer) for layer in child.modules()):
                child.__class__ = _subclass(mixin, type(child))
    return student


def average_members(student: nn.Module) -> nn.Module:
    """A plain network of the original classes: mean r and mean s, each by itself, folded into weight and bias.

    Norms are taken as they are. `student` is left alone. Raises ValueError where it is no student.
    """
    return _fold(student, lambda rho: rho.mean(dim=0))


def member_network(student: nn.Module, member: int) -> nn.Module:
    """Member `member` (0 … E − 1) as a plain network, exactly: its r and s folded into weight and bias."""
    if not 0 <= member < num_members(student):
        raise ValueError(f"member {member}: expected 0 … {num_members(student) - 1}")
    return _fold(student, lambda rho: rho[member])


@torch.no_grad()
def _fold(student: nn.Module, pick: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of `student` in its plain classes, with the factors 1 + pick(rho (E, C)) (C,) folded in float64."""
    num_members(student)
    plain = copy.deepcopy(student)
    for module in list(plain.modules()):
        if isinstance(module, BatchEnsembleLayer):
            r, s = (1 + pick(rho.double()) for rho in (module.rho_r, module.rho_s))
            _fold_factors(module, r, s)
            del module.rho_r, module.rho_s, module.ensemble_members
        if isinstance(module, _Swapped):
            module.__class__ = module.plain_class
    return plain


def _fold_factors(layer: nn.Module, r_CI: Tensor, s_CO: Tensor) -> None:
    """weight ← weight ∘ s rᵀ, bias ← bias ∘ s, in place; weight is (CO, CI / groups, …)."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    groups = getattr(layer, "groups", 1)
    r_CO_CI = r_CI.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    factors = (s_CO[:, None] * r_CO_CI).view(*r_CO_CI.shape, *[1] * (weight.ndim - 2))
    weight.copy_(weight.double() * factors)  # copy_ keeps type and memory format
    if bias is not None:
        bias.copy_(bias.double() * s_CO)


@contextmanager
def select_members(student: nn.Module, members: Sequence[int] | Tensor) -> Iterator[None]:
    """Inside, the student's input has len(members) blocks, which go through the members named, in that order.

    A tensor of indices (M,) on the student's device is used as it is, unchecked and without a synchronisation, so a
    graph captured inside follows its values. Nested uses restore. Recomputation in a backward pass (activation
    checkpointing) must happen inside too. Raises ValueError for an empty or impossible selection.
    """
    layers = _layers_of(student)
    if not isinstance(members, Tensor):
        outside = [m for m in members if not 0 <= m < num_members(student)]
        if outside or not len(members):
            raise ValueError(f"members {list(members)}: expected at least one, each of 0 … {num_members(student) - 1}")
        members = torch.tensor(list(members), device=layers[0].rho_r.device)
    if members.ndim != 1 or not len(members):
        raise ValueError(f"members of shape {tuple(members.shape)}: expected indices (M,), M >= 1")
    state = layers[0].ensemble_members
    before, state.selected = state.selected, members
    try:
        yield
    finally:
        state.selected = before


def is_batch_ensemble(module: nn.Module) -> bool:
    """Whether `module` is or holds a BatchEnsemble student."""
    return any(isinstance(layer, BatchEnsembleLayer) for layer in module.modules())


def _layers_of(student: nn.Module) -> list[BatchEnsembleLayer]:
    layers = [layer for layer in student.modules() if isinstance(layer, BatchEnsembleLayer)]
    students = len({id(layer.ensemble_members) for layer in layers})
    if students != 1:
        raise ValueError(f"{type(student).__name__} holds {students} BatchEnsemble students, expected one")
    return layers


def num_members(student: nn.Module) -> int:
    """E, the number of members that `student` has. Raises ValueError where it is no student."""
    return _layers_of(student)[0].rho_r.shape[0]


def factor_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Every rho_r (E, in) and rho_s (E, out) of `student`."""
    return [cast(nn.Parameter, rho) for layer in _layers_of(student) for rho in (layer.rho_r, layer.rho_s)]


def weight_parameters(student: nn.Module) -> list[nn.Parameter]:
    """Every parameter of `student` that is no factor: the ones a plain network has too."""
    factors = {id(rho) for rho in factor_parameters(student)}
    return [parameter for parameter in student.parameters() if id(parameter) not in factors]


def shared_parameters(student: nn.Module) -> dict[str, str]:
    """Why each parameter outside the converted layers is the same for all members: {parameter name: reason}."""
    reasons = _why_shared(student)
    return {
        f"{prefix}.{name}".lstrip("."): reasons.get(prefix, f"{type(module).__name__} has no rank-one form here")
        for prefix, module in student.named_modules()
        if not isinstance(module, BatchEnsembleLayer)
        for name, _ in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def check_members(student: nn.Module, images: Tensor) -> None:
    """Run a copy of `student` on `images` (B >= 2, …) with random factors: each member must be its plain network.

    Finds what conversion cannot see: images of a batch mixed, the batch off the first axis, weights read elsewhere.
    Evaluation mode, float32; vectors (gains, biases) are redrawn too, since one at zero would hide the layer before
    it. Costs 2E small forwards. Raises UserError that names the first layer at fault.
    """
    trial = copy.deepcopy(student).float().eval()
    _layers_of(trial)[0].ensemble_members.selected = None
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        if parameter.ndim < 2:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    drawn = {id(rho): 0.1 * torch.randn(rho.shape, generator=generator) for rho in factor_parameters(trial)}
    layers = {name: layer for name, layer in trial.named_modules() if isinstance(layer, BatchEnsembleLayer)}

    def members_agree(active: Sequence[BatchEnsembleLayer]) -> bool:
        for layer in layers.values():
            for rho in (layer.rho_r, layer.rho_s):
                rho.copy_(drawn[id(rho)]) if layer in active else rho.zero_()
        E = num_members(trial)
        together = trial(torch.cat([images.float()] * E)).chunk(E)
        apart = [member_network(trial, m)(images.float()) for m in range(E)]
        return all(
            a.shape == b.shape and bool((a - b).abs().amax() <= 1e-3 * b.abs().amax())
            for a, b in zip(together, apart, strict=False)
        )

    if members_agree(list(layers.values())):
        return
    for name, layer in layers.items():
        if not members_agree([layer]):
            raise UserError(
                f"{type(layer).plain_class.__name__} '{name}' does not act on each member by itself: rows of its input "
                f"are not images, or its weight is read elsewhere; rewrite that part or use a student without members"
            )
    raise UserError(
        f"the members of {type(student).__name__} do not act by themselves: it mixes the images of a batch; "
        f"rewrite that part or use a student without members"
    )


# What can be converted, what stays shared, what is refused.


def _label(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} '{name}'" if name else type(module).__name__


def _refuse_unsound(module: nn.Module) -> None:
    """Raise UserError for what can neither be converted nor left shared."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        wrappers = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
        if isinstance(child, _Swapped):
            raise UserError(f"{_label(name, child)} is a BatchEnsemble layer already: convert the plain network")
        if isinstance(child, wrappers) or hasattr(child, "_orig_mod"):
            raise UserError(
                f"{_label(name, child)} is scripted, compiled or data-parallel: convert the network inside, then wrap"
            )
        if any(base.__module__.startswith(("torch.ao.", "torchao.")) for base in type(child).__mro__):
            raise UserError(f"{_label(name, child)} is quantised: convert the network before it is quantised")
        for own_name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            if nn.parameter.is_lazy(parameter) or parameter.is_meta:
                raise UserError(f"{_label(name, child)} has no values yet: run one batch through it or load its weights")
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
    layers = _convertible_layers(module).values()
    for places in owners.values():
        if len(places) > 1 and any(place in layers for _, place in places):
            raise UserError(
                f"tied weights: {' and '.join(repr(name) for name, _ in places)} are one parameter, which has no average "
                f"of its own in each; untie them by a copy, or use one module in both places"
            )


def _convertible_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The conv and linear layers of `module` that take factors, by name."""
    shared = _why_shared(module)
    return {n: m for n, m in module.named_modules() if isinstance(m, CONVERTIBLE) and n not in shared}


def _why_shared(module: nn.Module) -> dict[str, str]:
    """The conv and linear layers of `module` that stay shared: {name: reason}; converted ones are not looked at."""
    by_parents: dict[int, str] = {}
    for name, parent in module.named_modules():
        for path in _weights_read_by(type(parent)):
            child = _follow(parent, path)
            if isinstance(child, nn.Module):
                by_parents[id(child)] = f"its weight is read by {_label(name, parent)} without calling it"
        attention = (m for m in parent.children() if isinstance(m, nn.MultiheadAttention) and not m.batch_first)
        if next(attention, None) is not None:
            for child in parent.modules():
                if isinstance(child, nn.Linear):
                    by_parents.setdefault(id(child), f"the batch is on the second axis in {_label(name, parent)}")
    reasons = {}
    for name, layer in module.named_modules():
        if isinstance(layer, CONVERTIBLE) and not isinstance(layer, BatchEnsembleLayer):
            reason = by_parents.get(id(layer)) or _why_not_foldable(layer)
            if reason:
                reasons[name] = f"{_label(name, layer)}: {reason}"
    return reasons


def _follow(module: nn.Module, path: str) -> Any:
    try:
        return operator.attrgetter(path)(module)
    except AttributeError:
        return None


_HARMLESS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "size", "numel", "dim"}
_NOT_FORWARD = ("init", "reset", "fuse", "reparam", "load")


@functools.cache
def _weights_read_by(cls: type[nn.Module]) -> frozenset[str]:
    """The `path`s such that a method of `cls` says `self.<path>.weight`, other than to initialise or ask for its type.

    Read from the bytecode, which is there for generated classes too. What `nn.TransformerEncoderLayer` reads is left
    out: that is its fast path, which a student has switched off.
    """
    paths: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            named_otherwise = any(word in name.lower() for word in _NOT_FORWARD)
            if inspect.isfunction(function) and base is not nn.TransformerEncoderLayer and not named_otherwise:
                paths.update(_weight_paths(function.__code__))
    return frozenset(paths)


def _weight_paths(code: types.CodeType) -> Iterator[str]:
    chain: list[str] | None = None  # attributes followed so far from `self`; None outside such a chain
    for instruction in dis.get_instructions(code):
        is_attribute = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if chain and len(chain) > 1 and chain[-1] == "weight":
            if not (is_attribute and instruction.argval in _HARMLESS):
                yield ".".join(chain[:-1])
            chain = None
        if is_attribute and chain is not None:
            chain.append(instruction.argval)
        elif instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            last = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
            chain = [] if last == "self" else None
        else:
            chain = None
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _weight_paths(constant)


def _why_not_foldable(layer: nn.Module) -> str | None:
    """None where scaling before and after `layer` equals scaling its weight; else why not. Subclasses are tried out."""
    if "forward" in vars(layer):
        return "its forward is replaced on the instance"
    if type(layer) in CONVERTIBLE:
        return None
    trial = copy.deepcopy(layer).to("cpu", torch.float64).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = cast(Tensor, trial.weight)
    for parameter in trial.parameters():  # a gain or an adapter that starts at zero would hide what it does
        parameter.copy_(draw(*parameter.shape))
    r, s = draw(weight.shape[1] * getattr(trial, "groups", 1)), draw(weight.shape[0])
    if isinstance(trial, nn.Linear):
        x = draw(3, len(r))
    else:
        sizes = zip(weight.shape[2:], cast(Any, trial.dilation), cast(Any, trial.stride), strict=True)
        x = draw(2, len(r), *(dilation * (kernel - 1) + stride + 2 for kernel, dilation, stride in sizes))
    along = (-1,) if isinstance(trial, nn.Linear) else (-1, *[1] * (weight.ndim - 2))
    try:
        expected = trial.forward(x * r.view(along)) * s.view(along)
        _fold_factors(trial, r, s)
        folded = trial.forward(x)
        if folded.shape == expected.shape and torch.allclose(folded, expected, rtol=1e-6, atol=1e-9):
            return None
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        return f"trying it gave {type(error).__name__}: {' '.join(str(error).split())}"
    return "factors do not fold into its weight"

"""Turn any network into a BatchEnsemble student, and its average back into a plain network.

Every conv and linear layer keeps its weight W and bias b, which all members share, and gains two rank-one factors per
member, r over input channels and s over output channels (Wen, Tran and Ba, "BatchEnsemble", ICLR 2020):

    y_m = s_m ∘ (W * (r_m ∘ x_m) + b),    r = 1 + rho_r (E, in),    s = 1 + rho_s (E, out),    rho = 0 at the start.

The rows of an input are blockwise: rows [m·B, (m+1)·B) belong to member m. The average takes the mean of r and the mean
of s, each by itself, and folds them: W ∘ s̄ r̄ᵀ and b ∘ s̄ (Nam et al., ICML 2022, arXiv 2206.15047).

A layer is converted by giving the instance a subclass of its own class whose `forward` scales before and after the
original one. So padding, hooks, attributes and state_dict keys stay as they are (`rho_r` and `rho_s` are added), and
averaging restores the class.

What stays shared by all members, which is sound (`convertible.why_shared` names layers with their reasons):

- norms, embeddings, class and position tokens, layer scales, recurrent layers, transposed convs, raw parameters;
- a conv or linear subclass into which the factors do not fold, found by trying: weight standardisation (timm's
  `StdConv2d`, `ScaledStdConv2d`), constant padding other than zero, low-rank adapters;
- a layer whose weight another module reads instead of calling it, as far as the source of that module's methods
  spells it out (`self.qkv.weight`): `nn.MultiheadAttention.out_proj`, the `qkv` of timm's BEiT, EVA and Swin v2;
- layers of a module whose `forward` declares nothing but numbers (`B: int, H: int, W: int`), as the position encoding
  of XCiT: it sees no images, and one row for all of them;
- linear layers beside an `nn.MultiheadAttention` that has the batch on the second axis (`nn.TransformerEncoderLayer`
  unless `batch_first=True`, CLIP's blocks): their rows are tokens, not images.

What is refused by name (`UserError`): tied weights (one parameter in two layers, one of which would take factors; one
module used in several places is fine), parametrized and weight- or spectral-normed layers, quantised, lazy, scripted,
compiled and data-parallel modules, students, and networks without a layer that can take factors.

Of timm: a fused `qkv` linear takes s over its 3·dim outputs; `Mlp`, `ConvMlp`, `Conv2dSame`, `MixedConv2d`, depthwise
and grouped convs are converted, `BatchNormAct2d`, `LayerNorm2d` and `CondConv2d` (raw weights) stay shared.

What cannot be seen from outside: operations other than norms that mix images of a batch, code that moves the batch off
the first axis, weights read through a local name, layers that run on something other than the images (the position bias
of Swin v2, `"*.cpb_mlp.*"`). `check_members` runs the student and finds them; `keep_shared` leaves such layers out.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.models.convertible import convertible_layers, fold_factors, refuse_unsound, why_shared
from ensdistill.runtime.errors import UserError


class _Swapped(nn.Module):
    """First base of the classes made here; knows the class an instance had before."""

    plain_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Such a class has no importable name: copies and pickles make it again from its two halves.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        mixin = next(base for base in type(self).__mro__ if "plain_class" not in vars(base))
        return (_new_instance, (mixin, self.plain_class), *state)


class _Members:
    """Selection of the members that a student's input belongs to: one object, held by all its layers."""

    def __init__(self) -> None:
        self.selected: Tensor | None = None  # indices (M,); None: all E in order
        self.folded: dict[int, Sequence[int]] = {}  # those that a thread runs by weights of their own, by its number


class BatchEnsembleLayer(_Swapped):
    """Behaviour of a converted conv or linear layer beside its own class: factors before and after its forward."""

    weight: Tensor
    rho_r: Tensor
    rho_s: Tensor
    ensemble_members: _Members
    ensemble_name: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows of `x` are blockwise by member: (M·B, in, …) for a conv, (M·B, …, in) for a linear layer.

        M is E, or the number of members that `select_members` names. Raises UserError for other row counts.
        """
        members = self.ensemble_members
        if members.folded and (own := members.folded.get(threading.get_ident())) is not None:
            return self._forward_folded(own, x, *args, **kwargs)
        rho_r, rho_s, selected = self.rho_r, self.rho_s, members.selected
        if selected is not None:
            rho_r, rho_s = rho_r.index_select(0, selected), rho_s.index_select(0, selected)
        is_linear = isinstance(self, nn.Linear)
        M, rows = rho_r.shape[0], x.shape[0]
        if rows % M or (x.ndim < 2 if is_linear else x.ndim != self.weight.ndim):
            raise UserError(
                f"{self.plain_class.__name__} '{self.ensemble_name}' got an input of shape {tuple(x.shape)} for {M} "
                f"members: expected {'(rows, …, in)' if is_linear else '(rows, in, …)'} with {M}·B rows, member by "
                f"member; where its rows are no images, name it in keep_shared"
            )
        axis = -1 if is_linear else 1
        x = x * _row_factors(rho_r, rows // M, axis, x)
        y = super().forward(x, *args, **kwargs)
        return y * _row_factors(rho_s, rows // M, axis, y)

    def _forward_folded(self, members: Sequence[int], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Blocks of `x` by weights W ∘ s rᵀ, megabytes, in place of two passes over activations a layer."""
        layer = cast(Any, self)
        is_linear = self.plain_class is nn.Linear
        if not is_linear and (self.plain_class is not nn.Conv2d or layer.groups > 1):
            axis, B = -1 if isinstance(self, nn.Linear) else 1, x.shape[0] // len(members)
            x = x * _row_factors(torch.stack([self.rho_r[m] for m in members]), B, axis, x)
            y = super().forward(x, *args, **kwargs)
            return y * _row_factors(torch.stack([self.rho_s[m] for m in members]), B, axis, y)
        blocks = []
        for m, block in zip(members, x.chunk(len(members)), strict=True):
            r, s = 1 + self.rho_r[m], 1 + self.rho_s[m]
            factors, bias = torch.outer(s, r), None if layer.bias is None else layer.bias * s
            if is_linear:
                blocks.append(F.linear(block, self.weight * factors, bias))
            else:
                blocks.append(layer._conv_forward(block, self.weight * factors[:, :, None, None], bias))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, members={self.rho_r.shape[0]}"


def _row_factors(rho_MC: Tensor, B: int, axis: int, like: Tensor) -> Tensor:
    """Spread 1 + rho over the M·B rows, in the type of `like` and with its channels on `axis`.

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
def _subclass(mixin: Any, plain: Any) -> Any:
    attributes = {"plain_class": plain, "__module__": __name__}
    return types.new_class(f"BatchEnsemble{plain.__name__}", (mixin, plain), exec_body=lambda ns: ns.update(attributes))


def _new_instance(mixin: Any, plain: Any) -> nn.Module:
    cls = _subclass(mixin, plain)
    return cls.__new__(cls)


def _swap_class(module: Any, mixin: Any) -> None:
    module.__class__ = _subclass(mixin, cast(Any, type(module)))


def to_batch_ensemble(module: nn.Module, members: SupportsIndex, keep_shared: Sequence[str] = ()) -> nn.Module:
    """Make a BatchEnsemble student of a copy of `module`, with `members` (E >= 1) members that all equal it.

    The student takes (E·B, …) and gives (E·B, …), blockwise by member. Its factors live where the weights live, in
    their type, and need a gradient where the weight does. Layers whose name fits a shell pattern of `keep_shared`
    (`"*.cpb_mlp.*"`) take no factors. Raises UserError for what the docstring of this file says is refused.
    """
    if isinstance(members, bool) or not hasattr(members, "__index__") or (E := operator.index(members)) < 1:
        raise UserError(f"members: got {members!r}, expected a whole number of at least 1")
    if is_batch_ensemble(module):
        raise UserError(f"{type(module).__name__} is a BatchEnsemble student already: convert the plain network")
    refuse_unsound(module, keep_shared)
    if not convertible_layers(module, keep_shared):
        raise UserError(
            f"{type(module).__name__} has no conv or linear layer that can take factors: "
            f"convert a network with at least one ({'; '.join(why_shared(module).values()) or 'it has none at all'})"
        )
    try:
        student = copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{type(module).__name__} cannot be copied: {message}; drop what it has cached") from error
    shared_state = _Members()
    for layer_name, layer in convertible_layers(student, keep_shared).items():
        weight = layer.weight
        num_in = weight.shape[1] * getattr(layer, "groups", 1)
        for name, size in (("rho_r", num_in), ("rho_s", weight.shape[0])):
            rho = torch.zeros(E, size, dtype=weight.dtype, device=weight.device)
            layer.register_parameter(name, nn.Parameter(rho, requires_grad=weight.requires_grad))
        _swap_class(layer, BatchEnsembleLayer)
        converted = cast(BatchEnsembleLayer, layer)
        converted.ensemble_members, converted.ensemble_name = shared_state, layer_name
    for child in student.modules():
        for base, mixin in ((nn.TransformerEncoderLayer, _SlowEncoderLayer), (nn.TransformerEncoder, _SlowEncoder)):
            if isinstance(child, base) and any(isinstance(layer, BatchEnsembleLayer) for layer in child.modules()):
                _swap_class(child, mixin)
    return student


def average_members(student: nn.Module) -> nn.Module:
    """Average a student to a plain network: mean r and mean s, each by itself, folded into weight and bias.

    Norms are taken as they are. `student` is left alone. Raises ValueError where it is no student.
    """
    return _fold(student, lambda rho: rho.mean(dim=0))


def member_network(student: nn.Module, member: int) -> nn.Module:
    """Take member `member` (0 … E − 1) out as a plain network, exactly: its r and s folded into weight and bias."""
    if not 0 <= member < num_members(student):
        raise ValueError(f"member {member}: expected 0 … {num_members(student) - 1}")
    return _fold(student, lambda rho: rho[member])


@torch.no_grad()
def _fold(student: nn.Module, pick: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy `student` in its plain classes, with the factors 1 + pick(rho (E, C)) (C,) folded in float64."""
    num_members(student)
    plain = copy.deepcopy(student)
    for module in list(plain.modules()):
        if isinstance(module, BatchEnsembleLayer):
            r, s = (1 + pick(rho.double()) for rho in (module.rho_r, module.rho_s))
            fold_factors(cast(Any, module), r, s)
            del module.rho_r, module.rho_s, module.ensemble_members, module.ensemble_name
        if isinstance(module, _Swapped):
            cast(Any, module).__class__ = module.plain_class
    return plain


@contextmanager
def select_members(student: nn.Module, members: Sequence[int] | Tensor) -> Iterator[None]:
    """Let the student's input have len(members) blocks inside, which go through the members named, in that order.

    A tensor of indices (M,) on the student's device is used as it is, unchecked and without a synchronisation, so a
    graph captured inside follows its values. Nested uses restore. Recomputation in a backward pass (activation
    checkpointing) must happen inside too. Raises ValueError for an empty or impossible selection.
    """
    layers = _layers_of(student)
    if not isinstance(members, Tensor):
        outside = [m for m in members if not 0 <= m < num_members(student)]
        if outside or not len(members):
            raise ValueError(f"members {list(members)}: expected at least one, each of 0 … {num_members(student) - 1}")
        # Counted out on the device: a tensor of host values would be copied there, and the host would wait.
        device = layers[0].rho_r.device
        members = torch.cat([torch.arange(m, m + 1, device=device) for m in members])
    if members.ndim != 1 or not len(members):
        raise ValueError(f"members of shape {tuple(members.shape)}: expected indices (M,), M >= 1")
    state = layers[0].ensemble_members
    before, state.selected = state.selected, members
    try:
        yield
    finally:
        state.selected = before


@contextmanager
def folded_members(student: nn.Module, members: Sequence[int]) -> Iterator[None]:
    """Let the student's input have len(members) blocks, of those members, inside and in the calling thread alone.

    Other threads may run other members meanwhile. Factors go to the weights, differentiable in all three: the same
    numbers as `select_members` gives up to rounding, for less work where activations are larger than weights.
    """
    folded, thread = _layers_of(student)[0].ensemble_members.folded, threading.get_ident()
    folded[thread] = members
    try:
        yield
    finally:
        del folded[thread]


def is_batch_ensemble(module: nn.Module) -> bool:
    """Say whether `module` is or holds a BatchEnsemble student."""
    return any(isinstance(layer, BatchEnsembleLayer) for layer in module.modules())


def _layers_of(student: nn.Module) -> list[BatchEnsembleLayer]:
    layers = [layer for layer in student.modules() if isinstance(layer, BatchEnsembleLayer)]
    students = len({id(layer.ensemble_members) for layer in layers})
    if students != 1:
        raise ValueError(f"{type(student).__name__} holds {students} BatchEnsemble students, expected one")
    return layers


def num_members(student: nn.Module) -> int:
    """Count the members E of `student`. Raises ValueError where it is no student."""
    return _layers_of(student)[0].rho_r.shape[0]


def factor_parameters(student: nn.Module) -> list[nn.Parameter]:
    """List every rho_r (E, in) and rho_s (E, out) of `student`."""
    return [cast(nn.Parameter, rho) for layer in _layers_of(student) for rho in (layer.rho_r, layer.rho_s)]


@torch.no_grad()
def check_members(student: nn.Module, images: Tensor) -> None:
    """Run a copy of `student` on `images` (B >= 2, …) with random factors: each member must be its plain network.

    Finds what conversion cannot see: images of a batch mixed, the batch off the first axis, weights read elsewhere.
    Evaluation mode, float32; vectors (gains, biases) are redrawn too, since one at zero would hide the layer before
    it. Costs two forwards of E·B rows. Raises UserError that names the first layer at fault.
    """
    trial = copy.deepcopy(student).float().eval()
    _layers_of(trial)[0].ensemble_members.selected = None
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        if parameter.ndim < 2:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    drawn = {id(rho): 0.1 * torch.randn(rho.shape, generator=generator) for rho in factor_parameters(trial)}
    layers = {name: layer for name, layer in trial.named_modules() if isinstance(layer, BatchEnsembleLayer)}

    # members see different images here, so that rows that change places show
    blocks = [images.float().roll(m, dims=0) * (1 - m / (2 * num_members(trial))) for m in range(num_members(trial))]

    def members_agree(active: Collection[str]) -> bool:
        for name, layer in layers.items():
            for rho in (layer.rho_r, layer.rho_s):
                rho.copy_(drawn[id(rho)]) if name in active else rho.zero_()
        outputs = trial(torch.cat(blocks))
        if not isinstance(outputs, Tensor) or not bool(outputs.isfinite().all()):
            raise UserError(
                f"{type(student).__name__} cannot be checked: it gave {_describe(outputs)}, expected one finite tensor "
                f"of logits; check the network alone on these images"
            )
        apart = torch.cat([member_network(trial, m)(block) for m, block in enumerate(blocks)])
        return outputs.shape == apart.shape and bool((outputs - apart).abs().amax() <= 1e-3 * apart.abs().amax())

    if members_agree(layers):
        return
    if members_agree([]):
        for name, layer in layers.items():
            if not members_agree([name]):
                raise UserError(
                    f"{layer.plain_class.__name__} '{name}' does not act on each member by itself: rows of its input "
                    f"are not images, or its weight is read elsewhere; name it in keep_shared"
                )
    raise UserError(
        f"the members of {type(student).__name__} do not act by themselves: it mixes the images of a batch; "
        f"rewrite that part or use a student without members"
    )


def _describe(outputs: object) -> str:
    return "values that are not finite" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"

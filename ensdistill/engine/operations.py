"""Who computes the layers: our kernels, the library, or for every convolution whichever was measured faster.

`Operations` is all that the passes over a network ask for: three member-batched convolutions, and the work on weights,
norms and pools between them. `make_operations` gives the one that a command's `--backend` names.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ensdistill.engine.launch_key import Key, NormKey, forward_key, input_gradient_key, norm_key, weight_gradient_key
from ensdistill.engine.library import LibraryOperations
from ensdistill.engine.pointwise import KernelPointwise
from ensdistill.engine.tuning.choices import Candidate, Choice, TuningTable
from ensdistill.engine.tuning.tuner import Tuner
from ensdistill.kernels import launch
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.weight_gradient.operation import member_conv_weight_gradient, weight_gradient_splits
from ensdistill.kernels.epilogue import ConvOutput
from ensdistill.kernels.norm.statistics import BatchStatistics
from ensdistill.kernels.operation import Operation, P, R
from ensdistill.kernels.weights.gradient import GradientParts, Gradients
from ensdistill.kernels.weights.member_weights import WeightSlots
from ensdistill.runtime.errors import UserError, nearest

Backend = Literal["reference", "library", "triton", "auto", "tuned"]
"""`reference`: the modules themselves. `library`: cuDNN. `triton`: our kernels. `auto`: the faster of the two for each
layer on a GPU, the modules elsewhere. `tuned`: as `auto` with what was measured before, our default tiles elsewhere; it
measures nothing."""


class Operations(Protocol):
    """What computes the passes over a network. Every method has the arguments and results of the kernel of its name."""

    kernel: bool
    """Whether the work on images and logits, which has functions of its own, runs by our kernels too."""

    def member_conv(
        self,
        x: Tensor,
        w_EKKIO: Tensor,
        /,
        *,
        stride: int = 1,
        members: Tensor | None = None,
        prologue: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
        second: tuple[Tensor, Tensor] | None = None,
        keep_y: bool = True,
        keep_z: bool = True,
        sums: bool = False,
        bits: int = 0,
        out_dtype: torch.dtype | None = None,
    ) -> ConvOutput:
        """y = [relu](conv([relu(a·x + b)]) + bias + residual), z, sums, bits."""

    def member_conv_input_gradient(
        self,
        dy: Tensor,
        w_EKKIO: Tensor,
        /,
        *,
        size: tuple[int, int],
        stride: int = 1,
        members: Tensor | None = None,
        shared: bool = False,
        before: Tensor | None = None,
        bits: Tensor | None = None,
        norm: tuple[Tensor, Tensor, Tensor] | None = None,
        scale: Tensor | None = None,
        after: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """scale ∘ mask ∘ (convᵀ(dy) + before) + after, and the norm's sums."""

    def member_conv_weight_gradient(
        self,
        x: Tensor,
        dy: Tensor,
        /,
        *,
        kernel: int,
        stride: int = 1,
        prologue: tuple[Tensor, Tensor] | None = None,
        parts: Tensor | None = None,
    ) -> Tensor:
        """dw of every member, or its partial sums in `parts`."""

    def weight_gradient_splits(
        self, x: Tensor, dy: Tensor, /, *, kernel: int, stride: int = 1, prologue: tuple[Tensor, Tensor] | None = None
    ) -> int:
        """How many partial sums of dw are best; of dy shape and type count."""

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """Whatever computes `operation` here: the kernel or the library's form, with the kernel's arguments."""

    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Reader], device: torch.device, /) -> bool:
        """Whether `readers` had better apply the norm of y where they load it than have a pass of its own do it.

        `y_MBHWC`: any tensor of its shape and type.
        """

    def folds_second(self, kept: Sequence[Call], folded: Sequence[Call], device: torch.device, /) -> bool:
        """Whether a second output relu(a·y + b) had better be applied by its readers than stored.

        `kept`: the convolution that makes it and those that read it, as they are if it is stored; `folded`: if not.
        """

    @property
    def member_weights(self) -> Callable[..., None]:
        """W ∘ r sᵀ, biases and norms' vectors of all layers, in the layout of the convolutions."""

    @property
    def member_weights_gradient(self) -> Callable[..., list[Gradients]]:
        """dW, dr, ds, db of all layers."""

    @property
    def batch_norm_statistics(self) -> Callable[..., BatchStatistics]:
        """From sums to mean, rstd, scale, shift."""

    @property
    def batch_norm(self) -> Callable[..., tuple[Tensor, Tensor | None, BatchStatistics]]:
        """From sums to [relu](scale·x + shift + residual), bits, and the statistics."""

    @property
    def batch_norm_backward(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """From sums to c0·du + c1·x + c2 + residual, dγ, dβ."""

    @property
    def global_pool(self) -> Callable[..., Tensor]:
        """Mean over pixels."""

    @property
    def global_pool_gradient(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The mean's gradient, with the convolution's mask and sums."""


class Reader(NamedTuple):
    """A convolution that reads a norm's output: tensors of its shapes (values do not count) and its other arguments."""

    w_EKKIO: Tensor
    dy_MBHWC: Tensor
    options: dict[str, Any]


class Call(NamedTuple):
    """A forward convolution: tensors of its shapes (values do not count) and its other arguments."""

    x: Tensor
    w_EKKIO: Tensor
    options: dict[str, Any]


class TritonOperations(KernelPointwise):
    """Our kernels, with the default tile of each shape."""

    member_conv = staticmethod(member_conv)
    member_conv_input_gradient = staticmethod(member_conv_input_gradient)
    member_conv_weight_gradient = staticmethod(member_conv_weight_gradient)
    weight_gradient_splits = staticmethod(weight_gradient_splits)


class _Keyed(KernelPointwise, ABC):
    """Every convolution goes to `run`, with its key."""

    @abstractmethod
    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        """Compute `key`: its operation's two tensors and keyword arguments."""

    def member_conv(self, x: Tensor, w_EKKIO: Tensor, /, **options: Any) -> ConvOutput:
        """See `Operations`."""
        out: ConvOutput = self.run(forward_key(x, w_EKKIO, **options), (x, w_EKKIO), options)
        return out

    def member_conv_input_gradient(
        self, dy: Tensor, w_EKKIO: Tensor, /, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `Operations`."""
        out: tuple[Tensor, Tensor | None] = self.run(input_gradient_key(dy, w_EKKIO, **options), (dy, w_EKKIO), options)
        return out

    def member_conv_weight_gradient(self, x: Tensor, dy: Tensor, /, **options: Any) -> Tensor:
        """See `Operations`."""
        named = {name: value for name, value in options.items() if name != "parts"}
        out: Tensor = self.run(weight_gradient_key(x, dy, **named), (x, dy), options)
        return out


class TunedOperations(_Keyed):
    """For every convolution the faster of kernel and library; all else by our kernels.

    A shape that the table does not have is measured when it first comes: the warm-up before a graph's capture must run
    every one. Where nothing is measured (inside a capture, with `measures` off, without memory for it) our first tile
    computes it that is not known to fail, and on a CPU the library.
    """

    def __init__(self, table: TuningTable, *, measures: bool = True) -> None:
        """`measures`: off for a run that must start at once, with the best that the table knows."""
        self.table, self.measures = table, measures
        self._tuner: Tuner | None = None

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        return self._candidate(key, tensors[0].device).run(key, tensors, options)

    def weight_gradient_splits(self, x: Tensor, dy: Tensor, /, **options: Any) -> int:
        """See `Operations`: those of whoever computes it."""
        candidate = self._candidate(weight_gradient_key(x, dy, **options), x.device)
        if candidate.provider == "library":
            return 1
        return candidate.tile[-1] if candidate.tile else weight_gradient_splits(x, dy, **options)

    def _candidate(self, key: Key, device: torch.device) -> Candidate:
        choice = self.table.get(key)
        if choice is None and device.type != "cuda":
            return Candidate(provider="library")
        if choice is None and self.measures and not torch.cuda.is_current_stream_capturing():
            choice = self.choice(key, device)
        return self._tuner_of(device).fallback(key) if choice is None else choice.candidate

    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Reader], device: torch.device) -> bool:
        """See `Operations`: whichever was measured faster, forward and weight gradient together."""
        if device.type != "cuda":
            return False
        vectors = (y_MBHWC.new_empty(1, y_MBHWC.shape[-1], dtype=torch.float32),) * 2
        signs: list[tuple[Key | NormKey, int]] = [(norm_key(y_MBHWC), 1)]
        for reader in readers:
            kernel = {"kernel": reader.w_EKKIO.shape[1], "stride": reader.options["stride"]}
            for prologue, sign in ((None, 1), (vectors, -1)):
                forward = forward_key(y_MBHWC, reader.w_EKKIO, **reader.options, prologue=prologue)
                backward = weight_gradient_key(y_MBHWC, reader.dy_MBHWC, **kernel, prologue=prologue)
                signs += [(forward, sign), (backward, sign)]
        gain = 0.0
        for key, sign in signs:
            choice = self.choice(key, device) if self.measures else self.table.get(key)
            if choice is None:  # what is not measured is recorded, and so tuned, as it is by default
                return super().folds_norm(y_MBHWC, readers, device)
            gain += sign * choice.measured[0].microseconds
        return gain > 0

    def folds_second(self, kept: Sequence[Call], folded: Sequence[Call], device: torch.device) -> bool:
        """See `Operations`: whichever was measured faster."""
        if device.type != "cuda":
            return False
        gain = 0.0
        for calls, sign in ((kept, 1), (folded, -1)):
            for call in calls:
                key = forward_key(call.x, call.w_EKKIO, **call.options)
                choice = self.choice(key, device) if self.measures else self.table.get(key)
                if choice is None:
                    return super().folds_second(kept, folded, device)
                gain += sign * choice.measured[0].microseconds
        return gain > 0

    def choice(self, key: Key | NormKey, device: torch.device) -> Choice | None:
        """Who computes `key`, measured now if it never was; None where it could not be."""
        return self.table.get(key) or self._tuner_of(device).choice(key)

    def close(self) -> None:
        """End the process that measures; where another layer must be measured, another starts."""
        if self._tuner is not None:
            self._tuner.close()

    def _tuner_of(self, device: torch.device) -> Tuner:
        if self._tuner is None:
            self._tuner = Tuner(self.table, device)
        return self._tuner


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What runs between convolutions: memory alone counts."""

    name: str
    """The operation's."""
    shape: str
    """`64 @ 32x32` (channels, pixels), `3x3 64→64` of weights, or the channels alone."""
    bytes: int
    """Every tensor that it is given or gives, once."""


class RecordingOperations(_Keyed):
    """Counts the operations that run. They run by our kernels: on `meta` tensors nothing is computed.

    `partial`: bytes of sums that the convolutions write in parts, one a tile or a split; whoever reads them is a pass.
    `notes`: what was not recorded because it has no kernels, and why.
    """

    weight_gradient_splits = staticmethod(weight_gradient_splits)

    def __init__(self) -> None:
        self.keys: Counter[Key] = Counter()
        self.passes: Counter[Pass] = Counter()
        self.partial = 0
        self.notes: list[str] = []
        for name, value in vars(KernelPointwise).items():
            if isinstance(value, staticmethod):
                setattr(self, name, functools.partial(self._record, name, getattr(self, name)))

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        self.keys[key] += 1
        out = Candidate(provider="triton").run(key, tensors, options)
        sums = out.sums if isinstance(out, ConvOutput) else out[1] if isinstance(out, tuple) else None
        self.partial += 0 if sums is None else sums.nbytes
        if options.get("parts") is not None:  # the key counts one
            self.partial += options["parts"].nbytes - options["parts"][0].nbytes
        return out

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """The kernel of `operation`, counted."""
        return functools.partial(self._record, operation.name, operation.kernel)

    def clear(self) -> None:
        """Forget what was counted."""
        self.keys.clear()
        self.passes.clear()
        self.partial = 0

    @property
    def bytes(self) -> int:
        """All that is moved: every tensor once for each operation that is given or gives it."""
        counted: list[tuple[Key | Pass, int]] = [*self.keys.items(), *self.passes.items()]
        return self.partial + sum(count * one.bytes for one, count in counted)

    def _record(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        out = function(*args, **options)
        given = (_tensors(args[0], options), args[1:]) if name.startswith("member_weights") else (args, options)
        tensors = {id(x): x for x in tree_leaves((given, out)) if isinstance(x, Tensor)}
        moved = sum(x.nbytes for x in tensors.values())
        self.passes[Pass(name=name, shape=_shape(name, args, out), bytes=moved)] += 1
        return out


def _tensors(buffers: WeightSlots | GradientParts, options: dict[str, Any]) -> list[Tensor]:
    """What a pass over all layers' weights writes or reads of `buffers`."""
    if isinstance(buffers, GradientParts):
        return [buffers.flat]
    vectors = [*buffers.bias, *(v for two in buffers.second for v in two or ())]
    return [v[: options["E"]] for v in (*buffers.weights, *vectors) if v is not None]


def _shape(name: str, args: Sequence[Any], out: Any) -> str:
    if name.startswith("member_weights"):
        return f"{sum(map(len, args[1]))} layers"
    images = [x for x in tree_leaves((args, out)) if isinstance(x, Tensor) and x.ndim == 5]
    if not images:
        return str(args[0].shape[-1])
    _, _, H, W, C = images[0].shape
    return f"{C} @ {H}x{W}"


def make_operations(backend: str, device: torch.device) -> Operations | None:
    """What `--backend` names, on `device`; None stands for the modules themselves, by autograd.

    Raises:
        UserError: there is no such backend, or it does not run on `device`.
    """
    if backend not in get_args(Backend):
        known = ", ".join(get_args(Backend))
        raise UserError(
            f"--backend {backend}: no such backend{nearest(backend, get_args(Backend))}; expected one of {known}"
        )
    is_tuned = backend in ("auto", "tuned")
    if backend == "reference" or (is_tuned and device.type != "cuda"):
        return None
    if backend == "library":
        return LibraryOperations()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        if is_tuned:
            return LibraryOperations()
        raise UserError(
            f"--backend {backend}: the kernels need an NVIDIA GPU of compute capability 8.0 or more, this one has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; choose auto or library"
        )
    if device.type == "cuda" and (fault := launch.launch_fault()):
        raise UserError(f"--backend {backend}: kernels cannot be launched here: {fault}; mend that, or choose library")
    if backend == "triton":
        if device.type == "cpu" and not launch.INTERPRETED:
            raise UserError(
                "--backend triton: the kernels need an NVIDIA GPU; choose auto, or run them in Triton's interpreter "
                "with TRITON_INTERPRET=1 in the environment (slow)"
            )
        return TritonOperations()
    return TunedOperations(TuningTable.of_device(device), measures=backend == "auto")

"""Who computes the operations of a network: our kernels, cuDNN, or for each layer whichever was measured faster.

An operation is registered where its kernel is (`kernels/operation.py`). The passes over a network ask their provider
for it, `operations(global_pool)(x)`, and nothing here need know of it. `make_operations` gives the provider that a
command's `--backend` names.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import triton
from torch import Tensor

from ensdistill.engine.launch_key import Key, NormKey, key_of, norm_key
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.table import Choice, TuningTable
from ensdistill.engine.tuning.tuner import Tuner
from ensdistill.kernels import launch
from ensdistill.kernels.conv.arguments import Convolution
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.weight_gradient import member_conv_weight_gradient, weight_gradient_splits
from ensdistill.kernels.operation import Operation, P, R
from ensdistill.runtime.errors import UserError, nearest

Backend = Literal["reference", "library", "triton", "auto", "tuned"]
"""`reference`: the modules themselves. `library`: cuDNN. `triton`: our kernels. `auto`: the faster of the two for each
layer on a GPU, the modules elsewhere. `tuned`: as `auto` with what was measured before, our default tiles elsewhere; it
measures nothing."""
_LATER_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6)
FOLDS = os.environ.get("ENSDISTILL_FOLDED_NORMS", "0" if _LATER_TRITON else "1") != "0"
"""Default for applying norms by our kernels where the next convolution loads its tile, as far as nothing was measured.

It saves a pass over the activations, and costs some four instructions a value and tap in forward and weight gradient.
Not by default after Triton 3.6: 3.8 spills up to 72 bytes a thread of the row kernels that do, on 9.0.
"""


class Reader(NamedTuple):
    """A convolution that reads a norm's output: tensors of its shapes (values do not count) and its options."""

    w_EKKIO: Tensor
    dy_MBHWC: Tensor
    options: dict[str, Any]


class Call(NamedTuple):
    """A forward convolution: tensors of its shapes (values do not count) and its options."""

    x: Tensor
    w_EKKIO: Tensor
    options: dict[str, Any]


class Operations(ABC):
    """Provider of operations: computes all that the passes over a network ask for."""

    kernel: bool
    """True where the work on images and logits, which has functions of its own, runs by our kernels too."""

    @abstractmethod
    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """Give what computes `operation` here, with the kernel's arguments and results."""

    @abstractmethod
    def weight_gradient_splits(self, x: Tensor, dy_MBHWC: Tensor, /, **options: Any) -> int:
        """Best number of partial sums for these arguments of `member_conv_weight_gradient`; values do not count."""

    @abstractmethod
    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Reader], device: torch.device, /) -> bool:
        """Decide whether `readers` had better apply the norm of y where they load it than have a pass of its own do it.

        `y_MBHWC`: any tensor of its shape and type.
        """

    @abstractmethod
    def folds_second(self, kept: Sequence[Call], folded: Sequence[Call], device: torch.device, /) -> bool:
        """Decide whether a second output relu(a·y + b) had better be applied by its readers than stored.

        `kept`: the convolution that makes it and those that read it, as they are if it is stored; `folded`: if not.
        """


class TritonOperations(Operations):
    """Our kernels, with the default tile of each shape."""

    kernel = True

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """Give the kernel of `operation`."""
        return operation.kernel

    def weight_gradient_splits(self, x: Tensor, dy_MBHWC: Tensor, /, **options: Any) -> int:
        """Partial sums of the default tile."""
        return weight_gradient_splits(x, dy_MBHWC, **options)

    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Reader], device: torch.device, /) -> bool:
        """Give the default: see `FOLDS`."""
        return FOLDS

    def folds_second(self, kept: Sequence[Call], folded: Sequence[Call], device: torch.device, /) -> bool:
        """Give the default: see `FOLDS`."""
        return FOLDS


class LibraryOperations(Operations):
    """cuDNN and PyTorch's own operations; convolutions by a call a member, or `grouped` by one for all members."""

    kernel = False

    def __init__(self, *, grouped: bool = False) -> None:
        self.grouped = grouped

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """Give the library's form of `operation`."""
        if self.grouped and isinstance(operation, Convolution):
            return functools.partial(operation.library, grouped=True)
        return operation.library

    def weight_gradient_splits(self, x: Tensor, dy_MBHWC: Tensor, /, **options: Any) -> int:
        """Give 1: the library writes the whole sum."""
        return 1

    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Reader], device: torch.device, /) -> bool:
        """Give False: a library's convolution has no prologue."""
        return False

    def folds_second(self, kept: Sequence[Call], folded: Sequence[Call], device: torch.device, /) -> bool:
        """Give False: a library's convolution has no prologue."""
        return False


class _ConvolutionsByKey(TritonOperations):
    """Our kernels; but every convolution goes to `run`, with its key."""

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """Give the kernel of `operation`, or what sends a convolution to `run`."""
        return functools.partial(self._keyed, operation) if isinstance(operation, Convolution) else operation.kernel

    def _keyed(self, convolution: Convolution[..., Any], first: Tensor, second: Tensor, /, **options: Any) -> Any:
        return self.run(key_of(convolution, first, second, **options), (first, second), options)

    @abstractmethod
    def run(self, key: Key, tensors: tuple[Tensor, Tensor], options: dict[str, Any]) -> Any:
        """Compute `key`: its operation's two tensors and options."""


class TunedOperations(_ConvolutionsByKey):
    """For every convolution the faster of kernel and library; all else by our kernels.

    A shape that the table does not have is measured when it first comes: the warm-up before a graph's capture must run
    every one. Where nothing is measured (inside a capture, with `measures` off, without memory for it) our first tile
    computes it that is not known to fail, and on a CPU the library.
    """

    def __init__(self, table: TuningTable, *, measures: bool = True) -> None:
        """`measures`: off for a run that must start at once, with the best that the table knows."""
        self.table, self.measures = table, measures
        self._tuner: Tuner | None = None

    def run(self, key: Key, tensors: tuple[Tensor, Tensor], options: dict[str, Any]) -> Any:
        """Compute `key` by whichever candidate was measured fastest."""
        return self._candidate(key, tensors[0].device).run(key, tensors, options)

    def weight_gradient_splits(self, x: Tensor, dy_MBHWC: Tensor, /, **options: Any) -> int:
        """Partial sums of whoever computes it."""
        candidate = self._candidate(key_of(member_conv_weight_gradient, x, dy_MBHWC, **options), x.device)
        if candidate.provider == "library":
            return 1
        return candidate.tile[-1] if candidate.tile else weight_gradient_splits(x, dy_MBHWC, **options)

    def _candidate(self, key: Key, device: torch.device) -> Candidate:
        choice = self.table.get(key)
        if choice is None and device.type != "cuda":
            return Candidate(provider="library")
        if choice is None and self.measures and not torch.cuda.is_current_stream_capturing():
            choice = self.choice(key, device)
        return self._tuner_of(device).fallback(key) if choice is None else choice.candidate

    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Reader], device: torch.device, /) -> bool:
        """Decide by what was measured, forward and weight gradient together."""
        vectors = (y_MBHWC.new_empty(1, y_MBHWC.shape[-1], dtype=torch.float32),) * 2
        apart: list[Key | NormKey] = [norm_key(y_MBHWC)]
        folded: list[Key | NormKey] = []
        for w_EKKIO, dy_MBHWC, options in readers:
            kernel = {"kernel": w_EKKIO.shape[1], "stride": options["stride"]}
            for prologue, keys in ((None, apart), (vectors, folded)):
                keys.append(key_of(member_conv, y_MBHWC, w_EKKIO, **options, prologue=prologue))
                keys.append(key_of(member_conv_weight_gradient, y_MBHWC, dy_MBHWC, **kernel, prologue=prologue))
        return self._is_faster(folded, apart, device)

    def folds_second(self, kept: Sequence[Call], folded: Sequence[Call], device: torch.device, /) -> bool:
        """Decide by what was measured."""
        apart, together = (
            [key_of(member_conv, x, w_EKKIO, **options) for x, w_EKKIO, options in calls] for calls in (kept, folded)
        )
        return self._is_faster(together, apart, device)

    def _is_faster(self, folded: Sequence[Key | NormKey], apart: Sequence[Key | NormKey], device: torch.device) -> bool:
        """Tell whether `folded` takes less time than `apart`; the default where a key is not measured."""
        if device.type != "cuda":
            return False
        gain = 0.0
        for keys, sign in ((apart, 1), (folded, -1)):
            for key in keys:
                choice = self.choice(key, device) if self.measures else self.table.get(key)
                if choice is None:  # what is not measured is recorded, and so tuned, as it is by default
                    return FOLDS
                gain += sign * choice.measured[0].microseconds
        return gain > 0

    def choice(self, key: Key | NormKey, device: torch.device) -> Choice | None:
        """Choose who computes `key`, measured now if it never was; None where it could not be."""
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
    """An operation that runs between convolutions: memory alone counts."""

    name: str
    """Name of the operation."""
    shape: str
    """`64 @ 32x32` (channels, pixels), the channels alone, or the number of layers."""
    bytes: int
    """Bytes of every tensor that it is given or gives, once."""


class RecordingOperations(_ConvolutionsByKey):
    """Counts the operations that run. They run by our kernels: on `meta` tensors nothing is computed.

    `partial`: bytes of sums that the convolutions write in parts, one a tile or a split; whoever reads them is a pass.
    `notes`: what was not recorded because it has no kernels, and why.
    """

    def __init__(self) -> None:
        self.keys: Counter[Key] = Counter()
        self.passes: Counter[Pass] = Counter()
        self.partial = 0
        self.notes: list[str] = []

    def run(self, key: Key, tensors: tuple[Tensor, Tensor], options: dict[str, Any]) -> Any:
        """Compute `key` by our kernel, counted."""
        self.keys[key] += 1
        out = Candidate(provider="triton").run(key, tensors, options)
        convolution = key.convolution
        sums = convolution.partial_sums(convolution.options(**options), out)
        self.partial += 0 if sums is None else sums.nbytes
        return out

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """Give the kernel of `operation`, counted."""
        if isinstance(operation, Convolution):
            return super().__call__(operation)
        return functools.partial(self._record, operation)

    def clear(self) -> None:
        """Forget what was counted."""
        self.keys.clear()
        self.passes.clear()
        self.partial = 0

    @property
    def bytes(self) -> int:
        """Bytes moved in all: every tensor once for each operation that is given or gives it."""
        counted: list[tuple[Key | Pass, int]] = [*self.keys.items(), *self.passes.items()]
        return self.partial + sum(count * one.bytes for one, count in counted)

    def _record(self, operation: Operation[..., R], /, *args: Any, **options: Any) -> R:
        out = operation.kernel(*args, **options)
        tensors = {id(x): x for x in operation.tensors(args, options, out)}
        moved = sum(x.nbytes for x in tensors.values())
        self.passes[Pass(name=operation.name, shape=operation.shape(args, options, out), bytes=moved)] += 1
        return out


def make_operations(backend: str, device: torch.device) -> Operations | None:
    """Make what `--backend` names, on `device`; None stands for the modules themselves, by autograd.

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

"""Keys of convolutions, on which their speed depends, with the bytes and FLOPs that any implementation must spend.

    FLOPs = 2 · M · B · OH · OW · k² · CI · CO             forward, input gradient and weight gradient alike
    bytes = every activation, weight and packed bit that it is given or gives, read or written once

Of its input a 1x1 convolution with stride 2 reads one pixel in four. Vectors of a channel and sums of a tile are left
out: kilobytes. The floor is max(FLOPs / rate, bytes / bandwidth).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensdistill.kernels.conv.arguments import (
    Convolution,
    Direction,
    ForwardOptions,
    InputGradientOptions,
    WeightGradientOptions,
)
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.weight_gradient import member_conv_weight_gradient
from ensdistill.kernels.launch import cdiv
from ensdistill.runtime.devices import Device

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}
# Per operation: tensors of the shape of its output that it reads, and those that it writes beside the first.
_READ: dict[str, tuple[str, ...]] = {"forward": ("residual",), "input gradient": ("before", "norm", "after")}
_WRITTEN: dict[str, tuple[str, ...]] = {"forward": ("second",), "input gradient": ()}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A convolution of a step. Two that are equal take equally long."""

    op: Direction
    """Forward, input gradient or weight gradient."""
    E: int
    """Number of sets of weights."""
    M: int
    """Number of members that are computed."""
    B: int
    """Images of a member."""
    H: int
    """Rows of the layer's input."""
    W: int
    """Columns of the layer's input."""
    CI: int
    """Channels of the layer's input."""
    CO: int
    """Channels of the layer's output."""
    k: int
    """Side of the kernel."""
    stride: int
    """Stride of both directions; the padding is (k − 1) / 2."""
    dtype: str
    """Type of activations and weights: bf16, fp16, fp32 or fp64."""
    out_dtype: str
    """Type of the result."""
    shared: bool = False
    """Whether all members have one input, or one input gradient, their sum."""
    members: bool = False
    """Whether a tensor on the device says which weights each member has."""
    present: tuple[str, ...] = ()
    """Names of the further arguments, sorted: `bias`, `residual`, `relu`, …; `no y`, `no z` for what is not kept."""
    bits: int = 0
    """Number of members whose ReLU bits the forward writes."""

    @property
    def convolution(self) -> Convolution[..., Any]:
        """The operation that computes it."""
        return _BY_DIRECTION[self.op][0]

    def __str__(self) -> str:
        """Name the key in one line, as the cache on disk does."""
        members = f"{self.M} of {self.E}" + (" chosen" if self.members else "")
        types = self.dtype if self.dtype == self.out_dtype else f"{self.dtype}→{self.out_dtype}"
        text = f"{self.op}, {self.layer}, members {members}, B {self.B}, {types}"
        return ", ".join([text, *self.extras])

    @property
    def layer(self) -> str:
        """Shape of the layer: `3x3/1 64→64 @ 32x32` (kernel, stride, channels, size of its input)."""
        return f"{self.k}x{self.k}/{self.stride} {self.CI}→{self.CO} @ {self.H}x{self.W}"

    @property
    def extras(self) -> list[str]:
        """Words for all that comes beside the convolution."""
        return (
            (["shared"] if self.shared else []) + list(self.present) + ([f"bits of {self.bits}"] if self.bits else [])
        )

    @property
    def OH(self) -> int:
        """Rows of the layer's output."""
        return (self.H - 1) // self.stride + 1

    @property
    def OW(self) -> int:
        """Columns of the layer's output."""
        return (self.W - 1) // self.stride + 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of activations and weights."""
        return _NAMED[self.dtype]

    @property
    def torch_out_dtype(self) -> torch.dtype:
        """Type of the result."""
        return _NAMED[self.out_dtype]

    @property
    def flops(self) -> int:
        """Number of multiplications and additions."""
        return 2 * self.M * self.B * self.OH * self.OW * self.k**2 * self.CI * self.CO

    @property
    def bytes(self) -> int:
        """Number of bytes that must be read and written."""
        element, out_element = self.torch_dtype.itemsize, self.torch_out_dtype.itemsize
        images = self.B if self.shared else self.M * self.B
        inputs = images * self.H * self.W * self.CI
        touched = images * self.OH * self.OW * self.CI if self.k < self.stride else inputs
        outputs = self.M * self.B * self.OH * self.OW * self.CO
        weights = self.k**2 * self.CI * self.CO
        if self.op == "weight gradient":
            return element * (touched + outputs) + 4 * self.M * weights
        weights *= min(self.M, self.E)
        read, written = (touched, outputs) if self.op == "forward" else (outputs, inputs)
        extra = sum(name in self.present for name in _READ[self.op])
        results = (
            1
            + sum(name in self.present for name in _WRITTEN[self.op])
            - sum(f"no {name}" in self.present for name in "yz")
        )
        packed = images * self.H * self.W * cdiv(self.CI, 8) if "bits" in self.present else 0
        packed += self.bits * self.B * self.OH * self.OW * cdiv(self.CO, 8)
        return element * (read + weights + extra * written) + out_element * results * written + packed

    def floor(self, device: Device) -> float:
        """Least seconds that it can take on `device`."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


@dataclass(frozen=True, kw_only=True)
class NormKey:
    """A pass that applies a norm and its ReLU to the activations of M members."""

    M: int
    """Number of members."""
    B: int
    """Images of a member."""
    H: int
    """Rows of an image."""
    W: int
    """Columns of an image."""
    C: int
    """Number of channels."""
    dtype: str
    """Type of the activations."""

    def __str__(self) -> str:
        """Name the key in one line, as the cache on disk does."""
        return f"norm and ReLU, {self.C} @ {self.H}x{self.W}, members {self.M}, B {self.B}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the activations."""
        return _NAMED[self.dtype]

    @property
    def bytes(self) -> int:
        """Number of bytes: all is read once and written once."""
        return 2 * self.M * self.B * self.H * self.W * self.C * self.torch_dtype.itemsize

    def floor(self, device: Device) -> float:
        """Least seconds that it can take on `device`."""
        return self.bytes / device.bandwidth


def norm_key(y_MBHWC: Tensor) -> NormKey:
    """Key of `batch_norm_apply` with this value and shared vectors."""
    M, B, H, W, C = y_MBHWC.shape
    return NormKey(M=M, B=B, H=H, W=W, C=C, dtype=_DTYPES[y_MBHWC.dtype])


def _present(options: Any, *names: str) -> tuple[str, ...]:
    """Those of `names` that are asked for, sorted."""
    return tuple(sorted(name for name in names if (value := getattr(options, name)) is not None and value is not False))


def forward_key(x: Tensor, w_EKKIO: Tensor, options: ForwardOptions) -> Key:
    """Key of `member_conv` with these arguments."""
    o, (E, k, _, CI, CO) = options, w_EKKIO.shape
    B, H, W = x.shape[-4:-1]
    given = _present(o, "prologue", "bias", "residual", "relu", "second", "sums")
    missing = [name for name, kept in (("no y", o.keep_y), ("no z", o.keep_z or o.second is None)) if not kept]
    return Key(
        op="forward",
        E=E,
        M=E if o.members is None else len(o.members),
        B=B,
        H=H,
        W=W,
        CI=CI,
        CO=CO,
        k=k,
        stride=o.stride,
        dtype=_DTYPES[x.dtype],
        out_dtype=_DTYPES[o.out_dtype or x.dtype],
        shared=x.ndim == 4,
        members=o.members is not None,
        present=tuple(sorted((*given, *missing))),
        bits=o.bits,
    )


def input_gradient_key(dy_MBHWC: Tensor, w_EKKIO: Tensor, options: InputGradientOptions) -> Key:
    """Key of `member_conv_input_gradient` with these arguments."""
    o, (E, k, _, CI, CO), (H, W) = options, w_EKKIO.shape, options.size
    return Key(
        op="input gradient",
        E=E,
        M=len(dy_MBHWC),
        B=dy_MBHWC.shape[1],
        H=H,
        W=W,
        CI=CI,
        CO=CO,
        k=k,
        stride=o.stride,
        dtype=_DTYPES[dy_MBHWC.dtype],
        out_dtype=_DTYPES[o.out_dtype or dy_MBHWC.dtype],
        shared=o.shared,
        members=o.members is not None,
        present=_present(o, "before", "bits", "norm", "scale", "after"),
    )


def weight_gradient_key(x: Tensor, dy_MBHWC: Tensor, options: WeightGradientOptions) -> Key:
    """Key of `member_conv_weight_gradient` with these arguments."""
    M, B, _, _, CO = dy_MBHWC.shape
    H, W, CI = x.shape[-3:]
    return Key(
        op="weight gradient",
        E=M,
        M=M,
        B=B,
        H=H,
        W=W,
        CI=CI,
        CO=CO,
        k=options.kernel,
        stride=options.stride,
        dtype=_DTYPES[x.dtype],
        out_dtype="fp32",
        shared=x.ndim == 4,
        present=_present(options, "prologue"),
    )


_CONVOLUTIONS: tuple[tuple[Convolution[..., Any], Callable[[Tensor, Tensor, Any], Key]], ...] = (
    (member_conv, forward_key),
    (member_conv_input_gradient, input_gradient_key),
    (member_conv_weight_gradient, weight_gradient_key),
)
_BY_DIRECTION = {convolution.direction: (convolution, key) for convolution, key in _CONVOLUTIONS}


def key_of(convolution: Convolution[..., Any], first: Tensor, second: Tensor, /, **options: Any) -> Key:
    """Key of `convolution` with its two tensors and its keyword arguments."""
    _, key = _BY_DIRECTION[convolution.direction]
    return key(first, second, convolution.options(**options))

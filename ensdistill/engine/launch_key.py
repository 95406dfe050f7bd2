"""What a convolution's speed depends on: its `Key`, and the bytes and FLOPs that any implementation of it must spend.

    FLOPs = 2 · M · B · OH · OW · k² · CI · CO             forward, input gradient and weight gradient alike
    bytes = every activation, weight and packed bit that it is given or gives, read or written once

Of its input a 1x1 convolution with stride 2 reads one pixel in four. Vectors of a channel and sums of a tile are left
out: kilobytes. The floor is max(FLOPs / rate, bytes / bandwidth).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ensdistill.kernels.launch import cdiv
from ensdistill.runtime.devices import Device

Operation = Literal["forward", "input gradient", "weight gradient"]
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}
# Per operation: tensors of the shape of its output that it reads, and those that it writes beside the first.
_READ: dict[str, tuple[str, ...]] = {"forward": ("residual",), "input gradient": ("before", "norm", "after")}
_WRITTEN: dict[str, tuple[str, ...]] = {"forward": ("second",), "input gradient": ()}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One convolution of a step. Two that are equal take equally long."""

    op: Operation
    """Which of the three."""
    E: int
    """Sets of weights."""
    M: int
    """Members that are computed."""
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
    """Of both directions; the padding is (k − 1) / 2."""
    dtype: str
    """Of activations and weights: bf16, fp16, fp32 or fp64."""
    out_dtype: str
    """Of the result."""
    shared: bool = False
    """Whether all members have one input, or one input gradient, their sum."""
    members: bool = False
    """Whether the members are read from the device."""
    present: tuple[str, ...] = ()
    """Names of the further arguments, sorted: `bias`, `residual`, `relu`, …; `no y`, `no z` for what is not kept."""
    bits: int = 0
    """Members whose ReLU bits the forward writes."""

    def __str__(self) -> str:
        """All of it in one line: the keys of the cache on disk."""
        members = f"{self.M} of {self.E}" + (" chosen" if self.members else "")
        types = self.dtype if self.dtype == self.out_dtype else f"{self.dtype}→{self.out_dtype}"
        text = f"{self.op}, {self.layer}, members {members}, B {self.B}, {types}"
        return ", ".join([text, *self.extras])

    @property
    def layer(self) -> str:
        """The layer's shape: `3x3/1 64→64 @ 32x32` (kernel, stride, channels, size of its input)."""
        return f"{self.k}x{self.k}/{self.stride} {self.CI}→{self.CO} @ {self.H}x{self.W}"

    @property
    def extras(self) -> list[str]:
        """What comes beside the convolution, in words."""
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
        """Of activations and weights."""
        return _NAMED[self.dtype]

    @property
    def torch_out_dtype(self) -> torch.dtype:
        """Of the result."""
        return _NAMED[self.out_dtype]

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.M * self.B * self.OH * self.OW * self.k**2 * self.CI * self.CO

    @property
    def bytes(self) -> int:
        """What must be read and written."""
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
        """Seconds that it takes at least on `device`."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


@dataclass(frozen=True, kw_only=True)
class NormKey:
    """A pass that applies a norm and its ReLU to the activations of M members."""

    M: int
    """Members."""
    B: int
    """Images of a member."""
    H: int
    """Rows."""
    W: int
    """Columns."""
    C: int
    """Channels."""
    dtype: str
    """Of the activations."""

    def __str__(self) -> str:
        """All of it in one line: the keys of the cache on disk."""
        return f"norm and ReLU, {self.C} @ {self.H}x{self.W}, members {self.M}, B {self.B}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the activations."""
        return _NAMED[self.dtype]

    @property
    def bytes(self) -> int:
        """Read once, written once."""
        return 2 * self.M * self.B * self.H * self.W * self.C * self.torch_dtype.itemsize

    def floor(self, device: Device) -> float:
        """Seconds that it takes at least on `device`."""
        return self.bytes / device.bandwidth


def norm_key(y_MBHWC: Tensor) -> NormKey:
    """The key of `batch_norm_apply` with this value and shared vectors."""
    M, B, H, W, C = y_MBHWC.shape
    return NormKey(M=M, B=B, H=H, W=W, C=C, dtype=_DTYPES[y_MBHWC.dtype])


def _present(**given: Any) -> tuple[str, ...]:
    return tuple(sorted(name for name, value in given.items() if value is not None and value is not False))


def forward_key(
    x: Tensor,
    w_EKKIO: Tensor,
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
) -> Key:
    """The key of `member_conv` with these arguments."""
    E, k, _, CI, CO = w_EKKIO.shape
    B, H, W = x.shape[-4:-1]
    present = _present(prologue=prologue, bias=bias, residual=residual, relu=relu, second=second, sums=sums)
    missing = [name for name, kept in (("no y", keep_y), ("no z", keep_z or second is None)) if not kept]
    return Key(
        op="forward",
        E=E,
        M=E if members is None else len(members),
        B=B,
        H=H,
        W=W,
        CI=CI,
        CO=CO,
        k=k,
        stride=stride,
        dtype=_DTYPES[x.dtype],
        out_dtype=_DTYPES[out_dtype or x.dtype],
        shared=x.ndim == 4,
        members=members is not None,
        present=tuple(sorted((*present, *missing))),
        bits=bits,
    )


def input_gradient_key(
    dy_MBHWC: Tensor,
    w_EKKIO: Tensor,
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
) -> Key:
    """The key of `member_conv_input_gradient` with these arguments."""
    E, k, _, CI, CO = w_EKKIO.shape
    return Key(
        op="input gradient",
        E=E,
        M=len(dy_MBHWC),
        B=dy_MBHWC.shape[1],
        H=size[0],
        W=size[1],
        CI=CI,
        CO=CO,
        k=k,
        stride=stride,
        dtype=_DTYPES[dy_MBHWC.dtype],
        out_dtype=_DTYPES[out_dtype or dy_MBHWC.dtype],
        shared=shared,
        members=members is not None,
        present=_present(before=before, bits=bits, norm=norm, scale=scale, after=after),
    )


def weight_gradient_key(
    x: Tensor,
    dy_MBHWC: Tensor,
    *,
    kernel: int,
    stride: int = 1,
    prologue: tuple[Tensor, Tensor] | None = None,
) -> Key:
    """The key of `member_conv_weight_gradient` with these arguments."""
    M, B, _, _, CO = dy_MBHWC.shape
    return Key(
        op="weight gradient",
        E=M,
        M=M,
        B=B,
        H=x.shape[-3],
        W=x.shape[-2],
        CI=x.shape[-1],
        CO=CO,
        k=kernel,
        stride=stride,
        dtype=_DTYPES[x.dtype],
        out_dtype="fp32",
        shared=x.ndim == 4,
        present=_present(prologue=prologue),
    )

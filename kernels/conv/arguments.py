"""Arguments of the member-batched convolutions: keyword options, sizes, checks, and how the three are registered.

A launcher and its definition take two tensors and an object of options. `keywords` makes of either a function that is
called with the options' fields as keyword arguments: `member_conv(x, w, stride=2, bias=b)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ensdistill.kernels.launch import check
from ensdistill.kernels.operation import Operation, P, R

Affine = tuple[Tensor, Tensor]
"""(a, b) of a·x + b, vectors of a channel: fp32 (E, C), or (1, C) where all members share them."""
Direction = Literal["forward", "input gradient", "weight gradient"]
KERNELS = (1, 3, 7)
"""Sides of a kernel."""
SIDES = "k 1, 3 or 7"
"""The same in words."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ForwardOptions:
    """Options of `member_conv`, all keyword arguments."""

    stride: int = 1
    """Stride of the convolution, 1 or 2."""
    members: Tensor | None = None
    """int64 (M,) on the device: which of the E weights each output has; None for 0 … E − 1."""
    prologue: Affine | None = None
    """(a, b) of CI channels: relu(a·x + b) is what is read."""
    bias: Tensor | None = None
    """fp32 (E, CO) or (1, CO)."""
    residual: Tensor | None = None
    """(M, B, OH, OW, CO), added before the ReLU."""
    relu: bool = False
    """True: y ends in a ReLU."""
    second: Affine | None = None
    """(a, b) of CO channels: asks for z = relu(a·y + b)."""
    keep_y: bool = True
    """True: y is stored; y or z must be."""
    keep_z: bool = True
    """True: z is stored where there is one; bits are of z either way."""
    sums: bool = False
    """True: gives Σ y and Σ y², (M, T, 2, CO), to be added over T."""
    bits: int = 0
    """Number of members, from the first, whose z > 0 (y > 0 without a second output) is packed."""
    out_dtype: torch.dtype | None = None
    """Type of y and z; None for x's."""
    tile: Sequence[int] = ()
    """`tiles.Tile` of the kernel; () for the default of the shape. The definition has none."""
    grouped: bool = False
    """True: the definition makes one call for all members, not one a member. The kernel has no such choice."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputGradientOptions:
    """Options of `member_conv_input_gradient`, all keyword arguments."""

    size: tuple[int, int]
    """(H, W) of the forward's input."""
    stride: int = 1
    """Stride of the convolution, 1 or 2."""
    members: Tensor | None = None
    """int64 (M,) on the device: which of the E weights each member has; None for 0 … M − 1."""
    shared: bool = False
    """True: members are added up; dx, before, norm's x and after are (B, H, W, CI), channel vectors one row."""
    before: Tensor | None = None
    """Added before the mask, of dx's shape."""
    bits: Tensor | None = None
    """Mask, uint8 (at least M, B, H, W, ⌈CI/8⌉)."""
    norm: tuple[Tensor, Tensor, Tensor] | None = None
    """(x, a, b), x of dx's shape, a and b of CI channels: asks for the sums, and gives the mask without `bits`."""
    scale: Tensor | None = None
    """fp32 (E, CI) or (1, CI)."""
    after: Tensor | None = None
    """Added last, of dx's shape."""
    out_dtype: torch.dtype | None = None
    """Type of dx; None for dy's."""
    tile: Sequence[int] = ()
    """`tiles.Tile` of the kernel; () for the default of the shape. The definition has none."""
    grouped: bool = False
    """True: the definition makes one call for all members, not one a member. The kernel has no such choice."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightGradientOptions:
    """Options of `member_conv_weight_gradient`, all keyword arguments."""

    kernel: int
    """Side of the kernel, 1, 3 or 7."""
    stride: int = 1
    """Stride of the convolution."""
    prologue: Affine | None = None
    """(a, b), each (M, CI) or (1, CI): the convolution read relu(a·x + b), 0 in the padding."""
    parts: Tensor | None = None
    """Room for S partial sums, contiguous fp32 (S, M, kernel, kernel, CI, CO), any S."""
    tile: Sequence[int] = ()
    """`WeightGradientTile` of the kernel; () for the default. Its splits count only without `parts`."""
    grouped: bool = False
    """True: the definition makes one call for all members, not one a member. The kernel has no such choice."""


O = TypeVar("O")  # noqa: E741 - options


def keywords(
    options: Callable[P, O],
) -> Callable[[Callable[[Tensor, Tensor, O], R]], Callable[Concatenate[Tensor, Tensor, P], R]]:
    """Let the decorated function of two tensors and `options` be called with the options' fields by name."""

    def decorate(function: Callable[[Tensor, Tensor, O], R]) -> Callable[Concatenate[Tensor, Tensor, P], R]:
        @functools.wraps(function)
        def call(first: Tensor, second: Tensor, /, *args: P.args, **fields: P.kwargs) -> R:
            return function(first, second, options(*args, **fields))

        return call

    return decorate


class Convolution(Operation[P, R]):
    """Operation whose best provider depends on the layer, and is chosen by measuring: a member-batched convolution."""

    def __init__(
        self,
        kernel: Callable[P, R],
        definition: Callable[P, R],
        direction: Direction,
        options: Callable[..., Any],
        partial_sums: Callable[[Any, R], Tensor | None],
    ) -> None:
        super().__init__(kernel, definition, definition)
        self.direction: Direction = direction
        """Forward, input gradient or weight gradient."""
        self.options = options
        """Makes an object of the keyword arguments."""
        self.partial_sums = partial_sums
        """Gives of its options and its result the sums in parts that it wrote beside the result."""


def convolution(
    direction: Direction,
    options: Callable[P, O],
    *,
    definition: Callable[Concatenate[Tensor, Tensor, P], R],
    partial_sums: Callable[[O, R], Tensor | None],
) -> Callable[[Callable[[Tensor, Tensor, O], R]], Convolution[Concatenate[Tensor, Tensor, P], R]]:
    """Register the decorated launcher, which takes two tensors and `options`, under its own name.

    Args:
        definition: takes the same arguments and gives the same results.
        partial_sums: see `Convolution`.
    """
    return lambda launcher: Convolution(keywords(options)(launcher), definition, direction, options, partial_sums)


class Sizes(NamedTuple):
    """Sizes of a convolution; plain numbers, by which tiles are chosen."""

    M: int
    B: int
    H: int
    W: int
    CI: int
    OH: int
    OW: int
    CO: int


def sizes(x: Tensor, w_EKKIO: Tensor, stride: int, members: Tensor | None) -> Sizes:
    """Sizes of the convolution of x (…, B, H, W, CI) with w_EKKIO."""
    E, k, _, CI, CO = w_EKKIO.shape
    B, H, W = x.shape[-4:-1]
    M = x.shape[0] if x.ndim == 5 else E if members is None else members.shape[0]
    OH, OW = ((n + 2 * (k // 2) - k) // stride + 1 for n in (H, W))
    return Sizes(*map(int, (M, B, H, W, CI, OH, OW, CO)))


def row_stride(vector: Tensor | None) -> int:
    """Elements from one member's row to the next; 0 where all share one."""
    return 0 if vector is None or vector.shape[0] == 1 else vector.shape[1]


def check_weights(name: str, x: Tensor, w_EKKIO: Tensor, members: Tensor | None, stride: int, axis: int) -> None:
    """Raise ValueError unless x (channels last) fits the input (axis −2) or output (−1) channels of the weights."""
    check(x.dtype in (torch.bfloat16, torch.float32), name, "bfloat16 or float32", x)
    check(x.is_contiguous(), name, "a contiguous tensor", x)
    check(x.numel() > 0, name, "at least one element", x)
    shape = tuple(w_EKKIO.shape)
    check(len(shape) == 5 and shape[1] == shape[2] and shape[1] in KERNELS, "w", f"(E, k, k, CI, CO), {SIDES}", w_EKKIO)
    check(w_EKKIO.is_contiguous(), "w", "a contiguous tensor", w_EKKIO)
    check(w_EKKIO.dtype == x.dtype and w_EKKIO.device == x.device, "w", f"{x.dtype} on {x.device}", w_EKKIO)
    check(shape[axis] == x.shape[-1], name, f"{shape[axis]} channels", x)
    check(stride in (1, 2), "stride", "1 or 2", stride)
    if members is not None:
        right = members.dtype == torch.int64 and members.ndim == 1 and members.device == x.device
        check(right and members.is_contiguous(), "members", f"int64 (M,) on {x.device}", members)


def check_vector(name: str, vector: Tensor | None, rows: int, channels: int, like: Tensor) -> None:
    """Raise ValueError unless `vector` is None or fp32 (rows, channels) or (1, channels) beside `like`."""
    if vector is None:
        return
    right = vector.dtype == torch.float32 and vector.ndim == 2 and vector.shape[0] in (1, rows)
    right = right and vector.shape[1] == channels and vector.is_contiguous() and vector.device == like.device
    check(right, name, f"contiguous float32 ({rows} or 1, {channels}) on {like.device}", vector)


def check_activation(name: str, x: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """Raise ValueError unless `x` is None or a contiguous bf16 or fp32 tensor of `shape` beside `like`."""
    if x is not None:
        right = x.dtype in (torch.bfloat16, torch.float32) and x.shape == tuple(shape) and x.device == like.device
        check(right and x.is_contiguous(), name, f"contiguous bfloat16 or float32 {tuple(shape)} on {like.device}", x)

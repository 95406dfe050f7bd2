"""Shapes of the member-batched convolutions, and what is asked of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ensdistill.kernels.launch import check


class Sizes(NamedTuple):
    """Of a convolution; plain numbers, by which tiles are chosen."""

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
    """ValueError unless x (channels last) fits the input (axis −2) or output (−1) channels of the weights."""
    check(x.dtype in (torch.bfloat16, torch.float32), name, "bfloat16 or float32", x)
    check(x.is_contiguous(), name, "a contiguous tensor", x)
    check(x.numel() > 0, name, "at least one element", x)
    shape = tuple(w_EKKIO.shape)
    check(len(shape) == 5 and shape[1] == shape[2] and shape[1] in (1, 3), "w", "(E, k, k, CI, CO), k 1 or 3", w_EKKIO)
    check(w_EKKIO.is_contiguous(), "w", "a contiguous tensor", w_EKKIO)
    check(w_EKKIO.dtype == x.dtype and w_EKKIO.device == x.device, "w", f"{x.dtype} on {x.device}", w_EKKIO)
    check(shape[axis] == x.shape[-1], name, f"{shape[axis]} channels", x)
    check(stride in (1, 2), "stride", "1 or 2", stride)
    if members is not None:
        right = members.dtype == torch.int64 and members.ndim == 1 and members.device == x.device
        check(right and members.is_contiguous(), "members", f"int64 (M,) on {x.device}", members)


def check_vector(name: str, vector: Tensor | None, rows: int, channels: int, like: Tensor) -> None:
    """ValueError unless `vector` is None or fp32 (rows, channels) or (1, channels) beside `like`."""
    if vector is None:
        return
    right = vector.dtype == torch.float32 and vector.ndim == 2 and vector.shape[0] in (1, rows)
    right = right and vector.shape[1] == channels and vector.is_contiguous() and vector.device == like.device
    check(right, name, f"contiguous float32 ({rows} or 1, {channels}) on {like.device}", vector)


def check_activation(name: str, x: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """ValueError unless `x` is None or a contiguous bf16 or fp32 tensor of `shape` beside `like`."""
    if x is not None:
        right = x.dtype in (torch.bfloat16, torch.float32) and x.shape == tuple(shape) and x.device == like.device
        check(right and x.is_contiguous(), name, f"contiguous bfloat16 or float32 {tuple(shape)} on {like.device}", x)

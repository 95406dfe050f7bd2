"""Convolutions by PyTorch, all three: cuDNN on views of the NHWC memory, element-wise work compiled around it.

Two forms. By default a call a member; `grouped`: one call for all members, a grouped convolution, which wants the
members' channels side by side and so copies what it reads and writes, or one batched matrix product for a 1x1 kernel.
Weights of (k, k, CI, CO) are copied to cuDNN's order, (CO, k, k, CI), in every call: they too change every step.
On a CPU the same code runs with PyTorch's own convolutions and nothing compiled. No gradient flows through any of it.

PyTorch's weight gradient on a CPU in bf16 (oneDNN; seen in torch 2.13 and 2.14) leaves memory unwritten where a column
of the kernel meets no pixel: 3x3 with stride 2 on maps of one or two columns. Here it becomes the 0 that it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ensdistill.kernels.epilogue import ConvOutput, conv_epilogue_ref, input_gradient_epilogue_ref, rows, wide


def convolve(x: Tensor, w_MKKIO: Tensor, *, stride: int, grouped: bool) -> Tensor:
    """(M, B, OH, OW, CO): x (M, B, H, W, CI), or (B, H, W, CI) or (1, …) shared, with each member's weights."""
    with _benchmarked():
        return (_grouped_forward if grouped else _forward)(x, w_MKKIO, stride)


def convolve_transposed(
    dy_MBHWC: Tensor, w_MKKIO: Tensor, *, size: tuple[int, int], stride: int, shared: bool, grouped: bool
) -> list[Tensor]:
    """Parts (n, B, H, W, CI) of the input's gradient: the members' in order, or with `shared` what is to be added."""
    with _benchmarked():
        return (_grouped_input_gradient if grouped else _input_gradient)(dy_MBHWC, w_MKKIO, stride, size, shared)


def weight_gradient(dw_MKKIO: Tensor, x: Tensor, dy_MBHWC: Tensor, *, stride: int, grouped: bool) -> None:
    """Write the gradient of every member's weights to `dw_MKKIO`; x as in `convolve`."""
    with _benchmarked():
        (_grouped_weight_gradient if grouped else _weight_gradient)(dw_MKKIO, x, dy_MBHWC, stride)


def affine_relu(x: Tensor, a: Tensor, b: Tensor, members: Tensor | None) -> Tensor:
    """relu(a·x + b) in the type of x: (M, B, H, W, C), or M = 1 where both x and the vectors are shared."""
    return (rows(a, members) * wide(x) + rows(b, members)).relu().to(x.dtype)


def forward_epilogue_ref(v_MBHWC: Tensor, **epilogue: Any) -> ConvOutput:
    """`conv_epilogue_ref` of a convolution in any order of memory."""
    return conv_epilogue_ref(v_MBHWC.contiguous(), **epilogue)


def parts_epilogue_ref(parts: list[Tensor], shared: bool, **epilogue: Any) -> tuple[Tensor, Tensor | None]:
    """`input_gradient_epilogue_ref` of the parts that `convolve_transposed` gives."""
    if not shared:
        v_MBHWC = parts[0] if len(parts) == 1 else torch.cat(parts)
        return input_gradient_epilogue_ref(v_MBHWC.contiguous(), **epilogue)
    v_MBHWC = functools.reduce(torch.add, [wide(part) for part in parts]).contiguous()
    for name in ("before", "after", "bits"):
        if epilogue[name] is not None:
            epilogue[name] = epilogue[name].view(1, *epilogue[name].shape[-4:])
    dx_MBHWC, sums = input_gradient_epilogue_ref(v_MBHWC, **epilogue)
    return dx_MBHWC[0], sums


def unmet_columns(width: int, out_width: int, *, k: int, stride: int, padding: int, dilation: int = 1) -> list[int]:
    """Columns of a kernel of `k` columns that lie on padding alone, wherever it stands on a map of `width` pixels."""
    starts = [x * stride - padding for x in range(out_width)]
    return [column for column in range(k) if not any(0 <= start + column * dilation < width for start in starts)]


def chosen(w_EKKIO: Tensor, members: Tensor | None) -> Tensor:
    """Weights of the members, (M, k, k, CI, CO)."""
    return w_EKKIO if members is None else w_EKKIO.index_select(0, members)


@contextmanager
def _benchmarked() -> Iterator[None]:
    """Let cuDNN find its fastest algorithm for each shape by trying; everything else as it is set."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _nchw(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)


def _nhwc(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.permute(0, 2, 3, 1)


def _cudnn_weights(w_MKKIO: Tensor) -> Tensor:
    """Weights in cuDNN's order: (M, CO, CI, k, k), channels last."""
    return w_MKKIO.permute(0, 4, 1, 2, 3).contiguous().permute(0, 1, 4, 2, 3)


def _member(x: Tensor, m: int) -> Tensor:
    """(B, H, W, C) of member m; a batch for all members has four dimensions or a single member."""
    return x if x.ndim == 4 else x[min(m, len(x) - 1)]


def _is_shared(x: Tensor, M: int) -> bool:
    return x.ndim == 4 or len(x) < M


def _side_by_side(x_MBHWC: Tensor) -> Tensor:
    """(B, M·C, H, W), channels last: what a grouped convolution reads; a copy unless M = 1."""
    return _nchw(x_MBHWC.permute(1, 2, 3, 0, 4).flatten(3))


def _apart(x_BCHW: Tensor, M: int) -> Tensor:
    """(M, B, H, W, C) of what `_side_by_side` gives, as a view."""
    return _nhwc(x_BCHW).unflatten(3, (M, -1)).permute(3, 0, 1, 2, 4)


def _output_padding(size: tuple[int, int], out: tuple[int, int], k: int, stride: int) -> tuple[int, int]:
    H, W = ((n - 1) * stride + k - 2 * (k // 2) for n in out)
    return size[0] - H, size[1] - W


def _forward(x: Tensor, w_MKKIO: Tensor, stride: int) -> Tensor:
    M, k = w_MKKIO.shape[:2]
    w_MOIKK = _cudnn_weights(w_MKKIO)
    if x.device.type == "cuda" and torch.backends.cudnn.is_available() and M > 1:
        B, H, W = x.shape[-4:-1]
        OH, OW = (H - 1) // stride + 1, (W - 1) // stride + 1
        y_MBHWC = x.new_empty(M, B, OH, OW, w_MKKIO.shape[-1])
        cudnn = torch.backends.cudnn
        for m in range(M):  # straight into the members' places: nothing to stack
            torch.ops.aten.cudnn_convolution.out(
                _nchw(_member(x, m)),
                w_MOIKK[m],
                [k // 2] * 2,
                [stride] * 2,
                [1, 1],
                1,
                cudnn.benchmark,
                cudnn.deterministic,
                cudnn.allow_tf32,
                out=_nchw(y_MBHWC[m]),
            )
        return y_MBHWC
    parts = [_nhwc(F.conv2d(_nchw(_member(x, m)), w_MOIKK[m], stride=stride, padding=k // 2)) for m in range(M)]
    return parts[0][None] if M == 1 else torch.stack(parts)


def _grouped_forward(x: Tensor, w_MKKIO: Tensor, stride: int) -> Tensor:
    M, k, _, CI, CO = w_MKKIO.shape
    shared = _is_shared(x, M)
    if k == 1 and stride == 1:
        B, H, W = x.shape[-4:-1]
        y_MNC = torch.bmm(x.reshape(-1, B * H * W, CI).expand(M, -1, -1), w_MKKIO[:, 0, 0])
        return y_MNC.view(M, B, H, W, CO)
    x_BCHW = _nchw(_member(x, 0)) if shared else _side_by_side(x)
    w_OIKK = _cudnn_weights(w_MKKIO).flatten(0, 1)
    return _apart(F.conv2d(x_BCHW, w_OIKK, stride=stride, padding=k // 2, groups=1 if shared else M), M)


def _input_gradient(
    dy_MBHWC: Tensor, w_MKKIO: Tensor, stride: int, size: tuple[int, int], shared: bool
) -> list[Tensor]:
    M, k = w_MKKIO.shape[:2]
    w_MOIKK = _cudnn_weights(w_MKKIO)
    extra = _output_padding(size, (dy_MBHWC.shape[2], dy_MBHWC.shape[3]), k, stride)
    options: dict[str, Any] = {"stride": stride, "padding": k // 2, "output_padding": extra}
    return [_nhwc(F.conv_transpose2d(_nchw(dy_MBHWC[m]), w_MOIKK[m], **options))[None] for m in range(M)]


def _grouped_input_gradient(
    dy_MBHWC: Tensor, w_MKKIO: Tensor, stride: int, size: tuple[int, int], shared: bool
) -> list[Tensor]:
    M, k, _, CI, CO = w_MKKIO.shape
    _, B, OH, OW, _ = dy_MBHWC.shape
    if k == 1 and stride == 1 and not shared:
        dx_MNC = torch.bmm(dy_MBHWC.reshape(M, -1, CO), w_MKKIO[:, 0, 0].transpose(1, 2))
        return [dx_MNC.view(M, B, *size, CI)]
    # Channels of all members are one long sum where the members' sum is wanted.
    dx_BCHW = F.conv_transpose2d(
        _side_by_side(dy_MBHWC),
        _cudnn_weights(w_MKKIO).flatten(0, 1),
        stride=stride,
        padding=k // 2,
        output_padding=_output_padding(size, (OH, OW), k, stride),
        groups=1 if shared else M,
    )
    return [_apart(dx_BCHW, 1 if shared else M)]


def _backward_of_weight(x_BCHW: Tensor, dy_BCHW: Tensor, w_OIKK: Tensor, stride: int, groups: int) -> Tensor:
    """(CO, CI, k, k); of `w_OIKK` the shape alone is used."""
    pad = w_OIKK.shape[-1] // 2
    mask = [False, True, False]
    dw_OIKK = torch.ops.aten.convolution_backward(
        dy_BCHW, x_BCHW, w_OIKK, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups, mask
    )[1]
    if dw_OIKK.device.type == "cpu" and stride > 1:
        unmet = unmet_columns(x_BCHW.shape[3], dy_BCHW.shape[3], k=w_OIKK.shape[3], stride=stride, padding=pad)
        for column in unmet:
            dw_OIKK[..., column].zero_()
    return dw_OIKK


def _weight_gradient(dw_MKKIO: Tensor, x: Tensor, dy_MBHWC: Tensor, stride: int) -> None:
    M, k, _, CI, CO = dw_MKKIO.shape
    w_OIKK = torch.empty(CO, CI, k, k, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for m in range(M):
        dw_OIKK = _backward_of_weight(_nchw(_member(x, m)), _nchw(dy_MBHWC[m]), w_OIKK, stride, 1)
        dw_MKKIO[m].copy_(dw_OIKK.permute(2, 3, 1, 0))


def _grouped_weight_gradient(dw_MKKIO: Tensor, x: Tensor, dy_MBHWC: Tensor, stride: int) -> None:
    M, k, _, CI, CO = dw_MKKIO.shape
    shared = _is_shared(x, M)
    if k == 1 and stride == 1:
        x_MNC = x.reshape(1 if shared else M, -1, CI).expand(M, -1, -1)
        dw_MKKIO[:, 0, 0].copy_(torch.bmm(x_MNC.transpose(1, 2), dy_MBHWC.reshape(M, -1, CO)))
        return
    x_BCHW = _nchw(_member(x, 0)) if shared else _side_by_side(x)
    w_OIKK = torch.empty(M * CO, CI, k, k, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    dw_OIKK = _backward_of_weight(x_BCHW, _side_by_side(dy_MBHWC), w_OIKK, stride, 1 if shared else M)
    dw_MKKIO.copy_(dw_OIKK.unflatten(0, (M, CO)).permute(0, 3, 4, 2, 1))

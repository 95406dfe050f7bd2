"""The library path of the three convolutions: cuDNN on views of the NHWC memory, element-wise work compiled around it.

Two forms. By default a call a member; `grouped`: one call for all members, a grouped convolution, which wants the
members' channels side by side and so copies what it reads and writes, or one batched matrix product for a 1x1 kernel.
Weights of (k, k, CI, CO) are copied to cuDNN's order, (CO, k, k, CI), in every call: they too change every step.
On a CPU the same code runs with PyTorch's own convolutions and nothing compiled. No gradient flows through any of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ensdistill.engine.pointwise import LibraryPointwise
from ensdistill.kernels.epilogue import ConvOutput, conv_epilogue_ref, input_gradient_epilogue_ref, rows, wide
from ensdistill.kernels.operation import compiled as fused


class LibraryOperations(LibraryPointwise):
    """`dispatch.Operations` by the library, one call a member or `grouped`."""

    def __init__(self, *, grouped: bool = False) -> None:
        self.grouped = grouped

    @torch.no_grad()
    def member_conv(
        self,
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
    ) -> ConvOutput:
        """The forward; see `kernels.member_conv.member_conv`."""
        out_dtype = out_dtype or x.dtype
        w_MKKIO = _chosen(w_EKKIO, members)
        if prologue is not None:
            x = fused(_affine_relu, x, *prologue, members)
        with _cudnn():
            v = (_grouped_forward if self.grouped else _forward)(x, w_MKKIO, stride)
        plain = bias is None and residual is None and second is None and not (relu or sums or bits)
        if plain and out_dtype == v.dtype and v.is_contiguous():
            return ConvOutput(v if keep_y else None, None, None, None)
        out: ConvOutput = fused(
            _forward_epilogue,
            v,
            members=members,
            bias=bias,
            residual=residual,
            relu=relu,
            second=second,
            keep_y=keep_y,
            keep_z=keep_z,
            sums=sums,
            bits=bits,
            out_dtype=out_dtype,
        )
        return out

    @torch.no_grad()
    def member_conv_input_gradient(
        self,
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
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of the input; see `kernels.member_conv_input_gradient.member_conv_input_gradient`."""
        out_dtype = out_dtype or dy_MBHWC.dtype
        w_MKKIO = _chosen(w_EKKIO, members)
        with _cudnn():
            convolve = _grouped_input_gradient if self.grouped else _input_gradient
            parts = convolve(dy_MBHWC, w_MKKIO, stride, size, shared)
        result: tuple[Tensor, Tensor | None] = fused(
            _input_gradient_epilogue,
            parts,
            shared,
            members=None if shared else members,
            before=before,
            bits=bits,
            norm=norm,
            scale=scale,
            after=after,
            out_dtype=out_dtype,
        )
        return result

    @torch.no_grad()
    def member_conv_weight_gradient(
        self,
        x: Tensor,
        dy_MBHWC: Tensor,
        *,
        kernel: int,
        stride: int = 1,
        prologue: tuple[Tensor, Tensor] | None = None,
        parts: Tensor | None = None,
    ) -> Tensor:
        """The gradient of the weights; see `kernels.member_conv_weight_gradient.member_conv_weight_gradient`."""
        if prologue is not None:
            x = fused(_affine_relu, x, *prologue, None)
        M, CI, CO = len(dy_MBHWC), x.shape[-1], dy_MBHWC.shape[-1]
        if parts is None:
            dw_MKKIO = torch.empty(M, kernel, kernel, CI, CO, dtype=_gradient_dtype(x), device=x.device)
        else:  # all of it in the first
            dw_MKKIO = parts[0]
            parts[1:].zero_()
        with _cudnn():
            (_grouped_weight_gradient if self.grouped else _weight_gradient)(dw_MKKIO, x, dy_MBHWC, stride)
        return dw_MKKIO if parts is None else parts

    @staticmethod
    def weight_gradient_splits(x: Tensor, dy_MBHWC: Tensor, **options: Any) -> int:
        """One part, the whole."""
        return 1


@contextmanager
def _cudnn() -> Iterator[None]:
    """cuDNN's fastest algorithm for each shape, found by trying; everything else as it is set."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _affine_relu(x: Tensor, a: Tensor, b: Tensor, members: Tensor | None) -> Tensor:
    """relu(a·x + b) in the type of x: (M, B, H, W, C), or M = 1 where both x and the vectors are shared."""
    return (rows(a, members) * wide(x) + rows(b, members)).relu().to(x.dtype)


def _forward_epilogue(v_MBHWC: Tensor, **epilogue: Any) -> ConvOutput:
    return conv_epilogue_ref(v_MBHWC.contiguous(), **epilogue)


def _input_gradient_epilogue(parts: list[Tensor], shared: bool, **epilogue: Any) -> tuple[Tensor, Tensor | None]:
    """`parts`: (n, B, H, W, C), the members' in order; `shared`: their sum is wanted."""
    if not shared:
        v_MBHWC = parts[0] if len(parts) == 1 else torch.cat(parts)
        return input_gradient_epilogue_ref(v_MBHWC.contiguous(), **epilogue)
    v_MBHWC = functools.reduce(torch.add, [wide(part) for part in parts]).contiguous()
    for name in ("before", "after", "bits"):
        if epilogue[name] is not None:
            epilogue[name] = epilogue[name].view(1, *epilogue[name].shape[-4:])
    dx_MBHWC, sums = input_gradient_epilogue_ref(v_MBHWC, **epilogue)
    return dx_MBHWC[0], sums


def _chosen(w_EKKIO: Tensor, members: Tensor | None) -> Tensor:
    return w_EKKIO if members is None else w_EKKIO.index_select(0, members)


def _nchw(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)


def _nhwc(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.permute(0, 2, 3, 1)


def _library_weights(w_MKKIO: Tensor) -> Tensor:
    """(M, CO, CI, k, k), channels last."""
    return w_MKKIO.permute(0, 4, 1, 2, 3).contiguous().permute(0, 1, 4, 2, 3)


def _member(x: Tensor, m: int) -> Tensor:
    """Member m's (B, H, W, C); one image batch for all of them has four dimensions or a single member."""
    return x if x.ndim == 4 else x[min(m, len(x) - 1)]


def _is_shared(x: Tensor, M: int) -> bool:
    return x.ndim == 4 or len(x) < M


def _side_by_side(x_MBHWC: Tensor) -> Tensor:
    """(B, M·C, H, W), channels last: what a grouped convolution reads; a copy unless M = 1."""
    return _nchw(x_MBHWC.permute(1, 2, 3, 0, 4).flatten(3))


def _apart(x_BCHW: Tensor, M: int) -> Tensor:
    """The inverse, as a view: (M, B, H, W, C)."""
    return _nhwc(x_BCHW).unflatten(3, (M, -1)).permute(3, 0, 1, 2, 4)


def _output_padding(size: tuple[int, int], out: tuple[int, int], k: int, stride: int) -> tuple[int, int]:
    H, W = ((n - 1) * stride + k - 2 * (k // 2) for n in out)
    return size[0] - H, size[1] - W


def _forward(x: Tensor, w_MKKIO: Tensor, stride: int) -> Tensor:
    M, k = w_MKKIO.shape[:2]
    w_MOIKK = _library_weights(w_MKKIO)
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
    w_OIKK = _library_weights(w_MKKIO).flatten(0, 1)
    return _apart(F.conv2d(x_BCHW, w_OIKK, stride=stride, padding=k // 2, groups=1 if shared else M), M)


def _input_gradient(
    dy_MBHWC: Tensor, w_MKKIO: Tensor, stride: int, size: tuple[int, int], shared: bool
) -> list[Tensor]:
    M, k = w_MKKIO.shape[:2]
    w_MOIKK = _library_weights(w_MKKIO)
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
        _library_weights(w_MKKIO).flatten(0, 1),
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
    return torch.ops.aten.convolution_backward(
        dy_BCHW, x_BCHW, w_OIKK, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups, mask
    )[1]


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


def _gradient_dtype(x: Tensor) -> torch.dtype:
    return wide(x[..., :0]).dtype

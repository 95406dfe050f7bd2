"""The convolutions judged against float64: what they should give, and checks of `member_conv` by a tile.

The truth is written here in PyTorch's own words, a member at a time, gradients by autograd: it shares nothing with the
definitions in `kernels/conv`, which are judged against it too.

Errors are parts of the largest true value. Measured over the cases of test_forms.py in the interpreter, largest of the
kernel (of the reference in the same type): fp32 3.1e-7 (7.6e-7), bf16 6.4e-3 (6.5e-3); nowhere above twice the
reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from accuracy import assert_accurate
from torch import Tensor
from torch.nn import functional as F

from ensdistill.kernels.conv.forward import member_conv, member_conv_ref
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient, member_conv_input_gradient_ref
from ensdistill.kernels.conv.tiles import Tile
from ensdistill.kernels.epilogue import pack_bits_ref, unpack_bits_ref

FLOOR = {torch.float32: 5e-7, torch.bfloat16: 1e-3}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(device)


def double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(double(each) for each in x)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def of_members(vector: Tensor, members: Tensor, M: int) -> Tensor:
    """Rows (E, C) or (1, C) -> each member's, (M, 1, 1, 1, C)."""
    return torch.stack([vector[members[m] if len(vector) > 1 else 0] for m in range(M)])[:, None, None, None]


def convolved(x: Tensor, w: Tensor, stride: int, members: Tensor | None) -> Tensor:
    """(M, B, OH, OW, CO) by a convolution a member, of x (M, B, H, W, CI) or (B, H, W, CI)."""
    chosen = range(len(w)) if members is None else members.tolist()
    outputs = []
    for m, e in enumerate(chosen):
        image = (x if x.ndim == 4 else x[m]).permute(0, 3, 1, 2)
        y = F.conv2d(image, w[e].permute(3, 2, 0, 1), stride=stride, padding=w.shape[1] // 2)
        outputs.append(y.permute(0, 2, 3, 1))
    return torch.stack(outputs)


def true_forward(x: Tensor, w: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """y and z in float64; see `member_conv` for the options."""
    x, w, o = x.double(), w.double(), {name: double(value) for name, value in options.items()}
    members = o.get("members")
    M = len(w) if members is None else len(members)
    rows = torch.arange(M) if members is None else members
    if o.get("prologue"):
        a, b = (of_members(vector, rows, M) for vector in o["prologue"])
        x = (a * x + b).clamp(min=0)
    y = convolved(x, w, o.get("stride", 1), members)
    if o.get("bias") is not None:
        y = y + of_members(o["bias"], rows, M)
    if o.get("residual") is not None:
        y = y + o["residual"]
    if o.get("relu"):
        y = y.clamp(min=0)
    if not o.get("second"):
        return y, None
    a, b = (of_members(vector, rows, M) for vector in o["second"])
    return y, (a * y + b).clamp(min=0)


def true_input_gradient(dy: Tensor, w: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """dx, and with `norm` Σ v and Σ v·x (M, 2, CI), in float64; see `member_conv_input_gradient` for the options."""
    dy, w, o = dy.double(), w.double(), {name: double(value) for name, value in options.items() if name != "size"}
    M, B, CI = len(dy), dy.shape[1], w.shape[3]
    members, shared = o.get("members"), o.get("shared", False)
    shape = (B, *options["size"], CI)
    with torch.enable_grad():
        x = torch.zeros(shape if shared else (M, *shape), dtype=torch.float64, device=dy.device, requires_grad=True)
        (v,) = torch.autograd.grad(convolved(x, w, o.get("stride", 1), members), x, dy)
    v = v.view(-1, *shape)
    M = len(v)
    rows = torch.arange(M) if members is None or shared else members
    if o.get("before") is not None:
        v = v + o["before"].view(v.shape)
    if o.get("bits") is not None:
        v = v * unpack_bits_ref(o["bits"].view(-1, *o["bits"].shape[-4:])[:M], CI)
    sums = None
    if o.get("norm"):
        read, a, b = o["norm"][0].view(v.shape), *(of_members(vector, rows, M) for vector in o["norm"][1:])
        if o.get("bits") is None:
            v = v * (a * read + b > 0)
        sums = torch.stack((v.sum((1, 2, 3)), (v * read).sum((1, 2, 3))), 1)
    if o.get("scale") is not None:
        v = of_members(o["scale"], rows, M) * v
    if o.get("after") is not None:
        v = v + o["after"].view(v.shape)
    return v[0] if shared else v, sums


def true_weight_gradient(
    x: Tensor, dy: Tensor, *, kernel: int, stride: int = 1, prologue: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """dw (M, k, k, CI, CO) in float64; see `member_conv_weight_gradient` for the options."""
    x, dy, M = x.double(), dy.double(), len(dy)
    if prologue is not None:
        a, b = (of_members(vector.double(), torch.arange(M), M) for vector in prologue)
        x = (a * x + b).clamp(min=0)
    with torch.enable_grad():
        shape = (M, kernel, kernel, x.shape[-1], dy.shape[-1])
        w = torch.zeros(shape, dtype=torch.float64, device=x.device, requires_grad=True)
        (dw,) = torch.autograd.grad(convolved(x, w, stride, None), w, dy)
    return dw


def check_sums(sums: Tensor, first: Tensor, second: Tensor) -> None:
    """Σ first and Σ second over the pixels, against float64 sums of the same."""
    expected = torch.stack((first.double().sum((1, 2, 3)), second.double().sum((1, 2, 3))), 1)
    scale = torch.stack((first.double().abs().sum((1, 2, 3)), second.double().abs().sum((1, 2, 3))), 1)
    assert ((sums.double().sum(1) - expected).abs() <= 1e-5 * scale + 1e-12).all()


def check_forward(x: Tensor, w: Tensor, tile: Tile, **options: Any) -> None:
    out, own = member_conv(x, w, tile=tile, **options), member_conv_ref(x, w, **options)
    for got, reference, true in zip(out[:2], own[:2], true_forward(x, w, **options), strict=True):
        assert (got is None) == (reference is None)
        if got is not None:
            assert reference is not None and true is not None
            assert_accurate(got, reference, true, FLOOR[x.dtype])
    if options.get("sums"):
        assert out.sums is not None and out.y is not None
        check_sums(out.sums, out.y, out.y.double() ** 2)
    if options.get("bits"):
        positive = out.y if out.z is None else out.z
        assert positive is not None and out.bits is not None
        assert torch.equal(out.bits, pack_bits_ref(positive[: options["bits"]]))


def check_gradient(dy: Tensor, w: Tensor, tile: Tile, **options: Any) -> None:
    options["size"] = tuple(dy.shape[2:4])
    dx, sums = member_conv_input_gradient(dy, w, tile=tile, **options)
    own, _ = member_conv_input_gradient_ref(dy, w, **options)
    truth, true_sums = true_input_gradient(dy, w, **options)
    assert_accurate(dx, own, truth, FLOOR[dy.dtype])
    if sums is not None and not {"scale", "after"} & options.keys():
        check_sums(sums, dx, dx.double() * options["norm"][0].double())
    elif sums is not None:
        assert true_sums is not None
        assert (sums.double().sum(1) - true_sums).norm() <= 3e-6 * true_sums.norm()

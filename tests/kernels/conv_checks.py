"""`member_conv` and its input gradient by a tile, judged against float64.

Errors are parts of the largest true value. Measured over the cases of test_forms.py in the interpreter, largest of the
kernel (of the reference in the same type): fp32 3.1e-7 (7.6e-7), bf16 6.4e-3 (6.5e-3); nowhere above twice the
reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from accuracy import assert_accurate
from torch import Tensor

from ensdistill.kernels.conv.forward import member_conv, member_conv_ref
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient, member_conv_input_gradient_ref
from ensdistill.kernels.conv.tiles import Tile
from ensdistill.kernels.epilogue import pack_bits_ref

FLOOR = {torch.float32: 5e-7, torch.bfloat16: 1e-3}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(device)


def double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(double(each) for each in x)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_sums(sums: Tensor, first: Tensor, second: Tensor) -> None:
    """Σ first and Σ second over the pixels, against float64 sums of the same."""
    expected = torch.stack((first.double().sum((1, 2, 3)), second.double().sum((1, 2, 3))), 1)
    scale = torch.stack((first.double().abs().sum((1, 2, 3)), second.double().abs().sum((1, 2, 3))), 1)
    assert ((sums.double().sum(1) - expected).abs() <= 1e-5 * scale + 1e-12).all()


def check_forward(x: Tensor, w: Tensor, tile: Tile, **options: Any) -> None:
    out, own = member_conv(x, w, tile=tile, **options), member_conv_ref(x, w, **options)
    truth = member_conv_ref(double(x), double(w), **{name: double(value) for name, value in options.items()})
    for got, reference, true in zip(out[:2], own[:2], truth[:2], strict=True):
        assert (got is None) == (reference is None)
        if got is not None:
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
    wide = {name: value if name == "size" else double(value) for name, value in options.items()}
    truth, true_sums = member_conv_input_gradient_ref(double(dy), double(w), **wide)
    assert_accurate(dx, own, truth, FLOOR[dy.dtype])
    if sums is not None and not {"scale", "after"} & options.keys():
        check_sums(sums, dx, dx.double() * options["norm"][0].double())
    elif sums is not None:
        assert true_sums is not None
        assert (sums.double().sum(1) - true_sums.sum(1)).norm() <= 3e-6 * true_sums.norm()

"""`member_conv_input_gradient` against its float64 reference: epilogues, members, parities, odd sizes.

Errors are norms relative to the truth's. Measured in the interpreter over all cases: float32 1.4e-7 at most, bfloat16
1.8e-3 (the reference 2.4e-3), neither above the reference's by more than 3 %. The floors leave a processor room for
another order of summation.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_launches_alike_on_meta, norm_error
from conv_checks import make, true_input_gradient
from torch import Tensor

from ensdistill.kernels.conv.arguments import InputGradientOptions
from ensdistill.kernels.conv.input_gradient import (
    choose_tile,
    member_conv_input_gradient,
    member_conv_input_gradient_ref,
)
from ensdistill.kernels.conv.tiles import PATCHES, POINTERS
from ensdistill.kernels.epilogue import pack_bits_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
FLOOR = {torch.float32: 2e-7, torch.bfloat16: 2e-4}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SMALL_TILE = (0, 64, 16, 16, 4, 2)
NAMES = ("before", "bits", "norm", "scale", "after")


def assert_as_good(out: Tensor, own: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The kernel's error is at most twice that of the reference in the kernel's type, plus the floor."""
    assert norm_error(out, truth) <= 2 * norm_error(own, truth) + FLOOR[dtype]


def epilogue(names, rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict:
    """Random arguments for the named epilogues of a dx of `shape`; channel vectors in `rows` rows."""
    CI = shape[-1]

    def vector() -> Tensor:
        return make((rows, CI), torch.float32, device)

    values = {
        "before": lambda: make(shape, dtype, device),
        "bits": lambda: pack_bits_ref(make(shape, dtype, device)),
        "norm": lambda: (make(shape, dtype, device), vector(), vector()),
        "scale": vector,
        "after": lambda: make(shape, dtype, device),
    }
    return {name: values[name]() for name in names}


def check_all(dy: Tensor, w: Tensor, tile: tuple[int, ...] = (), **options) -> Tensor:
    """Run the kernel and the reference and compare; sums are compared with the reference's, or with what was stored."""
    dtype = dy.dtype
    dx, sums = member_conv_input_gradient(dy, w, tile=tile, **options)
    own, _ = member_conv_input_gradient_ref(dy, w, **options)
    truth, true_sums = true_input_gradient(dy, w, **options)
    assert dx.shape == truth.shape and dx.dtype == (options.get("out_dtype") or dtype)
    assert_as_good(dx, own, truth, dtype)
    assert (sums is None) == (options.get("norm") is None)
    if sums is not None:
        assert sums.dtype == torch.float32 and sums.shape[2:] == true_sums.shape[1:]
        total = sums.double().sum(1)
        if "scale" in options or "after" in options:
            # of a v that is stored nowhere: as good as fp32 sums of it
            assert norm_error(total, true_sums) < 3e-6
        else:
            v, x = dx.double().view(truth.shape), options["norm"][0].double()
            v, x = (t[None] if options.get("shared") else t for t in (v, x))
            expected = torch.stack((v.sum((1, 2, 3)), (v * x).sum((1, 2, 3))), 1)
            scale = torch.stack((v.abs().sum((1, 2, 3)), (v * x).abs().sum((1, 2, 3))), 1)
            assert ((total - expected).abs() <= 1e-5 * scale + 1e-12).all()
    return dx


SHAPES = [
    # k, stride, CI, CO, B, H, W
    (3, 1, 3, 16, 3, 7, 9),
    (3, 1, 24, 16, 1, 8, 8),
    (3, 1, 20, 64, 1, 7, 9),
    (3, 2, 16, 64, 3, 8, 8),
    (3, 2, 24, 20, 1, 7, 9),
    (3, 2, 16, 16, 1, 8, 7),
    (1, 1, 24, 10, 5, 1, 1),
    (1, 1, 64, 16, 1, 7, 9),
    (1, 2, 20, 64, 3, 7, 9),
    (1, 2, 16, 24, 1, 8, 8),
    (7, 2, 3, 20, 2, 13, 10),
    (7, 2, 20, 16, 1, 9, 8),
    (7, 1, 16, 16, 1, 7, 9),
]


def out_size(k: int, stride: int, H: int, W: int) -> tuple[int, int]:
    return (H + 2 * (k // 2) - k) // stride + 1, (W + 2 * (k // 2) - k) // stride + 1


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, device):
    k, stride, CI, CO, B, H, W = shape
    torch.manual_seed(0)
    dy = make((2, B, *out_size(k, stride, H, W), CO), dtype, device)
    w = make((2, k, k, CI, CO), dtype, device, 0.2)
    check_all(dy, w, size=(H, W), stride=stride)


@TYPES
@pytest.mark.parametrize("shared", [False, True], ids=["own dx", "sum"])
@pytest.mark.parametrize("form", [POINTERS, PATCHES], ids=["parities", "patches"])
@pytest.mark.parametrize("size", [(13, 10), (7, 16)], ids=str)
def test_the_image_s_gradient_through_7x7(size, form, shared, dtype, device):
    """By parities and by patches, of chosen members, scaled, in fp32: as the perturbation asks for it."""
    E, M, B, CI, CO = 3, 2, 2, 3, 20
    dy, w = make((M, B, *out_size(7, 2, *size), CO), dtype, device), make((E, 7, 7, CI, CO), dtype, device, 0.1)
    scale = make((1 if shared else E, CI), torch.float32, device)
    tile = (form, 64, 64 if form == PATCHES else 16, 16, 4, 3)
    members = torch.tensor([2, 0], device=device)
    options = {"size": size, "stride": 2, "members": members, "shared": shared, "scale": scale}
    check_all(dy, w, tile, out_dtype=torch.float32, **options)


def test_patches_are_the_default_where_they_have_a_place_for_all(device):
    x, w = torch.randn(1, 1, 8, 8, 3, device=device), torch.randn(1, 7, 7, 3, 16, device=device)
    dy = torch.randn(1, 1, 4, 4, 16, device=device)
    for beside, form in (
        ({}, PATCHES),
        ({"before": x}, POINTERS),
        ({"scale": torch.ones(1, 3, device=device)}, PATCHES),
    ):
        assert choose_tile(dy, w, InputGradientOptions(size=(8, 8), stride=2, **beside)).form == form
    with pytest.raises(ValueError, match="tile: expected another form"):
        member_conv_input_gradient(dy, w, size=(8, 8), stride=2, before=x, tile=(PATCHES, 64, 64, 16, 4, 3))


@TYPES
@pytest.mark.parametrize("shape", [*SHAPES[:2], SHAPES[4], SHAPES[8], SHAPES[11]], ids=str)
def test_small_tiles_with_every_epilogue(shape, dtype, device):
    k, stride, CI, CO, B, H, W = shape
    torch.manual_seed(1)
    dy = make((1, B, *out_size(k, stride, H, W), CO), dtype, device)
    w = make((1, k, k, CI, CO), dtype, device, 0.2)
    options = epilogue(NAMES, 1, (1, B, H, W, CI), dtype, device)
    check_all(dy, w, SMALL_TILE, size=(H, W), stride=stride, **options)


@TYPES
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "names",
    [
        ("before",),
        ("bits",),
        ("norm",),
        ("scale",),
        ("after",),
        ("before", "bits"),
        ("before", "norm"),
        ("bits", "norm"),
        ("norm", "scale"),
        ("norm", "after"),
        ("before", "bits", "scale", "after"),
        NAMES,
    ],
    ids="+".join,
)
def test_epilogues(names, stride, dtype, device):
    torch.manual_seed(2)
    dy = make((2, 1, *out_size(3, stride, 7, 9), 16), dtype, device)
    w = make((2, 3, 3, 20, 16), dtype, device, 0.2)
    check_all(dy, w, size=(7, 9), stride=stride, **epilogue(names, 2, (2, 1, 7, 9, 20), dtype, device))


@TYPES
@pytest.mark.parametrize("shared", [False, True], ids=["own dx", "shared dx"])
@pytest.mark.parametrize("stride", [1, 2])
def test_members_are_read_on_the_device(stride, shared, dtype, device):
    torch.manual_seed(3)
    members, M, B = torch.tensor([2, 0, 2], device=device), 3, 3
    dy = make((M, B, *out_size(3, stride, 7, 9), 24), dtype, device)
    w = make((3, 3, 3, 16, 24), dtype, device, 0.2)
    shape = (B, 7, 9, 16) if shared else (M, B, 7, 9, 16)
    options = epilogue(
        NAMES if not shared else ("before", "norm", "scale", "after"), 1 if shared else 3, shape, dtype, device
    )
    check_all(dy, w, size=(7, 9), stride=stride, members=members, shared=shared, **options)


def test_bits_of_more_members_than_are_wanted(device):
    torch.manual_seed(5)
    dy, w = make((1, 1, 7, 9, 16), torch.float32, device), make((1, 3, 3, 20, 16), torch.float32, device)
    bits = pack_bits_ref(make((3, 1, 7, 9, 20), torch.float32, device))
    check_all(dy, w, size=(7, 9), bits=bits)


@pytest.mark.parametrize("stride,dtype", [(1, torch.bfloat16), (2, torch.float32)])
def test_memory_on_meta_is_that_of_a_device(stride, dtype, device):
    torch.manual_seed(7)
    dy, w = make((2, 1, *out_size(3, stride, 7, 9), 16), dtype, device), make((2, 3, 3, 20, 16), dtype, device, 0.2)
    options = epilogue(NAMES, 2, (2, 1, 7, 9, 20), dtype, device) | {"members": torch.tensor([1, 0], device=device)}
    common = {"size": (7, 9), "stride": stride}
    assert_launches_alike_on_meta(member_conv_input_gradient, dy, w, **common, **options)
    assert_launches_alike_on_meta(member_conv_input_gradient, dy, w, **common, shared=True, out_dtype=torch.float32)


def test_arguments_are_checked(device):
    dy, w = torch.randn(2, 1, 5, 5, 20, device=device), torch.randn(2, 3, 3, 16, 20, device=device)
    rows, size = torch.randn(2, 16, device=device), (5, 5)
    x = torch.randn(2, 1, 5, 5, 16, device=device)
    for message, call in {
        "dy: expected 20 channels": lambda: member_conv_input_gradient(x, w, size=size),
        r"dy: expected shape \(M, B, OH": lambda: member_conv_input_gradient(dy[0], w, size=size),
        "dy: expected shape": lambda: member_conv_input_gradient(dy, w, size=(6, 5)),
        "dy: expected 2 members": lambda: member_conv_input_gradient(dy[:1], w, size=size),
        "dy: expected 1 members": lambda: member_conv_input_gradient(
            dy, w, size=size, members=torch.tensor([0], device=device)
        ),
        "stride: expected 1 or 2": lambda: member_conv_input_gradient(dy, w, size=size, stride=4),
        "before: expected contiguous": lambda: member_conv_input_gradient(dy, w, size=size, before=x[:1]),
        "after: expected contiguous": lambda: member_conv_input_gradient(dy, w, size=size, after=dy),
        "norm's x: expected": lambda: member_conv_input_gradient(dy, w, size=size, norm=(dy, rows, rows)),
        "norm's a: expected": lambda: member_conv_input_gradient(dy, w, size=size, norm=(x, rows.double(), rows)),
        "norm: expected a and b": lambda: member_conv_input_gradient(dy, w, size=size, norm=(x, rows, rows[:1])),
        "scale: expected contiguous float32": lambda: member_conv_input_gradient(
            dy, w, size=size, shared=True, scale=rows
        ),
        "bits: expected uint8": lambda: member_conv_input_gradient(dy, w, size=size, bits=pack_bits_ref(dy)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("C,size,stride", [(64, 32, 1), (128, 16, 1), (256, 8, 1), (64, 32, 2)])
def test_large(C, size, stride, dtype, device):
    torch.manual_seed(8)
    dy = make((4, 128, size // stride, size // stride, C), dtype, device)
    w = make((4, 3, 3, C, C), dtype, device, 0.05)
    members = torch.tensor([3, 0, 1, 2], device=device)
    options = epilogue(("before", "norm"), 4, (4, 128, size, size, C), dtype, device)
    check_all(dy, w, size=(size, size), stride=stride, members=members, **options)

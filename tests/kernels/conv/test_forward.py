"""`member_conv` against its float64 reference: prologue, epilogues alone and together, members, odd sizes, gradients.

Errors are norms relative to the truth's. Measured in the interpreter over all cases: float32 2.4e-7 at most, and never
more than twice the reference's plus 3e-8; bfloat16 within 2 % of the reference's (values 1.6e-3 to 3e-3, gradients to
3e-2 where sums cancel). The floors leave a processor room for another order of summation.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import assert_launches_alike_on_meta, norm_error
from conv_checks import make, true_forward
from torch import Tensor

from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.forward import member_conv, member_conv_ref
from ensdistill.kernels.epilogue import ConvOutput, pack_bits_ref, unpack_bits_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
FLOOR = {torch.float32: 2e-7, torch.bfloat16: 2e-4}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ALL = ("bias", "residual", "relu", "second", "sums", "bits")
SMALL_TILE = (0, 64, 16, 16, 4, 2)


def assert_as_good(out: Tensor, own: Tensor, truth: Tensor, dtype: torch.dtype, name: str = "") -> None:
    """The kernel's error is at most twice that of the reference in the kernel's type, plus the floor."""
    assert norm_error(out, truth) <= 2 * norm_error(own, truth) + FLOOR[dtype], name


def check_all(x: Tensor, w: Tensor, tile: tuple[int, ...] = (), **options) -> ConvOutput:
    """Run the kernel and the reference, compare everything that comes out; sums and bits belong to what is stored."""
    dtype = x.dtype
    out = member_conv(x, w, tile=tile, **options)
    own = member_conv_ref(x, w, **options)
    for name, truth in zip(("y", "z"), true_forward(x, w, **options), strict=True):
        mine, its = getattr(out, name), getattr(own, name)
        assert (mine is None) == (its is None), name
        if mine is not None:
            assert mine.dtype == (options.get("out_dtype") or dtype)
            assert_as_good(mine, its, truth, dtype, name)
    assert (out.sums is not None) == options.get("sums", False)
    if out.sums is not None and out.y is not None:
        y = out.y.double()
        scale = torch.stack((y.abs().sum((1, 2, 3)), (y * y).sum((1, 2, 3))), 1)
        expected = torch.stack((y.sum((1, 2, 3)), (y * y).sum((1, 2, 3))), 1)
        assert out.sums.dtype == torch.float32 and out.sums.shape[2:] == expected.shape[1:]
        assert ((out.sums.double().sum(1) - expected).abs() <= 1e-5 * scale).all()
    if options.get("bits"):
        assert torch.equal(out.bits, pack_bits_ref((out.y if out.z is None else out.z)[: options["bits"]]))
    return out


def epilogue(
    names: set[str], M: int, E: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, row: int = 0
):
    """Random arguments for the named epilogues; channel vectors in `row` rows (0: one a member)."""
    CO, rows = shape[-1], row or E
    values = {
        "bias": lambda: make((rows, CO), torch.float32, device),
        "residual": lambda: make((M, *shape), dtype, device),
        "relu": lambda: True,
        "second": lambda: (make((rows, CO), torch.float32, device), make((rows, CO), torch.float32, device)),
        "sums": lambda: True,
        "bits": lambda: max(1, M - 1),
    }
    return {name: values[name]() for name in names}


SHAPES = [
    # k, stride, CI, CO, B, H, W
    (3, 1, 3, 16, 3, 7, 9),
    (3, 1, 16, 24, 1, 8, 8),
    (3, 1, 64, 20, 1, 7, 9),
    (3, 2, 16, 64, 3, 8, 8),
    (3, 2, 20, 24, 1, 7, 9),
    (1, 1, 24, 10, 5, 1, 1),
    (1, 1, 64, 16, 1, 7, 9),
    (1, 2, 20, 64, 3, 7, 9),
    (1, 2, 16, 24, 1, 8, 8),
    (7, 2, 3, 24, 2, 11, 16),
    (7, 1, 16, 20, 1, 7, 9),
]


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype, device):
    k, stride, CI, CO, B, H, W = shape
    torch.manual_seed(0)
    x, w = make((2, B, H, W, CI), dtype, device), make((2, k, k, CI, CO), dtype, device, 0.2)
    check_all(x, w, stride=stride)


@TYPES
@pytest.mark.parametrize("shape", SHAPES[:5] + SHAPES[7:8], ids=str)
def test_small_tiles_with_every_epilogue_and_prologue(shape, dtype, device):
    k, stride, CI, CO, B, H, W = shape
    torch.manual_seed(1)
    x, w = make((1, B, H, W, CI), dtype, device), make((1, k, k, CI, CO), dtype, device, 0.2)
    size = tuple((n + 2 * (k // 2) - k) // stride + 1 for n in (H, W))
    options = epilogue(ALL, 1, 1, (B, *size, CO), dtype, device)
    prologue = make((1, CI), torch.float32, device), make((1, CI), torch.float32, device) + 1
    check_all(x, w, SMALL_TILE, stride=stride, prologue=prologue, **options)


@pytest.mark.parametrize("names", [*itertools.combinations(ALL, 1), *itertools.combinations(ALL, 2)], ids="+".join)
def test_epilogues_alone_and_in_pairs(names, device):
    dtype = torch.bfloat16 if "sums" in names or "bits" in names else torch.float32
    torch.manual_seed(2)
    x, w = make((2, 1, 7, 9, 16), dtype, device), make((2, 3, 3, 16, 20), dtype, device, 0.2)
    check_all(x, w, **epilogue(names, 2, 2, (1, 7, 9, 20), dtype, device))


@TYPES
@pytest.mark.parametrize("row", [0, 1], ids=["a row a member", "one row"])
@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
def test_members_are_read_on_the_device(shared, row, dtype, device):
    torch.manual_seed(3)
    E, M, members = 3, 4, torch.tensor([2, 0, 2, 1], device=device)
    x = make((3, 7, 9, 16) if shared else (M, 3, 7, 9, 16), dtype, device)
    w = make((E, 3, 3, 16, 24), dtype, device, 0.2)
    options = epilogue(("bias", "second", "sums", "bits"), M, E, (3, 7, 9, 24), dtype, device, row)
    prologue = make((row or E, 16), torch.float32, device), make((row or E, 16), torch.float32, device)
    check_all(x, w, members=members, prologue=prologue, **options)


@TYPES
def test_the_padding_is_zero_behind_a_prologue(dtype, device):
    x, w = torch.randn(1, 1, 5, 5, 16), torch.ones(1, 3, 3, 16, 16)
    x, w = x.to(dtype).to(device), w.to(dtype).to(device)
    prologue = torch.zeros(1, 16, device=device), torch.ones(1, 16, device=device)
    y = member_conv(x, w, prologue=prologue).y
    counts = torch.tensor([2.0, 3, 3, 3, 2])
    assert torch.equal(y.float().cpu()[0, 0, :, :, 0], 16 * counts[:, None] * counts[None, :])


@TYPES
def test_a_second_output_without_the_first(dtype, device):
    torch.manual_seed(4)
    x, w = make((2, 3, 7, 9, 16), dtype, device), make((2, 3, 3, 16, 24), dtype, device, 0.2)
    options = epilogue(("bias", "relu", "second", "sums", "bits"), 2, 2, (3, 7, 9, 24), dtype, device)
    both = check_all(x, w, **options)
    out = check_all(x, w, keep_y=False, **options)
    assert out.y is None and torch.equal(out.z, both.z) and torch.equal(out.sums, both.sums)


def test_output_in_another_type(device):
    torch.manual_seed(5)
    x, w = make((2, 3, 7, 9, 16), torch.bfloat16, device), make((2, 1, 1, 16, 10), torch.bfloat16, device)
    options = {"bias": make((2, 10), torch.float32, device), "out_dtype": torch.float32}
    out = member_conv(x, w, **options)
    assert out.y.dtype == torch.float32
    assert norm_error(out.y, true_forward(x, w, bias=options["bias"])[0]) < 1e-6


@pytest.mark.parametrize("C", [3, 8, 20, 64])
def test_bits_pack_and_unpack(C):
    x = torch.randn(2, 5, C)
    packed = pack_bits_ref(x)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 5, -(-C // 8))
    assert torch.equal(unpack_bits_ref(packed, C), x > 0)
    assert packed[0, 0, 0] == sum(2**j for j in range(min(8, C)) if x[0, 0, j] > 0)


@TYPES
@pytest.mark.parametrize("form", [tiles.POINTERS, tiles.BOXES, tiles.ROWS])
def test_bits_of_a_second_output_that_is_not_stored(form, dtype, device):
    x, w = make((2, 2, 7, 8, 16), dtype, device), make((2, 3, 3, 16, 24), dtype, device, 0.2)
    options = epilogue({"residual", "second"}, 2, 2, (2, 7, 8, 24), dtype, device)
    tile = (form, 64, 32, 16, 4, 2)
    stored = member_conv(x, w, bits=1, tile=tile, **options)
    out = member_conv(x, w, bits=1, keep_z=False, tile=tile, **options)
    assert out.z is None and torch.equal(out.y, stored.y)
    assert torch.equal(out.bits, pack_bits_ref(stored.z[:1]))
    assert member_conv_ref(x, w, bits=1, keep_z=False, **options).z is None
    assert 0.1 < (stored.z[:1] > 0).double().mean() < 0.9


@pytest.mark.parametrize("dtype,stride", [(torch.bfloat16, 1), (torch.float32, 2)])
def test_memory_on_meta_is_that_of_a_device(dtype, stride, device):
    torch.manual_seed(8)
    x, w = make((2, 1, 7, 9, 16), dtype, device), make((2, 3, 3, 16, 20), dtype, device, 0.2)
    size = tuple((n - 1) // stride + 1 for n in (7, 9))
    options = epilogue(ALL, 2, 2, (1, *size, 20), dtype, device)
    prologue = make((2, 16), torch.float32, device), make((2, 16), torch.float32, device)
    members = torch.tensor([1, 0], device=device)
    assert_launches_alike_on_meta(member_conv, x, w, stride=stride)
    assert_launches_alike_on_meta(
        member_conv, x, w, stride=stride, members=members, prologue=prologue, out_dtype=torch.float32, **options
    )


def test_arguments_are_checked(device):
    x, w = torch.randn(2, 1, 5, 5, 16, device=device), torch.randn(2, 3, 3, 16, 20, device=device)
    rows = torch.randn(2, 20, device=device)
    for message, call in {
        "x: expected 16 channels": lambda: member_conv(x[..., :8].contiguous(), w),
        "x: expected a contiguous": lambda: member_conv(x.transpose(2, 3), w),
        "x: expected bfloat16 or float32": lambda: member_conv(x.double(), w.double()),
        "w: expected torch.float32": lambda: member_conv(x, w.bfloat16()),
        r"w: expected \(E, k, k, CI, CO\)": lambda: member_conv(x, w[:, :2, :2].contiguous()),
        "stride: expected 1 or 2": lambda: member_conv(x, w, stride=3),
        "x: expected 3 members": lambda: member_conv(x, w, members=torch.tensor([0, 1, 1], device=device)),
        "members: expected int64": lambda: member_conv(x, w, members=torch.tensor([0, 1], device=device).int()),
        "bias: expected contiguous float32": lambda: member_conv(x, w, bias=rows[:, :16].contiguous()),
        "prologue: expected contiguous float32": lambda: member_conv(x, w, prologue=(rows, rows)),
        "second: expected a and b of one shape": lambda: member_conv(x, w, second=(rows, rows[:1].contiguous())),
        "residual: expected contiguous": lambda: member_conv(x, w, residual=x),
        "keep_y: expected True": lambda: member_conv(x, w, keep_y=False),
        "keep_y: expected True without a second output that is kept": lambda: member_conv(
            x, w, keep_y=False, keep_z=False, second=(rows, rows)
        ),
        "tile: expected a tiles.Tile": lambda: member_conv(x, w, tile=(0, 64)),
        "bits: expected 0 to 2 members": lambda: member_conv(x, w, bits=3),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for function in (member_conv, member_conv_ref):
        with pytest.raises(TypeError, match="unexpected keyword argument 'strides'"):
            function(x, w, strides=2)
        with pytest.raises(TypeError, match="positional"):
            function(x, w, 2)


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("C,size", [(64, 32), (128, 16), (256, 8)])
def test_large(C, size, dtype, device):
    torch.manual_seed(9)
    x, w = make((4, 128, size, size, C), dtype, device), make((4, 3, 3, C, C), dtype, device, 0.05)
    members = torch.tensor([3, 0, 1, 2], device=device)
    options = epilogue(
        {"bias", "residual", "relu", "second", "sums", "bits"}, 4, 4, (128, size, size, C), dtype, device
    )
    check_all(x, w, members=members, **options)


@TYPES
@pytest.mark.parametrize("block_k", [32, 64, 256])
@pytest.mark.parametrize(("CI", "shared"), [(3, True), (1, False)])
def test_a_first_convolution_of_7x7_in_steps(CI, shared, block_k, dtype, device):
    M, B, H, W, CO = 2, 2, 13, 10, 20
    x = make((B, H, W, CI) if shared else (M, B, H, W, CI), dtype, device)
    w = make((M, 7, 7, CI, CO), dtype, device, 0.1)
    prologue = (make((M, CI), torch.float32, device), make((M, CI), torch.float32, device))
    members = torch.tensor([1, 0], device=device)
    for options in ({"members": members}, {"prologue": prologue, "relu": True, "sums": True, "bits": 1}):
        check_all(x, w, stride=2, tile=(0, 64, 32, block_k, 4, 3), **options)


# POINTERS tiles of a network's first convolution: BLOCK_K 32 and 64 hold all taps and channels, 16 is walked tap by tap
@TYPES
@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize(("CI", "stride", "shared"), [(3, 1, True), (3, 2, False), (1, 1, True), (7, 1, False)])
def test_few_channels_lie_beside_the_taps(CI, stride, shared, block_k, dtype, device):
    M, B, H, W, CO = 2, 3, 7, 9, 20
    x = make((B, H, W, CI) if shared else (M, B, H, W, CI), dtype, device)
    w = make((M, 3, 3, CI, CO), dtype, device, 0.3)
    prologue = (make((M, CI), torch.float32, device), make((M, CI), torch.float32, device))
    for options in ({}, {"prologue": prologue, "relu": True, "sums": True, "bits": 1}):
        check_all(x, w, stride=stride, tile=(0, 128, 32, block_k, 4, 2), **options)


@TYPES
@pytest.mark.parametrize("CI", [3, 16])
def test_what_is_no_number_stays_none(CI, dtype, device):
    """A diverged network must not look like a trained one: no ReLU makes 0 of NaN."""
    x, w = make((2, 1, 8, 8, CI), dtype, device), make((2, 3, 3, CI, 16), dtype, device)
    x[0, 0, 3, 4, 1] = torch.nan
    ones = torch.ones(1, CI, device=device), torch.zeros(1, CI, device=device)
    second = torch.ones(1, 16, device=device), torch.zeros(1, 16, device=device)
    for options in ({"relu": True}, {"second": second, "keep_y": False}, {"prologue": ones}):
        out = member_conv(x, w, tile=(0, 64, 16, 32, 4, 2), **options)
        nan = (out.y if out.z is None else out.z).isnan()
        assert nan[0, 0, 2:5, 3:6].all() and nan.sum() == 9 * 16

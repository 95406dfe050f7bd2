"""The forms of `member_conv` and its input gradient that load boxes: a tap, a row, or rows past resident weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_checks import check_forward, check_gradient, make
from torch import Tensor

from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.forms import rows
from ensdistill.kernels.conv.forms.descriptors import choose_box, choose_row
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.tiles import BOXES, ROWS, TAP_ROWS, Tile
from ensdistill.kernels.epilogue import pack_bits_ref
from ensdistill.kernels.launch import recording

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FORMS = pytest.mark.parametrize("form", [BOXES, ROWS, TAP_ROWS], ids=["boxes", "rows", "tap rows"])

SHAPES = [
    # M, B, H, W, read, columns, BLOCK_M, BLOCK_N, BLOCK_K
    (2, 3, 7, 9, 16, 24, 64, 32, 16),  # pixels beyond the image and images beyond the batch
    (2, 4, 8, 8, 8, 10, 64, 16, 16),  # fewer channels than a tile has, rows of w that are no whole 16 bytes
    (1, 64, 2, 3, 16, 16, 64, 16, 16),  # a box of images alone; one column wider than the image for rows
    (1, 2, 16, 5, 40, 64, 128, 64, 64),  # two strips
]
BOXES_ONLY = [
    (1, 2, 5, 4, 72, 40, 32, 32, 32),  # three blocks of channels, two of columns, both with a rest
    (1, 64, 1, 2, 16, 384, 64, 256, 16),  # an accumulator that the epilogue takes in halves, the last one empty
    (1, 64, 2, 3, 8, 20, 128, 32, 16),  # two pixels a tile, the last one outside
]
TAP_ROWS_ONLY = [
    (2, 3, 1, 3, 16, 24, 8, 32, 16),  # one row, a column beyond the image, images beyond the batch
    (1, 5, 3, 4, 24, 40, 8, 32, 16),  # two boxes of images, two blocks of channels and two of columns, all with a rest
    (1, 6, 2, 1, 8, 10, 16, 16, 16),  # one column of pixels, rows of w that are no whole 16 bytes
    (1, 64, 1, 2, 16, 384, 128, 256, 16),  # accumulators that the epilogue takes in halves, the last one empty
]
ON_A_GPU = [
    (BOXES, (4, 128, 16, 16, 128, 128, 128, 128, 64)),
    (BOXES, (4, 128, 16, 16, 128, 128, 256, 128, 64)),
    (BOXES, (4, 100, 8, 8, 256, 256, 128, 256, 64)),
    (ROWS, (4, 128, 32, 32, 64, 64, 128, 64, 64)),
    (ROWS, (4, 128, 32, 32, 64, 64, 64, 64, 64)),
    (ROWS, (1, 128, 32, 32, 64, 64, 64, 64, 64)),  # strips
    (ROWS, (2, 100, 28, 28, 32, 64, 64, 64, 32)),
    (TAP_ROWS, (4, 128, 16, 16, 128, 128, 256, 128, 32)),
    (TAP_ROWS, (2, 100, 7, 9, 256, 256, 256, 128, 32)),
]
EVERYWHERE = [
    *((form, shape) for form in (BOXES, ROWS) for shape in SHAPES),
    *((BOXES, shape) for shape in BOXES_ONLY),
    *((TAP_ROWS, shape) for shape in TAP_ROWS_ONLY),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tile_of(form: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tile:
    """The tile of a shape, with as many stages as fit, 3 at most."""
    warps = 8 if shape[6] * shape[7] > 64 * 64 else 4
    stages = (Tile(form, *shape[6:], warps, stages) for stages in (3, 2, 1))
    return next(tile for tile in stages if fits(tile, dtype) or tile.num_stages == 1)


def fits(tile: Tile, dtype: torch.dtype) -> bool:
    return tiles.shared_bytes(tile, dtype.itemsize) <= tiles.SHARED_LIMIT[90]


CASES = pytest.mark.parametrize(
    ("form", "shape", "dtype"),
    [
        pytest.param(form, shape, dtype, id=f"{form}-{shape}-{name}", marks=marks)
        for cases, marks in ((EVERYWHERE, ()), (ON_A_GPU, pytest.mark.gpu))
        for form, shape in cases
        for name, dtype in DTYPES.items()
        if fits(tile_of(form, shape, dtype), dtype)  # ROWS of 64 channels do not in fp32
    ],
)


def small_shape(form: int) -> tuple[int, ...]:
    return TAP_ROWS_ONLY[0] if form == TAP_ROWS else SHAPES[0]


@pytest.fixture(autouse=True)
def same_draws():
    torch.manual_seed(0)


@CASES
def test_plain(form, shape, dtype, device):
    M, B, H, W, read, columns = shape[:6]
    x, tile = make((M, B, H, W, read), dtype, device), tile_of(form, shape, dtype)
    check_forward(x, make((M, 3, 3, read, columns), dtype, device, 0.2), tile)
    check_gradient(x, make((M, 3, 3, columns, read), dtype, device, 0.2), tile)


@CASES
def test_everything_at_once(form, shape, dtype, device):
    M, B, H, W, read, columns = shape[:6]
    x, tile = make((M, B, H, W, read), dtype, device), tile_of(form, shape, dtype)
    out = (M, B, H, W, columns)

    def vector(channels: int = columns) -> Tensor:
        return make((M, channels), torch.float32, device)

    check_forward(
        x,
        make((M, 3, 3, read, columns), dtype, device, 0.2),
        tile,
        prologue=(vector(read), vector(read) + 1),  # relu(b) is not 0: it must not leak in from the padding
        bias=vector(),
        residual=make(out, dtype, device),
        relu=True,
        second=(vector(), vector()),
        sums=True,
        bits=1,
    )
    check_gradient(
        x,
        make((M, 3, 3, columns, read), dtype, device, 0.2),
        tile,
        before=make(out, dtype, device),
        bits=pack_bits_ref(make(out, dtype, device)),
        norm=(make(out, dtype, device), vector(), vector()),
        scale=vector(),
        after=make(out, dtype, device),
    )


@TYPES
@FORMS
@pytest.mark.parametrize("name", ["bias", "relu", "residual", "second", "z alone", "sums", "bits", "prologue"])
def test_forward_options_alone(name, form, dtype, device):
    shape = small_shape(form)
    M, B, H, W, read, columns = shape[:6]
    options: dict[str, Any] = {
        "bias": lambda: {"bias": make((1, columns), torch.float32, device)},
        "relu": lambda: {"relu": True},
        "residual": lambda: {"residual": make((M, B, H, W, columns), dtype, device)},
        "second": lambda: {"second": (make((M, columns), torch.float32, device),) * 2},
        "z alone": lambda: {"second": (make((1, columns), torch.float32, device),) * 2, "keep_y": False},
        "sums": lambda: {"sums": True},
        "bits": lambda: {"bits": M},
        "prologue": lambda: {"prologue": (torch.ones(1, read, device=device), torch.ones(1, read, device=device))},
    }[name]()
    x = make((M, B, H, W, read), dtype, device)
    check_forward(x, make((M, 3, 3, read, columns), dtype, device, 0.2), tile_of(form, shape, dtype), **options)


@TYPES
@FORMS
@pytest.mark.parametrize("name", ["before", "bits", "norm", "scale", "after"])
def test_gradient_options_alone(name, form, dtype, device):
    shape = small_shape(form)
    M, B, H, W, read, columns = shape[:6]

    def like() -> Tensor:
        return make((M, B, H, W, columns), dtype, device)

    vectors = [make((1, columns), torch.float32, device) for _ in range(2)]
    value = {"bits": lambda: pack_bits_ref(like()), "norm": lambda: (like(), *vectors), "scale": lambda: vectors[0]}
    dy = make((M, B, H, W, read), dtype, device)
    w = make((M, 3, 3, columns, read), dtype, device, 0.2)
    check_gradient(dy, w, tile_of(form, shape, dtype), **{name: value.get(name, like)()})


@TYPES
@FORMS
@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
def test_members_are_read_on_the_device(shared, form, dtype, device):
    E, M, shape, members = 3, 4, small_shape(form), torch.tensor([2, 0, 2, 1], device=device)
    _, B, H, W, read, columns = shape[:6]
    tile = tile_of(form, shape, dtype)
    tile = tile if form == TAP_ROWS else tile._replace(BLOCK_M=128)
    x = make((B, H, W, read) if shared else (M, B, H, W, read), dtype, device)
    w = make((E, 3, 3, read, columns), dtype, device, 0.2)
    prologue = make((E, read), torch.float32, device), make((E, read), torch.float32, device) + 1
    bias = make((E, columns), torch.float32, device)
    check_forward(x, w, tile, members=members, prologue=prologue, bias=bias, sums=True, bits=2)
    if not shared:
        w = make((E, 3, 3, columns, read), dtype, device, 0.2)
        check_gradient(x, w, tile, members=members, scale=bias)


@TYPES
@pytest.mark.parametrize("size", [(1, 1), (5, 7)], ids=str)
def test_boxes_of_one_tap(size, dtype, device):
    M, B, read, columns = 2, 5, 24, 10
    tile = Tile(BOXES, 64, 16, 32, 4, 2)
    x = make((M, B, *size, read), dtype, device)
    prologue = make((M, read), torch.float32, device), make((M, read), torch.float32, device)
    check_forward(x, make((M, 1, 1, read, columns), dtype, device, 0.2), tile, prologue=prologue)
    check_gradient(x, make((M, 1, 1, columns, read), dtype, device, 0.2), tile)


def test_boxes_cover_and_waste_little():
    for B, H, W, pixels in [(128, 32, 32, 128), (128, 7, 7, 128), (100, 28, 28, 256), (3, 7, 9, 64), (1, 1, 1, 128)]:
        box = choose_box(B, H, W, pixels)
        assert pixels == box.TH * box.TW * box.BI and box.tiles(B, H, W) * pixels >= B * H * W
    assert choose_box(128, 7, 7, 128) == (1, 1, 128)
    assert choose_box(128, 16, 16, 256) == (1, 2, 128)
    assert choose_row(128, 32, 128) == (1, 32, 4)
    assert choose_row(128, 28, 128) == (1, 4, 32)


def test_strips_fill_the_device_and_reach_the_last_row():
    choose_strip = rows.choose_strip
    tile = Tile(ROWS, 128, 64, 64, 8, 3)
    assert choose_strip(128, 32, tile, 2) == 32
    assert choose_strip(64, 32, tile, 2) == 16
    assert choose_strip(1, 9, tile, 2) == 5
    assert choose_strip(1, 3, tile, 2) == 3
    two, large = Tile(ROWS, 64, 64, 64, 4, 2), Tile(ROWS, 64, 64, 64, 4, 3)
    assert choose_strip(128, 32, two, 2) == 16  # two programs a multiprocessor have room
    assert choose_strip(128, 32, large, 2) == 32  # one has


@pytest.mark.parametrize(
    ("tile", "shared", "programs"),
    [
        # shared bytes as compiled for 9.0 by Triton 3.6, less 1,024 that each block has more, and barriers
        (Tile(ROWS, 64, 64, 64, 4, 2), 106_496, 2),
        (Tile(ROWS, 64, 64, 64, 4, 3), 131_072, 1),
        (Tile(ROWS, 128, 64, 64, 8, 3), 188_416, 1),
        (Tile(BOXES, 64, 128, 64, 4, 3), 73_728, 2),
        (Tile(BOXES, 256, 128, 64, 8, 3), 147_456, 1),
        (Tile(TAP_ROWS, 256, 128, 32, 8, 4), 229_376, 1),
        (Tile(TAP_ROWS, 256, 128, 32, 8, 3), 172_032, 1),
    ],
    ids=str,
)
def test_programs_of_a_multiprocessor(tile, shared, programs):
    assert tiles.shared_bytes(tile, 2) == shared
    assert tiles.programs_per_multiprocessor(tile, 2) == programs


def test_candidates_fit_and_large_tiles_come_first_where_they_fill_the_device(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    candidates = tiles.forward_tiles.__wrapped__
    for dtype in (torch.float32, torch.bfloat16):
        for M, B, H, CI, CO, k in [
            (4, 128, 32, 64, 64, 3), (4, 128, 32, 16, 64, 3), (4, 128, 16, 128, 128, 3), (4, 128, 8, 256, 256, 3),
            (1, 128, 8, 256, 256, 3), (2, 100, 7, 512, 512, 3), (4, 128, 1, 256, 100, 1), (1, 1, 4, 8, 8, 1),
        ]:  # fmt: skip
            for arch, limit in tiles.SHARED_LIMIT.items():
                monkeypatch.setattr(tiles, "assumed_capability", arch)
                forms = tiles.limits(torch.device("meta"))[1]
                found = candidates(M, B, H, H, CI, CO, k, 1, dtype, shared_limit=limit, forms=forms)
                assert len(found) == len(set(found)) > 0 and {tile.form for tile in found} <= set(forms)
                assert all(tiles.shared_bytes(tile, dtype.itemsize) <= limit - 2048 for tile in found)
    shape = {"dtype": torch.bfloat16, "k": 3, "stride": 1}
    assert candidates(4, 128, 16, 16, 128, 128, **shape)[0] == Tile(TAP_ROWS, 256, 128, 32, 8, 4)
    assert candidates(4, 100, 16, 16, 128, 128, **shape)[0] == Tile(BOXES, 256, 128, 64, 8, 3)  # no pairs of pixels
    assert candidates(1, 128, 8, 8, 256, 256, **shape)[0] == Tile(BOXES, 64, 128, 64, 4, 3)
    assert candidates(4, 128, 32, 32, 64, 64, **shape)[0] == Tile(ROWS, 64, 64, 64, 4, 2)


@FORMS
def test_recorded_on_meta(form):
    x = torch.empty(2, 4, 8, 8, 64, dtype=torch.bfloat16, device="meta")
    w = torch.empty(2, 3, 3, 64, 64, dtype=torch.bfloat16, device="meta")
    launches: list[Any] = []
    with recording(lambda *launch: launches.append(launch)):
        member_conv(x, w, tile=Tile(form, 64, 64, 64, 4, 2))
        member_conv_input_gradient(x, w, size=(8, 8), tile=Tile(form, 64, 64, 64, 4, 2))
    assert len(launches) == 2
    for _, grid, args, options in launches:
        assert args[0].block_shape[-1] == 64 and 0 not in grid and options["num_warps"] == 4


@pytest.mark.parametrize(
    ("channels", "kernel", "tile", "message"),
    [
        (12, 3, Tile(BOXES, 64, 16, 16, 4, 2), "tile: expected the POINTERS form"),
        (12, 3, Tile(ROWS, 64, 16, 16, 4, 2), "tile: expected the POINTERS form"),
        (16, 1, Tile(ROWS, 64, 16, 16, 4, 2), "tile: expected the POINTERS or BOXES form"),
        (32, 3, Tile(ROWS, 64, 16, 16, 4, 2), "tile: expected room for 32"),
        (16, 3, Tile(BOXES, 1 << 14, 16, 16, 4, 1), "tile: expected at most 232448 bytes of shared memory"),
        (16, 3, Tile(TAP_ROWS, 1024, 16, 16, 4, 1), "tile: expected BLOCK_M of at most 512"),
        (64, 3, Tile(ROWS, 128, 64, 64, 8, 4), "tile: expected at most 232448 bytes of shared memory"),
    ],
    ids=str,
)
def test_tiles_that_do_not_fit(channels, kernel, tile, message, device):
    x = make((1, 1, 8, 8, channels), torch.bfloat16, device)
    with pytest.raises(ValueError, match=message):
        member_conv(x, make((1, kernel, kernel, channels, 16), torch.bfloat16, device), tile=tile)

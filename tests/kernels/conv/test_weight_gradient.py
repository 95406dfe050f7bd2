"""`member_conv_weight_gradient` against its float64 reference: forms, splits, prologue, shared input, odd sizes.

Relative errors (norms) in the interpreter: fp32 3e-8 to 2.4e-7, the reference's 3e-8 to 1.7e-7; bf16 up to 9e-8 without
and 1.4e-3 to 1.8e-3 with a prologue, whose output is rounded, the reference's 1.6e-3 to 2.5e-3. The floor is of fp32's
size for both types.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_launches_alike_on_meta, norm_error
from conv_checks import true_weight_gradient
from torch import Tensor

from ensdistill.kernels.conv.tiles import POINTERS, ROWS, SHARED_LIMIT
from ensdistill.kernels.conv.weight_gradient import (
    member_conv_weight_gradient,
    member_conv_weight_gradient_ref,
    weight_gradient_splits,
)
from ensdistill.kernels.conv.weight_gradient_tiles import WeightGradientTile, rows_width, weight_gradient_tiles
from ensdistill.kernels.launch import INTERPRETED

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
FLOOR = 3e-7
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def operands(M, B, H, W, CI, CO, kernel, stride, *, shared=False, prologue=0, dtype=torch.float32, device="cpu"):
    """Random x, dy and prologue (a, b) of `prologue` rows, b so large that relu(b) in the padding would show."""
    generator = torch.Generator().manual_seed(H * W + CI)
    OH, OW = ((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in (H, W))
    shapes = [(B, H, W, CI) if shared else (M, B, H, W, CI), (M, B, OH, OW, CO)]
    x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    pair = tuple(torch.randn(prologue, CI, generator=generator).add(c).to(device) for c in (0, 1)) if prologue else None
    return x, dy, pair


def check(x, dy, pair, kernel, stride, tile=()) -> Tensor:
    options = {"kernel": kernel, "stride": stride}
    out = member_conv_weight_gradient(x, dy, prologue=pair, tile=tile, **options)
    own = member_conv_weight_gradient_ref(x, dy, prologue=pair, **options)
    truth = true_weight_gradient(x, dy, prologue=pair, **options)
    assert out.dtype == own.dtype == torch.float32 and out.is_contiguous() and truth.dtype == torch.float64
    allowed = norm_error(own, truth)
    assert allowed <= 0.01
    assert norm_error(out, truth) <= 2 * allowed + FLOOR
    return out


@TYPES
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 7, 9, 20, 24),
        (3, 1, 8, 8, 3, 16),
        (1, 1, 1, 1, 5, 7),
        (2, 2, 5, 4, 16, 64),
        pytest.param((4, 128, 32, 32, 64, 64), marks=pytest.mark.gpu),
        pytest.param((4, 127, 15, 17, 128, 128), marks=pytest.mark.gpu),
        pytest.param((3, 128, 8, 8, 256, 100), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_default_tile(shape, kernel, stride, dtype, device):
    check(*operands(*shape, kernel, stride, dtype=dtype, device=device), kernel, stride)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 1), (1, 2)], ids=str)
def test_library_on_maps_where_a_column_meets_no_pixel(size, grouped):
    x, dy, _ = operands(2, 1, *size, 16, 16, 3, 2, dtype=torch.bfloat16)
    own = member_conv_weight_gradient_ref(x, dy, kernel=3, stride=2, grouped=grouped)
    assert norm_error(own, true_weight_gradient(x, dy, kernel=3, stride=2)) <= 0.01


@pytest.mark.parametrize(
    "shared, prologue, dtype",
    [
        (False, 0, torch.float32),
        (False, 0, torch.bfloat16),
        (False, 3, torch.bfloat16),
        (True, 0, torch.bfloat16),
        (True, 1, torch.float32),
        (True, 3, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    "kernel, stride, tile",
    [
        (3, 1, ()),
        (3, 2, WeightGradientTile(POINTERS, 16, 16, 32, 4, 2, 1)),
        (1, 2, WeightGradientTile(POINTERS, 16, 16, 16, 4, 2, 2)),
        (3, 1, WeightGradientTile(POINTERS, 256, 64, 16, 8, 3, 3)),  # columns by rows, splits of unequal length
        (3, 1, WeightGradientTile(ROWS, 16, 16, 16, 4, 2, 1)),
        (3, 1, WeightGradientTile(ROWS, 32, 32, 32, 4, 2, 4)),
    ],
    ids=str,
)
def test_forms_and_prologue(kernel, stride, tile, shared, prologue, dtype, device):
    if tile and tile[0] == ROWS and not rows_width(device, 3, 1, 7):
        pytest.skip("needs compute capability 9")
    x, dy, pair = operands(
        3, 3, 5, 7, 20, 24, kernel, stride, shared=shared, prologue=prologue, dtype=dtype, device=device
    )
    if INTERPRETED and tile and -(-kernel * kernel * 20 // tile[1]) * tile[6] > 4:
        x, dy = x[..., :8].contiguous(), dy[..., :12].contiguous()  # fewer programs
        pair = pair and tuple(v[:, :8].contiguous() for v in pair)
    check(x, dy, pair, kernel, stride, tile)


@TYPES
@pytest.mark.parametrize("shared", [False, True], ids=["own x", "shared x"])
@pytest.mark.parametrize("tile", [(), (POINTERS, 256, 32, 32, 4, 2, 2)], ids=str)
def test_a_first_convolution_of_7x7(tile, shared, dtype, device):
    x, dy, _ = operands(2, 2, 11, 16, 3, 20, 7, 2, shared=shared, dtype=dtype, device=device)
    check(x, dy, None, 7, 2, tile)


@pytest.mark.parametrize(
    "CI, tile", [(32, (POINTERS, 16, 16, 64, 4, 2, 1)), (16, (ROWS, 16, 16, 16, 4, 2, 1))], ids=str
)
def test_one_tap_a_tile_and_whole_blocks(CI, tile, device):
    """No mask but the padding's: rows, columns and pixels fill their blocks."""
    if tile[0] == ROWS and not rows_width(device, 3, 1, 8):
        pytest.skip("needs compute capability 9")
    x, dy, pair = operands(1, 2, 4, 8, CI, 16, 3, 1, prologue=1, dtype=torch.bfloat16, device=device)
    check(x, dy, pair, 3, 1, tile)


@pytest.mark.parametrize("splits", [1, 3, 20])
@pytest.mark.parametrize("shared", [False, True])
def test_parts_add_up(shared, splits, device):
    """As many as there is room for, also more than there are steps."""
    x, dy, pair = operands(2, 2, 6, 5, 12, 20, 3, 1, shared=shared, prologue=1, dtype=torch.bfloat16, device=device)
    parts = torch.empty(splits, 2, 3, 3, 12, 20, device=device)
    tile = WeightGradientTile(POINTERS, 128, 64, 16, 4, 2, 5)
    assert member_conv_weight_gradient(x, dy, kernel=3, prologue=pair, parts=parts, tile=tile) is parts
    truth = true_weight_gradient(x, dy, kernel=3, prologue=pair)
    own = member_conv_weight_gradient_ref(x, dy, kernel=3, prologue=pair)
    assert norm_error(parts.sum(0), truth) <= 2 * norm_error(own, truth) + FLOOR


def test_default_splits_are_the_default_tile_s(device):
    x, dy, _ = operands(2, 2, 6, 5, 12, 20, 3, 1, device=device)
    tile = weight_gradient_tiles(2, 60, 108, 20, x.dtype, width=rows_width(device, 3, 1, 5))[0]
    assert weight_gradient_splits(x, dy.to("meta"), kernel=3) == tile.splits


def test_same_bits_every_time(device):
    x, dy, pair = operands(2, 2, 6, 5, 12, 20, 3, 1, prologue=2, dtype=torch.bfloat16, device=device)
    tile = WeightGradientTile(POINTERS, 128, 32, 16, 4, 2, 3)
    first, second = (member_conv_weight_gradient(x, dy, kernel=3, prologue=pair, tile=tile) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shared, prologue", [(False, 0), (True, 2)])
def test_memory_on_meta_is_that_of_a_device(shared, prologue, device):
    x, dy, pair = operands(2, 1, 3, 4, 5, 6, 3, 1, shared=shared, prologue=prologue, device=device)
    options = {"kernel": 3, "prologue": pair}
    assert_launches_alike_on_meta(member_conv_weight_gradient, x, dy, **options)
    parts = torch.zeros(2, 2, 3, 3, 5, 6, device=device)

    def into_parts(x: Tensor, dy: Tensor, parts: Tensor, **options: Any) -> None:
        assert member_conv_weight_gradient(x, dy, parts=parts, **options) is parts

    assert_launches_alike_on_meta(into_parts, x, dy, parts, writes=[parts], **options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one tile a shape")
@pytest.mark.parametrize(
    "shape", [(4, 128, 32, 64, 64), (4, 128, 16, 128, 128), (4, 128, 8, 256, 256), (1, 3, 7, 20, 24)]
)
@TYPES
def test_every_candidate(shape, dtype, device):
    M, B, H, CI, CO = shape
    width = rows_width(device, 3, 1, H)
    for tile in weight_gradient_tiles(M, B * H * H, 9 * CI, CO, dtype, width=width):
        check(*operands(M, B, H, H, CI, CO, 3, 1, dtype=dtype, device=device), 3, 1, tile)


def test_candidates_fit(monkeypatch):
    """Shared memory stays in the limit; a wide ROWS form is offered first where it was made for."""
    from ensdistill.kernels.conv import weight_gradient_tiles as tiles

    monkeypatch.setattr(tiles, "INTERPRETED", False)
    candidates = tiles.weight_gradient_tiles.__wrapped__
    for limit in set(SHARED_LIMIT.values()):
        for rows, columns in ((27, 64), (576, 64), (144, 16), (2304, 256), (45, 7), (256, 100)):
            for dtype in (torch.bfloat16, torch.float32):
                found = candidates(4, 131072, rows, columns, dtype, shared_limit=limit)
                assert found and len(set(found)) == len(found)
                for tile in found:
                    assert tile.num_stages * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize < limit
                    assert 1 <= tile.splits <= tiles.MAX_SPLITS
    for channels, size, splits in ((64, 32, 33), (128, 16, 8), (256, 8, 2)):
        first = candidates(4, 128 * size**2, 9 * channels, channels, torch.bfloat16, width=size)[0]
        assert (first.form, first.splits) == (ROWS, splits)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 3, 4)}, "x: expected contiguous"),
        ({"x": torch.ones(2, 1, 4, 4, 3)}, "dy: expected shape"),
        ({"x": torch.ones(2, 1, 4, 5, 3).transpose(2, 3)}, "x: expected contiguous"),
        ({"x": torch.ones(3, 1, 5, 4, 3)}, "x: expected 2 members as in dy"),
        ({"x": torch.ones(2, 1, 5, 4, 3, dtype=torch.float64)}, "x: expected bf16 or fp32"),
        ({"kernel": 2}, "kernel: expected 1, 3 or 7, got 2"),
        ({"stride": 0}, "stride: expected at least 1, got 0"),
        ({"stride": 2}, "dy: expected shape"),
        ({"dy_MBHWC": torch.ones(2, 1, 5, 4, 6, dtype=torch.bfloat16)}, "dy: expected torch.float32"),
        ({"prologue": (torch.ones(2, 4), torch.ones(2, 3))}, "prologue's a: expected contiguous fp32"),
        ({"prologue": (torch.ones(2, 3), torch.ones(1, 3))}, r"prologue's b: expected shape \(2, 3\)"),
        ({"tile": (0, 16)}, "tile: expected"),
        ({"parts": torch.ones(2, 3, 3, 3, 6)}, r"parts: expected contiguous fp32 \(S, 2, 3, 3, 3, 6\)"),
        ({"parts": torch.ones(1, 2, 3, 3, 3, 6).bfloat16()}, "parts: expected contiguous fp32"),
        ({"tile": (ROWS, 16, 16, 2, 4, 2, 1)}, "tile: expected the ROWS form only"),
    ],
)
def test_errors(change, message):
    arguments = {"x": torch.ones(2, 1, 5, 4, 3), "dy_MBHWC": torch.ones(2, 1, 5, 4, 6), "kernel": 3} | change
    x, dy = arguments.pop("x"), arguments.pop("dy_MBHWC")
    with pytest.raises(ValueError, match=message):
        member_conv_weight_gradient(x, dy, **arguments)

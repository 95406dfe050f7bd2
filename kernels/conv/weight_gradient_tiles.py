"""Tiles that a weight gradient is computed with: candidates in the order of a guess at their time.

The guess takes an H100's rates and counts whole waves of programs: splitting the pixels fills the multiprocessors and
costs a write and a read of each of the partial sums, which the gradients of the parameters are made of. Measuring the
candidates is somebody else's work.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ensdistill.kernels.conv.tiles import POINTERS, ROWS, SHARED_LIMIT, capability
from ensdistill.kernels.launch import INTERPRETED, MAX_INTERPRETED_PROGRAMS, MAX_TILE, cdiv, power_of_2

NUM_SMS = 132
"""Multiprocessors of an H100: a constant, so that a machine without a GPU compiles what the GPU will run."""
MAX_SPLITS = 256
"""Parts that the pixels are split into at most."""
ROWS_MAX_WIDTH = 128
"""Widest image of the ROWS form."""


class WeightGradientTile(NamedTuple):
    """Cut of the product.

    POINTERS: BLOCK_M rows (kh, kw, ci) by BLOCK_N columns by BLOCK_K pixels a step. ROWS: BLOCK_M input by BLOCK_N
    output channels with all nine taps, BLOCK_K pixels of BLOCK_K // W images a step. `splits` programs share the steps.
    """

    form: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    splits: int


def rows_width(device: torch.device, kernel: int, stride: int, W: int) -> int:
    """Give W where the ROWS form serves such a convolution on `device`, else 0: compute capability 9, 3×3, stride 1."""
    serves = (kernel, stride) == (3, 1) and W <= ROWS_MAX_WIDTH and capability(device) // 10 == 9
    return W if serves else 0


def _microseconds(
    tile: WeightGradientTile, M: int, pixels: int, rows: int, columns: int, width: int, size: int
) -> float:
    """Guess the time on an H100: arithmetic or reads from L2, in whole waves of programs, and the partial sums."""
    taps, shape = 1, (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K)
    loaded, per_step, output = tile.BLOCK_M + tile.BLOCK_N, tile.BLOCK_K, rows
    if tile.form == ROWS:
        taps, loaded, per_step, output = 9, 3 * loaded, tile.BLOCK_K // width * width, rows // 9
    tiles = M * cdiv(output, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_N)
    arithmetic = 2 * taps * shape[0] * shape[1] * shape[2] / (800e6 if size == 2 else 40e6)
    step = NUM_SMS * max(arithmetic, loaded * tile.BLOCK_K * size / 5.5e6)
    programs = tiles * tile.splits
    # 2 µs fill the pipeline and write the sums; one program a multiprocessor leaves its latencies open
    time = cdiv(programs, NUM_SMS) * (cdiv(cdiv(pixels, per_step), tile.splits) * step + 2)
    time *= 1.0 if programs >= 2 * NUM_SMS else 1.1 if tile.form == ROWS or programs > NUM_SMS else 1.25
    return time + 8 * tile.splits * M * rows * columns / 3e6


def _interpreted(M: int, pixels: int, rows: int, columns: int) -> WeightGradientTile:
    """Only tile for the interpreter: as few programs as MAX_TILE allows."""
    BLOCK_M, BLOCK_N = min(max(16, power_of_2(rows)), 128), min(max(16, power_of_2(columns)), 256)
    while (
        M * cdiv(rows, BLOCK_M) * cdiv(columns, BLOCK_N) > MAX_INTERPRETED_PROGRAMS
        and 2 * BLOCK_M * BLOCK_N <= MAX_TILE
    ):
        BLOCK_M *= 2
    BLOCK_K = max(16, min(power_of_2(pixels), MAX_TILE // max(BLOCK_M, BLOCK_N) // 2))
    return WeightGradientTile(POINTERS, BLOCK_M, BLOCK_N, BLOCK_K, 4, 1, 1)


def _shapes(rows: int, columns: int, width: int, size: int, shared_limit: int) -> list[tuple[int, ...]]:
    """(form, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages) that rows and columns fill to more than a half."""
    height, columns = max(16, power_of_2(rows)), max(16, power_of_2(columns))
    if size == 4:  # no tensor cores: the registers of a smaller tile
        shapes = [(64, 64, 16, 4, 3), (128, 64, 16, 8, 3), (64, 32, 16, 4, 3), (32, 32, 32, 4, 3)]
        smallest = (16, 16, 32, 2, 3)
    elif rows % 16 and height > 64:  # a few channels: x is gathered value by value, whose addresses take registers
        shapes = [
            (128, 128, 32, 8, 3),
            (128, 64, 32, 8, 3),
            (64, 128, 64, 8, 3),
            (64, 64, 64, 8, 3),
            (64, 64, 32, 4, 4),
        ]
        shapes += [(128, 32, 32, 4, 3), (128, 16, 32, 4, 3), (64, 32, 32, 4, 4), (64, 16, 32, 4, 4)]
        smallest = (16, 16, 64, 2, 4)
    else:
        shapes = [(256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (256, 64, 64, 8, 3), (128, 64, 64, 4, 3)]
        shapes += [(64, 128, 64, 8, 3), (64, 64, 64, 4, 4), (256, 32, 64, 8, 3), (128, 32, 64, 4, 3)]
        shapes += [(256, 16, 64, 8, 3), (128, 16, 64, 4, 3), (64, 32, 64, 4, 4), (32, 64, 64, 4, 4), (32, 32, 64, 4, 4)]
        if shared_limit >= SHARED_LIMIT[90]:  # products of a whole warpgroup; by single warps they spill on 8.0
            shapes += [(16, 64, 64, 4, 4), (64, 16, 64, 4, 4)]
        smallest = (16, 16, 64, 2, 4)
    fitting: list[tuple[int, ...]] = [
        (POINTERS, *shape) for shape in shapes if shape[0] <= height and shape[1] <= columns
    ]
    channels = power_of_2(cdiv(rows, 9))
    if size == 2 and width and columns >= 64 and channels >= 16:
        BLOCK_K = 64 if width <= 64 else 128
        BLOCK_M = min(64, channels)
        fitting += [(ROWS, BLOCK_M, 64, BLOCK_K, 8, stages) for stages in ((3, 4) if BLOCK_K == 64 else (2,))]
    return fitting or [(POINTERS, *smallest)]


@functools.cache
def weight_gradient_tiles(
    M: int,
    pixels: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    width: int = 0,
    shared_limit: int = SHARED_LIMIT[90],
) -> list[WeightGradientTile]:
    """Candidates, best guess first, for M products of `rows` (k·k·CI) × `columns` over `pixels` (B·OH·OW).

    Members that share x without a prologue of their own are columns: M = 1, columns = members · CO.

    Args:
        width: `rows_width` if the columns are one member's: where it is not 0 the ROWS form is offered too.
        shared_limit: bytes of shared memory that a block may have.
    """
    if INTERPRETED:
        return [_interpreted(M, pixels, rows, columns)]
    size = dtype.itemsize
    timed: list[tuple[float, WeightGradientTile]] = []
    for form, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages in _shapes(rows, columns, width, size, shared_limit):
        taps = 9 if form == ROWS else 1
        tiles = M * cdiv(rows // taps, BLOCK_M) * cdiv(columns, BLOCK_N)
        staged = (3 if form == ROWS else 1) * (BLOCK_M + BLOCK_N) * BLOCK_K * size
        while num_stages > 2 and num_stages * staged > shared_limit - 2048:
            num_stages -= 1
        if max(num_stages * staged, BLOCK_M * BLOCK_N * 4) > shared_limit - 2048:
            continue
        most = max(1, min(MAX_SPLITS, 4 * NUM_SMS // tiles, pixels // (4 * BLOCK_K)))
        guesses = []
        for splits in range(1, most + 1):
            tile = WeightGradientTile(form, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, splits)
            guesses.append((_microseconds(tile, M, pixels, rows, columns, width, size), tile))
        timed += sorted(guesses)[: 1 if form == ROWS else 2]
    return [tile for _, tile in sorted(timed)[:8]]

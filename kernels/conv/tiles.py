"""Tiles that a convolution is computed with: forms, candidates for tuning, the default.

A tile is BLOCK_M pixels × BLOCK_N output channels, summed over the taps and BLOCK_K input channels at a time.
Candidates come best guess first, fit the shape and stay within the shared memory of a block; measuring them is somebody
else's work.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton

from ensdistill.kernels.conv.forms.descriptors import choose_box
from ensdistill.kernels.launch import INTERPRETED, MAX_INTERPRETED_PROGRAMS, MAX_TILE, cdiv, check, power_of_2

POINTERS = 0
"""Loads through masked pointers: any shape."""
BOXES = 1
"""Loads of boxes through tensor descriptors (TMA): stride 1."""
ROWS = 2
"""Rows streamed past weights that stay in shared memory: 3×3, stride 1, at most 64 channels each way."""
TAP_ROWS = 3
"""BOXES that take two pixels and a row of taps a step: four boxes where BOXES load six. For batches of whole boxes."""
PERSISTENT = 4
"""Programs that stay, with a warp that fetches boxes for those that multiply (`forms/persistent.py`): bf16, stride
1, no prologue. Compiled from Gluon and so never interpreted: the tuner may find it, nobody takes it unmeasured."""
PATCHES = 5
"""Pixels of a patch as columns: the image's gradient through a first convolution of 7×7 and stride 2
(`forms/patches.py`)."""
PATCH = 4
"""Side of a patch of the PATCHES form."""
PERSISTENT_IMAGES = 64
"""Images of a tile of the PERSISTENT form: the rows of one wgmma."""

SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory that a block may have, by compute capability."""
MULTIPROCESSORS = 132
"""Multiprocessors of an H100 and an H200: as many programs as they hold should run where there are enough."""
SHARED_PER_MULTIPROCESSOR = 233472
"""Bytes of shared memory of a multiprocessor of 9.0, 1024 of which each program takes for the system."""
PERSISTENT_SCRATCH = 2560
"""Bytes of shared memory that the PERSISTENT form's epilogue and barriers take, a multiplying warpgroup."""
assumed_capability = 90
"""Compute capability that is compiled for where there is no device to ask (tensors on `meta`)."""


class Tile(NamedTuple):
    form: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def capability(device: torch.device) -> int:
    """Compute capability of `device`, as 10 · major + minor."""
    if device.type != "cuda":
        return assumed_capability
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def limits(device: torch.device) -> tuple[int, tuple[int, ...]]:
    """(bytes of shared memory a block may have, forms that are any good) of `device`.

    Tensor descriptors are hardware from 9.0 on. What is left out compiles badly with Triton 3.6: ROWS to a trap on
    10.0, and with more shared memory than there is on 12.0, where BOXES spill. TAP_ROWS are made for 9.0's products.
    """
    arch = capability(device)
    forms = {90: (POINTERS, BOXES, ROWS, TAP_ROWS), 100: (POINTERS, BOXES), 103: (POINTERS, BOXES)}
    if arch == 90 and not persistent_missing():
        forms[90] += (PERSISTENT,)
    return SHARED_LIMIT.get(arch, 101376), forms.get(arch, (POINTERS,))


@functools.cache
def persistent_missing() -> str:
    """Why this Triton cannot compile the PERSISTENT form, whose language changes with releases; else empty."""
    try:
        import ensdistill.kernels.conv.forms.persistent  # noqa: F401
    except (ImportError, AttributeError, TypeError) as error:
        reason = f"Triton {triton.__version__} has no Gluon as it is needed: {error}"
        warnings.warn(f"tiles of the PERSISTENT form are left out: {reason}", stacklevel=2)
        return reason
    return ""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of `device`; an H100's or H200's where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def shared_bytes(tile: Tile, element: int) -> int:
    """Shared memory that a tile takes at most: what its stages hold, or its epilogue if that is more; no barriers.

    Of bf16 rows Triton keeps one stage less, because they go on to registers, and the epilogue's tile beside them.
    """
    _, M, N, K, _, stages = tile
    if tile.form == ROWS:
        held = stages - 1 if element == 2 else stages
        return (9 * K * N + held * 3 * M * K + M * N) * element
    staged = 2 * M + 3 * N if tile.form == TAP_ROWS else M + N
    return max(stages * staged * K * element, M * N * 4)


def check_fits(tile: Tile, element: int, device: torch.device) -> None:
    """Raise ValueError for a tile that wants more shared memory than a block of `device` may have."""
    if tile.form != PERSISTENT and not (INTERPRETED and tile.form == POINTERS):  # `persistent_rings` checks its own
        wanted, limit = shared_bytes(tile, element), limits(device)[0]
        check(wanted <= limit, "tile", f"at most {limit} bytes of shared memory, not {wanted}", tile)


def programs_per_multiprocessor(tile: Tile, element: int) -> int:
    """Programs of a tile that a multiprocessor of 9.0 holds if every thread has the 255 registers it may have.

    Of its 65,536 registers a thread takes a multiple of 8, of its 228 KB of shared memory a program 1 KB more than it
    asks for (source: CUDA C++ Programming Guide, compute capabilities).
    """
    by_registers = 65536 // (256 * 32 * tile.num_warps)
    by_shared = 233472 // (shared_bytes(tile, element) + 2048)  # barriers take less than 1 KB
    return max(1, min(by_registers, by_shared))


def _fitting(tiles: Iterable[Tile], element: int, shared_limit: int) -> list[Tile]:
    """Tiles that fit, in their order, with fewer stages where that makes them fit; at least one."""
    fitting: dict[Tile, None] = {}
    tile = None
    for tile in tiles:
        while tile.num_stages > 2 and shared_bytes(tile, element) > shared_limit - 2048:
            tile = tile._replace(num_stages=tile.num_stages - 1)
        if shared_bytes(tile, element) <= shared_limit - 2048:
            fitting[tile] = None
    if not fitting:
        assert tile is not None
        fitting[Tile(POINTERS, 64, min(tile.BLOCK_N, 64), min(tile.BLOCK_K, 32), 4, 2)] = None
    return list(fitting)


def _interpreted(launches: int, pixels: int, CI: int, CO: int) -> list[Tile]:
    """Only tile for the interpreter: as few programs as MAX_TILE allows, in `launches` GEMMs of pixels × CO."""
    block_n = min(max(16, power_of_2(CO)), 256)
    tiles_n = cdiv(CO, block_n)
    block_k = min(max(16, power_of_2(CI)), 128)
    largest = MAX_TILE // max(block_n, block_k)
    tiles_m = max(1, MAX_INTERPRETED_PROGRAMS // (launches * tiles_n))
    block_m = min(max(16, power_of_2(cdiv(pixels, min(tiles_m, 2)))), largest)
    return [Tile(POINTERS, block_m, block_n, block_k, 4, 1)]


def _candidates(pixels: int, CI: int, CO: int, element: int) -> list[tuple[int, int, int, int, int]]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), best guess first, for M · pixels rows and CO columns."""
    block_k = min(max(16, power_of_2(CI)), 64 if element == 2 else 32)
    width = max(16, power_of_2(CO))
    if element == 4:  # no tensor cores: the registers of a smaller tile
        block_n = min(width, 64)
        return [(64, block_n, block_k, 4, 2), (128, block_n, block_k, 8, 2), (64, min(width, 32), block_k, 4, 2)]
    if width >= 128:
        shapes = [(128, 128, 8), (128, 64, 4), (64, 128, 4)]
    else:
        # 16 columns: with 4 warps the epilogue of 128 rows spills on 8.0
        shapes = [(128, width, 4 if width > 16 else 8), (256, width, 8), (64, width, 4)]
    if pixels < 64 * 132:  # few rows: smaller tiles fill more multiprocessors
        shapes.sort(key=lambda shape: shape[0])
    return [(m, n, block_k, warps, stages) for m, n, warps in shapes for stages in (3, 4)]


@functools.cache
def forward_tiles(
    M: int,
    B: int,
    OH: int,
    OW: int,
    CI: int,
    CO: int,
    k: int,
    stride: int,
    dtype: torch.dtype,
    *,
    shared_limit: int = SHARED_LIMIT[90],
    forms: tuple[int, ...] = (POINTERS, BOXES, ROWS, TAP_ROWS),
    flat: bool = True,
) -> list[Tile]:
    """Tiles for the forward of M members with B × OH × OW pixels of output each.

    Args:
        shared_limit: bytes of shared memory that a block may have.
        forms: which are any good on the device.
        flat: whether few channels may lie beside the taps in one product (`implicit_gemm.flat_gemm`).
    """
    taps = k * k if flat and ((k == 3 and k * k * CI <= 64) or (k == 7 and CI < 16)) else 1
    if INTERPRETED:
        return _interpreted(M, B * OH * OW, taps * CI, CO)
    element = dtype.itemsize
    tiles = []
    candidates = _candidates(M * B * OH * OW, taps * CI, CO, element)
    if taps == 49:  # 147 taps and channels are 160 in steps of 32, 192 in steps of 64; gathers are loaded in no stages
        candidates = [(m, n, K, warps, 3) for K in (32, 64) for m, n, _, warps, stages in candidates if stages < 4]
    if element == 2 and stride == 1 and CI % 8 == 0 and k < 7:
        if ROWS in forms and k == 3 and max(CI, CO) <= 64:
            tiles += rows_tiles(CI, CO)
        if BOXES in forms and CI >= 32:
            boxes = [Tile(BOXES, *candidate) for candidate in candidates if candidate[1] >= min(CO, 128)]
            large = _large(B, OH, OW, CI, CO, k, forms) if CO > 64 else []
            filling = cdiv(M * B * OH * OW, 256) * cdiv(CO, 128) >= 0.9 * MULTIPROCESSORS
            tiles += large + boxes if filling else boxes + large
    tiles += [Tile(POINTERS, *candidate) for candidate in candidates]
    found = _fitting(tiles, element, shared_limit)
    if PERSISTENT in forms and dtype == torch.bfloat16 and stride == 1 and k < 7:
        found += persistent_tiles(B, OW, CI, CO, k)  # last: the first is taken unmeasured
    return found


def _large(B: int, OH: int, OW: int, CI: int, CO: int, k: int, forms: tuple[int, ...]) -> list[Tile]:
    """Tiles of 256 × 128 and 128 × 256, most FLOP a byte first: one program a multiprocessor."""
    block_k = min(power_of_2(CI), 64)
    tiles = []
    if TAP_ROWS in forms and k == 3 and choose_box(B, OH, OW, 256).pair:
        tiles.append(Tile(TAP_ROWS, 256, 128, 32, 8, 4))
    tiles += [Tile(BOXES, 256, 128, block_k, 8, stages) for stages in (3, 4)]
    if CO > 128:
        tiles += [Tile(BOXES, 128, 256, block_k, 8, stages) for stages in (3, 4)]
    return tiles


def rows_tiles(CI: int, CO: int) -> list[Tile]:
    """Candidates of the ROWS form: all channels in one block; three accumulators want a warp for 16 pixels.

    First two programs a multiprocessor, so that one's products run during the other's epilogue.
    """
    block_n, block_k = max(16, power_of_2(CO)), max(16, power_of_2(CI))
    shapes = ((64, 4, 2), (64, 4, 3), (128, 8, 3), (128, 8, 2))
    tiles = [Tile(ROWS, m, block_n, block_k, warps, stages) for m, warps, stages in shapes]
    return [tile for tile in tiles if tile.num_warps == 8 or programs_per_multiprocessor(tile, 2) > 1]


@functools.cache
def input_gradient_tiles(
    M: int,
    B: int,
    H: int,
    W: int,
    CI: int,
    CO: int,
    k: int,
    stride: int,
    dtype: torch.dtype,
    *,
    shared_limit: int = SHARED_LIMIT[90],
    forms: tuple[int, ...] = (POINTERS, BOXES, ROWS, TAP_ROWS),
    patches: bool = False,
) -> list[Tile]:
    """Tiles for the input gradient of M members (1 where their sum is wanted): B × H × W pixels of CI channels each.

    With stride 2 one launch computes the four parities of (h, w), each a quarter of the pixels, or patches of them.

    Args:
        patches: `fit_patches` of the same.
    """
    if stride == 1:
        return forward_tiles(M, B, H, W, CO, CI, k, 1, dtype, shared_limit=shared_limit, forms=forms, flat=False)
    quarter = cdiv(H, stride), cdiv(W, stride)
    of_patches = patch_tiles(M, B, H, W, CI, CO, dtype) if patches else []
    if INTERPRETED:
        return of_patches or _interpreted(M * stride * stride, B * quarter[0] * quarter[1], CO, CI)
    pointers = [Tile(POINTERS, *candidate) for candidate in _candidates(M * B * H * W, CO, CI, dtype.itemsize)]
    if k == 1:  # one pixel in four has a tap: the rest is memory, and a large tile spills on 12.0
        pointers = [tile for tile in pointers if tile.BLOCK_M * tile.BLOCK_N <= 128 * 64] or pointers
    return _fitting([*of_patches, *pointers], dtype.itemsize, shared_limit)


def fit_patches(CI: int, k: int, stride: int, beside: Iterable[object]) -> bool:
    """Tell whether the PATCHES form gives such an input gradient; `beside`: what its epilogue has no place for."""
    return k == 7 and stride == 2 and PATCH * PATCH * CI <= 64 and not any(one is not None for one in beside)


def patch_tiles(M: int, B: int, H: int, W: int, CI: int, CO: int, dtype: torch.dtype) -> list[Tile]:
    """Candidates of the PATCHES form: a program's patches share the weights that it loads."""
    columns = max(16, power_of_2(PATCH * PATCH * CI))
    patches = B * cdiv(H, PATCH) * cdiv(W, PATCH)
    if INTERPRETED:
        (tile,) = _interpreted(M, patches, CO, columns)
        return [tile._replace(form=PATCHES, BLOCK_N=columns)]
    block_k = min(max(16, power_of_2(CO)), 64 if dtype.itemsize == 2 else 32)
    shapes = [(128, 4, 3), (256, 8, 3), (128, 4, 4), (64, 4, 4)] if dtype.itemsize == 2 else [(64, 4, 2), (128, 8, 2)]
    return [Tile(PATCHES, m, columns, block_k, *rest) for m, *rest in shapes]


def persistent_tiles(B: int, W: int, CI: int, CO: int, k: int) -> list[Tile]:
    """Candidates of the PERSISTENT form; `num_warps` are those that multiply.

    None with fewer than 64 channels either way, or where more than a quarter of a tile's images would not exist.
    """
    covered = PERSISTENT_IMAGES * cdiv(B, PERSISTENT_IMAGES)
    if min(CI, CO) < 64 or 3 * covered > 4 * B:
        return []
    block_n = min((128, 64), key=lambda n: n * cdiv(CO, n))  # of equals the first
    shapes = [(256, 8, stages) for stages in ((2, 3) if k == 3 else (4, 3))] + [(128, 4, 2)]
    return [Tile(PERSISTENT, m, block_n, 64, *rest) for m, *rest in shapes if m // PERSISTENT_IMAGES <= W]


def persistent_sums(B: int, H: int, W: int, tile: Tile) -> int:
    """T, the parts that the sums of a member come in: one a multiplying warpgroup of a tile."""
    pixels = tile.BLOCK_M // PERSISTENT_IMAGES
    return cdiv(B, PERSISTENT_IMAGES) * H * cdiv(W, pixels) * (pixels // 2)


def persistent_programs(tile: Tile) -> int:
    """Programs of the PERSISTENT form that share a multiprocessor: two where only one warpgroup of each multiplies."""
    return 2 if tile.BLOCK_M == 2 * PERSISTENT_IMAGES else 1


def persistent_rings(tile: Tile, k: int) -> tuple[int, int]:
    """(rows of boxes, tiles of weights) that the PERSISTENT form's rings hold: `num_stages` rows, and of weights those
    of as many taps, or what then fits beside them.

    Raises:
        ValueError: it is no tile of that form, or does not fit.
    """
    consumers = tile.BLOCK_M // (2 * PERSISTENT_IMAGES)
    right = consumers in (1, 2) and tile.num_warps == 4 * consumers and tile.BLOCK_N in (64, 128) and tile.BLOCK_K == 64
    check(right, "tile", "PERSISTENT 256 (8 warps) or 128 (4 warps) x 64 or 128 x 64", tile)
    row = 2 * PERSISTENT_IMAGES * tile.BLOCK_K * (2 * consumers + k - 1)
    weights = 2 * tile.BLOCK_N * tile.BLOCK_K
    room = SHARED_PER_MULTIPROCESSOR // persistent_programs(tile) - 1024 - PERSISTENT_SCRATCH * consumers
    stages = min(k * tile.num_stages, (room - tile.num_stages * row) // weights)
    check(
        tile.num_stages >= 2 and stages >= 2, "tile", f"two stages of each ring in {room} bytes of shared memory", tile
    )
    return tile.num_stages, stages

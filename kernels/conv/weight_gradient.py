"""Weight gradient of the member-batched convolution: every member's own, in one launch.

    dw[m, kh, kw, ci, co] = Σ_{b, oh, ow} x'[m, b, oh·stride + kh − P, ow·stride + kw − P, ci] · dy[m, b, oh, ow, co]

x (M, B, H, W, CI), or (B, H, W, CI) shared by all members; dy (M, B, OH, OW, CO) of the same type, bf16 or fp32; dw
(M, k, k, CI, CO) fp32. P = k // 2. x' is x, or with a prologue (a, b) relu(a·x + b) rounded to x's type; 0 in the
padding.

A matrix product of k·k·CI rows and CO columns over B·OH·OW pixels. Rows are the flattened (kh, kw, ci): a tile of 256
rows covers four taps of 64 channels and reads dy once for them. The pixels are split over programs, partial sums go to
(S, M, k·k·CI, CO) and are added in a fixed order: by a second kernel, or, where the caller gives the room for them, by
whoever reads them (`member_weights_gradient`); with S = 1 there is nothing to add. With a shared x without a prologue
of its own a member, the columns are the flattened (member, co), and x is read once for all. 3×3 convolutions of stride
1 have a second loop, in forms/weight_gradient_rows.py.

It must do 2·M·B·OH·OW·k·k·CI·CO FLOP and read x and dy once: at E = 4, B = 128 each of WRN-28-4's layers between equal
widths is 38.7 GFLOP; 134 MB at 64 channels, 67 MB at 128, 34 MB at 256. Partial sums are written and read besides:
2·S·M·k·k·CI·CO·4 bytes. Source: the definition of the convolution's derivative.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.conv import cudnn
from ensdistill.kernels.conv.arguments import (
    KERNELS,
    Affine,
    WeightGradientOptions,
    convolution,
    keywords,
    row_stride,
)
from ensdistill.kernels.conv.forms.weight_gradient_rows import launch_rows
from ensdistill.kernels.conv.tiles import ROWS, limits
from ensdistill.kernels.conv.weight_gradient_tiles import WeightGradientTile, rows_width, weight_gradient_tiles
from ensdistill.kernels.epilogue import wide
from ensdistill.kernels.launch import INTERPRETED, MAX_INTERPRETED_PROGRAMS, begin, cdiv, check, launch, power_of_2
from ensdistill.kernels.operation import compiled


@keywords(WeightGradientOptions)
@torch.no_grad()
def member_conv_weight_gradient_ref(x: Tensor, dy_MBHWC: Tensor, options: WeightGradientOptions) -> Tensor:
    """Definition, by PyTorch's convolution; float64 is taken too and gives float64."""
    if options.prologue is not None:
        x = compiled(cudnn.affine_relu, x, *options.prologue, None)
    if options.parts is None:
        shape = (len(dy_MBHWC), options.kernel, options.kernel, x.shape[-1], dy_MBHWC.shape[-1])
        dw_MKKIO = torch.empty(shape, dtype=wide(x[..., :0]).dtype, device=x.device)
    else:  # all of it in the first
        dw_MKKIO = options.parts[0]
        options.parts[1:].zero_()
    cudnn.weight_gradient(dw_MKKIO, x, dy_MBHWC, stride=options.stride, grouped=options.grouped)
    return dw_MKKIO if options.parts is None else options.parts


@triton.jit(do_not_specialize=["M"])
def weight_gradient_kernel(
    p_x,
    p_dy,
    p_dw,
    p_a,
    p_b,
    M,
    B,
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    SHARED: tl.constexpr,  # x has no member axis
    FOLDED: tl.constexpr,  # columns are (member, co); else the grid's last axis is the member
    VECTOR_STEP: tl.constexpr,  # from a member's row of a and b to the next: CI, or 0 where they share one
    EVEN_COLUMNS: tl.constexpr,
    EVEN_PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    ROWS: tl.constexpr = KERNEL * KERNEL * CI
    PAD: tl.constexpr = KERNEL // 2
    i_split = tl.program_id(1)
    splits = tl.num_programs(1)
    i_m = tl.program_id(2).to(tl.int64)
    columns = M * CO if FOLDED else CO
    tiles_n = tl.cdiv(columns, BLOCK_N)
    i_tile = tl.program_id(0) // tiles_n
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_col = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < ROWS
    m_col = o_col < columns

    # One tap a tile where it can be: its place is then a scalar, and the mask of the padding needs pixels only.
    if CI % BLOCK_M == 0:
        tap = i_tile // (CI // BLOCK_M)
        kh = tap // KERNEL - PAD
        kw = tap % KERNEL - PAD
        o_ci = i_tile % (CI // BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        kh = (o_row // CI // KERNEL)[None, :] - PAD
        kw = (o_row // CI % KERNEL)[None, :] - PAD
        o_ci = o_row % CI
    o_tap = (kh * W + kw) * CI + o_ci[None, :]

    if p_a is not None:
        b_a = tl.load(p_a + i_m * VECTOR_STEP + o_ci)[None, :]
        b_b = tl.load(p_b + i_m * VECTOR_STEP + o_ci)[None, :]

    # Whole steps of BLOCK_K pixels are shared out; offsets inside a split fit 32 bits.
    pixels = B * (OH * OW)
    steps = tl.cdiv(pixels, BLOCK_K)
    first = (i_split.to(tl.int64) * steps // splits).to(tl.int32)
    last = ((i_split.to(tl.int64) + 1) * steps // splits).to(tl.int32)
    i_image = first * BLOCK_K // (OH * OW)
    p_x += i_image.to(tl.int64) * (H * W * CI)
    if not SHARED:
        p_x += i_m * B * (H * W * CI)
    p_dy += (i_m * pixels + first * BLOCK_K) * CO
    p_dy_col = p_dy + ((o_col // CO).to(tl.int64) * pixels * CO + o_col % CO if FOLDED else o_col)

    # Columns by rows: the wide side of the tensor cores' product is then the rows, and x, which the prologue changes,
    # the operand that they take from shared memory. Few columns are the narrow side themselves.
    WIDE: tl.constexpr = BLOCK_N >= 64
    b_acc = tl.zeros((BLOCK_N if WIDE else BLOCK_M, BLOCK_M if WIDE else BLOCK_N), dtype=tl.float32)
    for i_step in range(first, last):
        o_pixel = i_step * BLOCK_K + tl.arange(0, BLOCK_K)
        ih = o_pixel // OW % OH * STRIDE
        iw = o_pixel % OW * STRIDE
        o_x = (((o_pixel // (OH * OW) - i_image) * H + ih) * W + iw) * CI
        m_x = tl.full((BLOCK_K, 1), True, dtype=tl.int1)
        if KERNEL > 1:
            row, column = ih[:, None] + kh, iw[:, None] + kw
            m_x = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        if not EVEN_PIXELS:
            m_x &= (o_pixel < pixels)[:, None]
        if ROWS % BLOCK_M != 0:
            m_x &= m_row[None, :]
        if KERNEL > 1 or not EVEN_PIXELS or ROWS % BLOCK_M != 0:
            b_x = tl.load(p_x + (o_x[:, None] + o_tap), mask=m_x, other=0.0)
        else:
            b_x = tl.load(p_x + (o_x[:, None] + o_tap))
        if p_a is not None:
            b_z = tl.maximum(b_a * b_x.to(tl.float32) + b_b, 0.0)
            b_x = tl.where(m_x, b_z, 0.0).to(b_x.dtype)
        o_dy = (o_pixel - first * BLOCK_K)[:, None] * CO
        if EVEN_COLUMNS and EVEN_PIXELS:
            b_dy = tl.load(p_dy_col[None, :] + o_dy)
        else:
            b_dy = tl.load(p_dy_col[None, :] + o_dy, mask=(o_pixel < pixels)[:, None] & m_col[None, :], other=0.0)
        if WIDE:
            b_acc = tl.dot(tl.trans(b_dy), b_x, b_acc, input_precision="ieee")
        else:
            b_acc = tl.dot(tl.trans(b_x), b_dy, b_acc, input_precision="ieee")
    if WIDE:
        b_acc = tl.trans(b_acc)

    p_dw += (i_split.to(tl.int64) * M + i_m) * (ROWS * CO)
    if FOLDED:
        o_dw = (o_col // CO)[None, :] * (ROWS * CO) + o_row[:, None] * CO + (o_col % CO)[None, :]
    else:
        o_dw = o_row[:, None] * CO + o_col[None, :]
    if ROWS % BLOCK_M == 0 and EVEN_COLUMNS:
        tl.store(p_dw + o_dw, b_acc)
    else:
        tl.store(p_dw + o_dw, b_acc, mask=m_row[:, None] & m_col[None, :])


@triton.jit(do_not_specialize=["splits"])
def add_splits_kernel(p_parts, p_dw, size, splits, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """dw = the sum of `splits` parts, in an order that depends on splits and BLOCK_S alone."""
    begin()
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_split = tl.arange(0, BLOCK_S)
    p_part = p_parts + o_split.to(tl.int64)[:, None] * size + offset[None, :]
    b_parts = tl.load(p_part, mask=(o_split < splits)[:, None] & (offset < size)[None, :], other=0.0)
    tl.store(p_dw + offset, tl.sum(b_parts, axis=0), mask=offset < size)


def add_splits(parts: Tensor, dw: Tensor) -> None:
    """Write dw = parts.sum(0), the same bits every time."""
    splits, size = parts.shape[0], dw.numel()
    BLOCK_S = power_of_2(splits)
    BLOCK = max(32, 4096 // BLOCK_S)
    if INTERPRETED:
        BLOCK = max(BLOCK, power_of_2(cdiv(size, MAX_INTERPRETED_PROGRAMS)))
    grid = (cdiv(size, BLOCK),)
    launch(add_splits_kernel, grid, parts, dw, size, splits, BLOCK_S=BLOCK_S, BLOCK=BLOCK, num_warps=4)


def _folds(x: Tensor, M: int, prologue: Affine | None) -> bool:
    """Tell whether members are columns side by side."""
    return x.dim() == 4 and M > 1 and (prologue is None or prologue[0].shape[0] == 1)


def _default_tile(x: Tensor, dy_MBHWC: Tensor, options: WeightGradientOptions) -> WeightGradientTile:
    (M, B, OH, OW, CO), (W, CI), kernel = dy_MBHWC.shape, x.shape[-2:], options.kernel
    folded = _folds(x, M, options.prologue)
    groups, columns = (1, M * CO) if folded else (M, CO)
    width = 0 if folded else rows_width(x.device, kernel, options.stride, W)
    shared_limit = limits(x.device)[0]
    shape = groups, B * OH * OW, kernel * kernel * CI, columns
    return weight_gradient_tiles(*shape, x.dtype, width=width, shared_limit=shared_limit)[0]


def _launch(
    parts: Tensor, x: Tensor, dy_MBHWC: Tensor, options: WeightGradientOptions, tile: WeightGradientTile
) -> None:
    """Partial sums of as many shares of the pixels as `parts` has room for."""
    (M, B, OH, OW, CO), (H, W, CI), kernel = dy_MBHWC.shape, x.shape[-3:], options.kernel
    shared, rows, pixels, splits = x.dim() == 4, kernel * kernel * CI, B * OH * OW, len(parts)
    folded = _folds(x, M, options.prologue)
    groups, columns = (1, M * CO) if folded else (M, CO)
    a, b = options.prologue or (None, None)
    blocks = (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K)
    if tile.form == ROWS:
        launch_rows(x, dy_MBHWC, parts, a, b, blocks, tile.num_warps, tile.num_stages, splits)
        return
    launch(
        weight_gradient_kernel,
        (cdiv(rows, tile.BLOCK_M) * cdiv(columns, tile.BLOCK_N), splits, groups),
        x, dy_MBHWC, parts, a, b, M, B,
        H=H, W=W, CI=CI, CO=CO, OH=OH, OW=OW, KERNEL=kernel, STRIDE=options.stride, SHARED=shared, FOLDED=folded,
        VECTOR_STEP=row_stride(a), EVEN_COLUMNS=columns % tile.BLOCK_N == 0, EVEN_PIXELS=pixels % tile.BLOCK_K == 0,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip


@keywords(WeightGradientOptions)
def weight_gradient_splits(x: Tensor, dy_MBHWC: Tensor, options: WeightGradientOptions) -> int:
    """Partial sums that the default tile makes with these arguments of `member_conv_weight_gradient`.

    Only shapes and types count, and the device of x.
    """
    return _default_tile(x, dy_MBHWC, options).splits


def _check(x: Tensor, dy_MBHWC: Tensor, options: WeightGradientOptions) -> None:
    kernel, stride, tile, parts = options.kernel, options.stride, options.tile, options.parts
    check(x.dim() in (4, 5) and x.is_contiguous(), "x", "contiguous (M, B, H, W, CI) or (B, H, W, CI)", x)
    check(x.dtype in (torch.bfloat16, torch.float32), "x", "bf16 or fp32", x)
    check(kernel in KERNELS, "kernel", "1, 3 or 7", kernel)
    check(stride >= 1, "stride", "at least 1", stride)
    check(dy_MBHWC.dim() == 5 and dy_MBHWC.is_contiguous(), "dy", "contiguous (M, B, OH, OW, CO)", dy_MBHWC)
    M, (B, H, W, CI) = dy_MBHWC.shape[0], x.shape[-4:]
    OH, OW = ((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in (H, W))
    expected = (M, B, OH, OW, dy_MBHWC.shape[4])
    check(x.dim() == 4 or x.shape[0] == M, "x", f"{M} members as in dy", x)
    check(dy_MBHWC.shape == expected, "dy", f"shape {expected}", dy_MBHWC)
    check(dy_MBHWC.dtype == x.dtype and dy_MBHWC.device == x.device, "dy", f"{x.dtype} on {x.device}", dy_MBHWC)
    check(x.numel() > 0 and dy_MBHWC.numel() > 0, "x", "at least one element", x)
    check(B * max(H * W * CI, OH * OW * expected[4]) < 2**31, "x", "fewer than 2^31 elements a member", x)
    a, b = options.prologue or (None, None)
    for name, vector in (("prologue's a", a), ("prologue's b", b)):
        if vector is not None:
            fits = vector.shape in ((M, CI), (1, CI)) and vector.is_contiguous() and vector.dtype == torch.float32
            check(fits and vector.device == x.device, name, f"contiguous fp32 ({M} or 1, {CI}) on {x.device}", vector)
    if a is not None and b is not None:
        check(a.shape == b.shape, "prologue's b", f"shape {tuple(a.shape)}, as a", b)
    check(len(tile) in (0, len(WeightGradientTile._fields)), "tile", "() or a WeightGradientTile", tuple(tile))
    if tile and tile[0] == ROWS:
        fits = 0 < rows_width(x.device, kernel, stride, W) <= tile[3]
        check(
            fits,
            "tile",
            f"the ROWS form only for 3×3, stride 1, W up to {tile[3]} and compute capability 9",
            tuple(tile),
        )
    if parts is not None:
        shape = (M, kernel, kernel, CI, expected[4])
        fits = parts.dim() == 6 and parts.shape[1:] == shape and len(parts) > 0 and parts.is_contiguous()
        fits = fits and parts.dtype == torch.float32 and parts.device == x.device
        check(fits, "parts", f"contiguous fp32 (S, {', '.join(map(str, shape))}) on {x.device}", parts)


@convolution(
    "weight gradient",
    WeightGradientOptions,
    definition=member_conv_weight_gradient_ref,
    # the first part counts as the result
    partial_sums=lambda options, out: None if options.parts is None else options.parts[1:],
)
def member_conv_weight_gradient(x: Tensor, dy_MBHWC: Tensor, options: WeightGradientOptions) -> Tensor:
    """Gradient of M members' convolutions with respect to their weights.

    Args:
        x: what the convolution read, (M, B, H, W, CI), or (B, H, W, CI) where all members read the same; bf16 or fp32.
        dy_MBHWC: gradient of its output (M, B, OH, OW, CO), OH = (H + 2·(kernel // 2) − kernel) // stride + 1;
            of x's type.
        options: keyword arguments, see `WeightGradientOptions`.

    Returns:
        (M, kernel, kernel, CI, CO) fp32, the same bits every time; or `parts`, whose sum over S this is.

    Raises:
        ValueError: shapes, types or strides are not those.
    """
    _check(x, dy_MBHWC, options)
    tile = WeightGradientTile(*options.tile) if options.tile else _default_tile(x, dy_MBHWC, options)
    if options.parts is not None:
        _launch(options.parts, x, dy_MBHWC, options, tile)
        return options.parts
    shape = (dy_MBHWC.shape[0], options.kernel, options.kernel, x.shape[-1], dy_MBHWC.shape[-1])
    dw = torch.empty(shape, dtype=torch.float32, device=x.device)
    parts = dw[None] if tile.splits == 1 else dw.new_empty((tile.splits, *shape))
    _launch(parts, x, dy_MBHWC, options, tile)
    if tile.splits > 1:
        add_splits(parts, dw)
    return dw

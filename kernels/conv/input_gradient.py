"""Input gradient of the member-batched convolution, with what comes before it in the backward pass in its epilogue.

    v[m, b, h, w, ci] = Σ over kh, kw, co of dy[m, b, i, j, co] · w[e, kh, kw, ci, co] + before[m, b, h, w, ci]
                        i = (h + P − kh) / stride, j = (w + P − kw) / stride, both whole and inside dy; e = members[m]
    v = v ∘ mask                                            packed bits, or a·x + b > 0
    sums = Σ v, Σ v·x                                       of v as stored where nothing follows
    dx = scale ∘ v + after

dy (M, B, OH, OW, CO), w (E, k, k, CI, CO), dx (M, B, H, W, CI), or with `shared` the sum over the members,
(B, H, W, CI); the weights are the forward's buffer, read transposed. P = k // 2. Stride 2 computes the four parities of
(h, w) apart, each with the taps that meet it (1, 2, 2 and 4 of nine): no product with a zero is taken.

It must do 2·M·B·OH·OW·k·k·CI·CO FLOP and read dy and write dx once: at E = 4, B = 128 each of WRN-28-4's layers between
equal widths is 38.7 GFLOP; 134 MB at 64 channels, 67 MB at 128, 34 MB at 256; each of before, x and after adds half
of that and the bits a thirty-second. Source: the definition of the convolution's derivative.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.grad import conv2d_input

from ensdistill.kernels.conv import boxes_kernel as member_conv_boxes
from ensdistill.kernels.conv import rows_kernel as member_conv_rows
from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.implicit_gemm import implicit_gemm
from ensdistill.kernels.conv.shapes import check_activation, check_vector, check_weights, row_stride
from ensdistill.kernels.conv.tiles import Tile
from ensdistill.kernels.epilogue import (
    Epilogue,
    input_gradient_epilogue,
    input_gradient_epilogue_ref,
)
from ensdistill.kernels.launch import begin, cdiv, check, launch


def member_conv_input_gradient_ref(
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
    grouped: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition, through the library's convolution: a member at a time, or `grouped` as one conv of M groups.

    Shapes and types as in `member_conv_input_gradient`; float64 is taken too and gives float64.
    """
    M, B, k = dy_MBHWC.shape[0], dy_MBHWC.shape[1], w_EKKIO.shape[1]
    w_MOIKK = (w_EKKIO if members is None else w_EKKIO.index_select(0, members)).permute(0, 4, 3, 1, 2)
    CI, CO = w_EKKIO.shape[3:]
    if grouped:
        dy = dy_MBHWC.permute(1, 0, 4, 2, 3).reshape(B, M * CO, *dy_MBHWC.shape[2:4])
        weight = w_MOIKK.reshape(M * CO, CI, k, k)
        v = conv2d_input((B, M * CI, *size), weight, dy, stride, k // 2, groups=M)
        v_MBHWC = v.unflatten(1, (M, CI)).permute(1, 0, 3, 4, 2)
    else:
        v_MBHWC = torch.stack(
            [
                conv2d_input((B, CI, *size), w, dy.permute(0, 3, 1, 2), stride, k // 2).permute(0, 2, 3, 1)
                for w, dy in zip(w_MOIKK, dy_MBHWC, strict=True)
            ]
        )
    if shared:
        wide = torch.promote_types(v_MBHWC.dtype, torch.float32)
        v_MBHWC = v_MBHWC.sum(0, keepdim=True, dtype=wide)
        before, after = (None if x is None else x[None] for x in (before, after))
        norm = None if norm is None else (norm[0].view(v_MBHWC.shape), *norm[1:])
        bits = None if bits is None else bits.view(1, *bits.shape[-4:])
    dx, sums = input_gradient_epilogue_ref(
        v_MBHWC, members=None if shared else members, before=before, bits=bits, norm=norm, scale=scale, after=after,
        out_dtype=out_dtype or dy_MBHWC.dtype,
    )  # fmt: skip
    return dx[0] if shared else dx, sums


@triton.jit(do_not_specialize=["M"])
def member_conv_input_gradient_kernel(
    p_dy,
    p_w,
    p_members,
    p_dx,
    p_sums,
    p_before,
    p_bits,
    p_x,
    p_a,
    p_b,
    p_scale,
    p_after,
    M,
    B,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    SHARED: tl.constexpr,
    NORM_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    MASK_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    TILES_N: tl.constexpr = (CI + BLOCK_N - 1) // BLOCK_N
    ROWS: tl.constexpr = (H + STRIDE - 1) // STRIDE  # of the parity that has most
    COLUMNS: tl.constexpr = (W + STRIDE - 1) // STRIDE
    i_m, i_n = tl.program_id(0) // TILES_N, tl.program_id(0) % TILES_N
    i_parity = tl.program_id(2)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i_image, o_row, o_column = o_m // (ROWS * COLUMNS), (o_m // COLUMNS) % ROWS, o_m % COLUMNS
    m_pixel = i_image < B
    step_h: tl.constexpr = -K if STRIDE == 1 else 2 * K
    step_w: tl.constexpr = -1 if STRIDE == 1 else 2
    if STRIDE == 1:  # from tap K·K − 1 on to tap 0, pixels forwards
        o_h, o_w = o_row, o_column
        o_first_h, o_first_w = o_row - K // 2, o_column - K // 2
        i_first = K * K - 1
        taps_h: tl.constexpr = K
        taps_w: tl.constexpr = K
    else:
        # h = 2·row + parity meets the taps kh ≡ h + P (mod 2): kh = 1 − parity + 2·t of three, at dy's row + parity − t
        i_parity_h, i_parity_w = i_parity // STRIDE, i_parity % STRIDE
        o_h, o_w = o_row * STRIDE + i_parity_h, o_column * STRIDE + i_parity_w
        m_pixel &= (o_h < H) & (o_w < W)
        o_first_h, o_first_w = o_row + i_parity_h, o_column + i_parity_w
        if K == 1:
            # the one tap or none; never 0 taps a row: Triton divides by them ahead of the loop, whether it runs or not
            i_first = 0
            taps_h = (1 - i_parity_h) * (1 - i_parity_w)
            taps_w = 1
        else:
            i_first = (1 - i_parity_h) * K + 1 - i_parity_w
            taps_h = 1 + i_parity_h
            taps_w = 1 + i_parity_w
    o_first = (i_image * OH + o_first_h) * OW + o_first_w

    i_member = tl.program_id(1).to(tl.int64)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    i_weight = i_member
    for i_each in range(M if SHARED else 1):
        i_read = i_member
        if SHARED:
            i_read += i_each
        i_weight = i_read
        if p_members is not None:
            i_weight = tl.load(p_members + i_read)
        b_acc = implicit_gemm(
            b_acc, p_dy + i_read * B * (OH * OW * CO), p_w + i_weight * (K * K * CI * CO), None, None, o_first,
            o_first_h, o_first_w, m_pixel, o_n, i_first, taps_h, taps_w, step_h, step_w, HEIGHT=OH, WIDTH=OW, READ=CO,
            COLUMNS=CI, DIRECTION=1 if STRIDE == 1 else -1, TRANSPOSED=True, INSIDE=K == 1, MASK_M=MASK_M,
            MASK_N=CI % BLOCK_N != 0, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    tiles_m = (B * (ROWS * COLUMNS) + BLOCK_M - 1) // BLOCK_M
    input_gradient_epilogue(
        b_acc, i_member, i_weight, (i_image * H + o_h) * W + o_w, m_pixel, i_n, B * (H * W), i_parity * tiles_m + i_m,
        STRIDE * STRIDE * tiles_m, p_dx, p_sums, p_before, p_bits, p_x, p_a, p_b, p_scale, p_after, CI, NORM_ROW,
        SCALE_ROW, MASK_M, CI % BLOCK_N != 0,
    )  # fmt: skip


def _launch(
    dy_MBHWC: Tensor,
    w_EKKIO: Tensor,
    size: Sequence[int],
    stride: int,
    members: Tensor | None,
    shared: bool,
    before: Tensor | None,
    bits: Tensor | None,
    norm_x: Tensor | None,
    norm_a: Tensor | None,
    norm_b: Tensor | None,
    scale: Tensor | None,
    after: Tensor | None,
    out_dtype: torch.dtype,
    tile: Sequence[int],
) -> tuple[Tensor, Tensor]:
    M, B, OH, OW, CO = dy_MBHWC.shape
    (H, W), k, CI = size, w_EKKIO.shape[1], w_EKKIO.shape[3]
    block = choose_tile(dy_MBHWC, w_EKKIO, size, stride, shared, tile)
    dx, sums = _outputs(dy_MBHWC, w_EKKIO, size, stride, shared, norm_x is not None, out_dtype, block)
    epilogue = Epilogue(
        (dx, sums if norm_x is not None else None, before, bits, norm_x, norm_a, norm_b, scale, after),
        {
            "CI": CI,
            "NORM_ROW": row_stride(norm_a),
            "SCALE_ROW": row_stride(scale),
        },
    )
    if block.form == tiles.ROWS:
        member_conv_rows.launch_rows(dy_MBHWC, w_EKKIO, members, None, epilogue, M=M, transposed=True, tile=block)
        return dx, sums
    if block.form in (tiles.BOXES, tiles.TAP_ROWS):
        member_conv_boxes.launch_boxes(dy_MBHWC, w_EKKIO, members, None, epilogue, M=M, transposed=True, tile=block)
        return dx, sums
    if block.form == tiles.PERSISTENT:
        check(not shared and stride == 1, "tile", "another form for a sum of members or a stride of 2", stride)
        from ensdistill.kernels.conv.persistent_kernel import launch_persistent  # not in every Triton

        launch_persistent(dy_MBHWC, w_EKKIO, members, epilogue, M=M, transposed=True, tile=block)
        return dx, sums
    pixels = B * cdiv(H, stride) * cdiv(W, stride)
    flags = {
        **epilogue.flags,
        "MASK_M": pixels % block.BLOCK_M != 0 or H % stride != 0 or W % stride != 0,
        **{name: getattr(block, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")},
    }
    launch(
        member_conv_input_gradient_kernel,
        (cdiv(pixels, block.BLOCK_M) * cdiv(CI, block.BLOCK_N), 1 if shared else M, stride * stride), dy_MBHWC,
        w_EKKIO, members, *epilogue.pointers, M, B, H=H, W=W, OH=OH, OW=OW, CO=CO, K=k, STRIDE=stride, SHARED=shared,
        **flags,
    )  # fmt: skip
    return dx, sums


def choose_tile(
    dy: Tensor, w_EKKIO: Tensor, size: Sequence[int], stride: int, shared: bool, tile: Sequence[int]
) -> Tile:
    """The tile asked for, or the default of the shape."""
    if tile:
        tiles.check_fits(Tile(*tile), dy.element_size(), dy.device)
        return Tile(*tile)
    (M, B), (k, _, CI, CO) = dy.shape[:2], w_EKKIO.shape[1:]
    shape = map(int, (1 if shared else M, B, *size, CI, CO, k, stride))  # plain numbers: what tiles are chosen by
    shared_limit, forms = tiles.limits(dy.device)
    return tiles.input_gradient_tiles(
        *shape,
        dy.dtype,
        shared_limit=shared_limit,
        forms=(tiles.POINTERS,) if shared else forms,  # only pointers add members up
    )[0]


def _outputs(
    dy: Tensor,
    w_EKKIO: Tensor,
    size: Sequence[int],
    stride: int,
    shared: bool,
    norm: bool,
    out_dtype: torch.dtype,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    M, B, CI, H, W = map(int, (1 if shared else dy.shape[0], dy.shape[1], w_EKKIO.shape[3], *size))
    dx = torch.empty((B, H, W, CI) if shared else (M, B, H, W, CI), dtype=out_dtype, device=dy.device)
    if tile.form == tiles.ROWS:
        num_tiles = member_conv_rows.num_tiles(B, H, W, tile)
    elif tile.form in (tiles.BOXES, tiles.TAP_ROWS):
        num_tiles = member_conv_boxes.num_tiles(B, H, W, tile)
    elif tile.form == tiles.PERSISTENT:
        num_tiles = tiles.persistent_sums(B, H, W, tile)
    else:
        num_tiles = stride**2 * cdiv(B * cdiv(H, stride) * cdiv(W, stride), tile.BLOCK_M)
    sums = torch.empty((M, num_tiles, 2, CI) if norm else (0,), dtype=torch.float32, device=dy.device)
    return dx, sums


_operation = torch.library.custom_op("ensdistill::member_conv_input_gradient", _launch, mutates_args=())


@_operation.register_fake
def _(
    dy_MBHWC: Tensor,
    w_EKKIO: Tensor,
    size: Sequence[int],
    stride: int,
    members: Tensor | None,
    shared: bool,
    before: Tensor | None,
    bits: Tensor | None,
    norm_x: Tensor | None,
    norm_a: Tensor | None,
    norm_b: Tensor | None,
    scale: Tensor | None,
    after: Tensor | None,
    out_dtype: torch.dtype,
    tile: Sequence[int],
) -> tuple[Tensor, Tensor]:
    block = choose_tile(dy_MBHWC, w_EKKIO, size, stride, shared, tile)
    return _outputs(dy_MBHWC, w_EKKIO, size, stride, shared, norm_x is not None, out_dtype, block)


def member_conv_input_gradient(
    dy: Tensor,
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
    tile: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `member_conv`'s input, (M, B, H, W, CI); see the module's docstring. Not differentiable.

    Args:
        dy: gradient of the output (M, B, OH, OW, CO), bf16 or fp32.
        w_EKKIO: the forward's weights (E, k, k, CI, CO), of dy's type; k 1 or 3.
        size: (H, W) of the forward's input.
        stride: 1 or 2.
        members: int64 (M,) on the device, which of the E weights each member has; None for 0 … M − 1.
        shared: add the members up: dx (B, H, W, CI), and so before, norm's x and after; channel vectors in one row.
        before: added before the mask, of dx's shape.
        bits: uint8 (at least M, B, H, W, ⌈CI/8⌉): the mask.
        norm: (x, a, b): x of dx's shape, a and b fp32 (E, CI) or (1, CI). Gives the sums, and the mask without `bits`.
        scale: fp32 (E, CI) or (1, CI).
        after: added last, of dx's shape.
        out_dtype: type of dx, dy's by default.
        tile: a `tiles.Tile`, empty for the default of the shape.

    Returns:
        dx, and with `norm` the sums (M, T, 2, CI) fp32, to be added over T; M is 1 with `shared`.

    Raises:
        ValueError: a shape or type is not as above.
    """
    check_weights("dy", dy, w_EKKIO, members, stride, -1)
    check(dy.ndim == 5, "dy", "shape (M, B, OH, OW, CO)", dy)
    check(len(tile) in (0, len(Tile._fields)), "tile", "a tiles.Tile or ()", tile)
    check(len(size) == 2, "size", "(H, W)", size)
    M, B, CI, pad = dy.shape[0], dy.shape[1], w_EKKIO.shape[3], w_EKKIO.shape[1] // 2
    rows = 1 if shared else w_EKKIO.shape[0]
    out_size = tuple((n + 2 * pad - w_EKKIO.shape[1]) // stride + 1 for n in size)
    check(dy.shape[2:4] == out_size, "dy", f"shape (M, B, {out_size}, CO) for size {size}", dy)
    given = w_EKKIO.shape[0] if members is None else members.shape[0]
    check(given == M, "dy", f"{given} members", dy)
    shape = (B, *size, CI) if shared else (M, B, *size, CI)
    for name, x in (("before", before), ("norm's x", None if norm is None else norm[0]), ("after", after)):
        check_activation(name, x, shape, dy)
    for name, vector in (*zip(("norm's a", "norm's b"), norm[1:] if norm else (), strict=False), ("scale", scale)):
        check_vector(name, vector, rows, CI, dy)
    check(max(size[0] * size[1] * CI, dy[0, 0].numel()) * B < 2**31, "dy", "fewer than 2^31 elements a member", dy)
    check(norm is None or norm[1].shape == norm[2].shape, "norm", "a and b of one shape", norm)
    if bits is not None:
        right = bits.dtype == torch.uint8 and bits.shape[-4:] == (B, *size, cdiv(CI, 8)) and bits.is_contiguous()
        enough = shared if bits.ndim == 4 else bits.ndim == 5 and bits.shape[0] >= (1 if shared else M)
        check(right and enough, "bits", f"uint8 ({M} or more, {B}, {size[0]}, {size[1]}, {cdiv(CI, 8)})", bits)
    # tensors on `meta` go to the launcher itself, which a recorder may listen to
    operation = _launch if dy.is_meta else _operation
    x, a, b = norm or (None, None, None)
    out = out_dtype or dy.dtype
    dx, sums = operation(
        dy, w_EKKIO, size, stride, members, shared, before, bits, x, a, b, scale, after, out, list(tile)
    )
    return dx, sums if norm is not None else None

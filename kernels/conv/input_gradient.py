"""Input gradient of the member-batched convolution, with what comes before it in the backward pass in its epilogue.

    v[m, b, h, w, ci] = Σ over kh, kw, co of dy[m, b, i, j, co] · w[e, kh, kw, ci, co] + before[m, b, h, w, ci]
                        i = (h + P − kh) / stride, j = (w + P − kw) / stride, both whole and inside dy; e = members[m]
    v = v ∘ mask                                            packed bits, or a·x + b > 0
    sums = Σ v, Σ v·x                                       of v as stored where nothing follows
    dx = scale ∘ v + after

dy (M, B, OH, OW, CO), w (E, k, k, CI, CO), dx (M, B, H, W, CI), or with `shared` the sum over the members,
(B, H, W, CI); the weights are the forward's buffer, read transposed. P = k // 2. Stride 2 computes the four parities of
(h, w) apart, each with the taps that meet it (1, 2, 2 and 4 of nine): no product with a zero is taken. Through a first
convolution of 7×7, which has few channels, patches of pixels are columns of one product (forms/patches.py).

It must do 2·M·B·OH·OW·k·k·CI·CO FLOP and read dy and write dx once: at E = 4, B = 128 each of WRN-28-4's layers between
equal widths is 38.7 GFLOP; 134 MB at 64 channels, 67 MB at 128, 34 MB at 256; each of before, x and after adds half
of that and the bits a thirty-second. Source: the definition of the convolution's derivative.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.conv import cudnn, tiles
from ensdistill.kernels.conv.arguments import (
    InputGradientOptions,
    check_activation,
    check_vector,
    check_weights,
    convolution,
    keywords,
    row_stride,
)
from ensdistill.kernels.conv.forms import boxed
from ensdistill.kernels.conv.forms.implicit_gemm import implicit_gemm
from ensdistill.kernels.conv.forms.patches import launch_patches
from ensdistill.kernels.conv.tiles import Tile
from ensdistill.kernels.epilogue import Epilogue, input_gradient_epilogue
from ensdistill.kernels.launch import begin, cdiv, check, launch
from ensdistill.kernels.operation import compiled


@keywords(InputGradientOptions)
@torch.no_grad()
def member_conv_input_gradient_ref(
    dy_MBHWC: Tensor, w_EKKIO: Tensor, options: InputGradientOptions
) -> tuple[Tensor, Tensor | None]:
    """Definition, by PyTorch's convolution and plain element-wise work; float64 is taken too and gives float64."""
    o = options
    w_MKKIO = cudnn.chosen(w_EKKIO, o.members)
    parts = cudnn.convolve_transposed(
        dy_MBHWC, w_MKKIO, size=o.size, stride=o.stride, shared=o.shared, grouped=o.grouped
    )
    return compiled(
        cudnn.parts_epilogue_ref,
        parts,
        o.shared,
        members=None if o.shared else o.members,
        before=o.before,
        bits=o.bits,
        norm=o.norm,
        scale=o.scale,
        after=o.after,
        out_dtype=o.out_dtype or dy_MBHWC.dtype,
    )


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
        # h = 2·row + parity meets the taps kh ≡ h + P (mod 2): of three and of seven kh = 1 − parity + 2·t, at dy's
        # row + parity + (P − 1) / 2 − t
        i_parity_h, i_parity_w = i_parity // STRIDE, i_parity % STRIDE
        o_h, o_w = o_row * STRIDE + i_parity_h, o_column * STRIDE + i_parity_w
        m_pixel &= (o_h < H) & (o_w < W)
        o_first_h, o_first_w = o_row + i_parity_h + K // 4, o_column + i_parity_w + K // 4
        if K == 1:
            # the one tap or none; never 0 taps a row: Triton divides by them ahead of the loop, whether it runs or not
            i_first = 0
            taps_h = (1 - i_parity_h) * (1 - i_parity_w)
            taps_w = 1
        else:
            i_first = (1 - i_parity_h) * K + 1 - i_parity_w
            taps_h = K // 2 + i_parity_h
            taps_w = K // 2 + i_parity_w
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


def choose_tile(dy_MBHWC: Tensor, w_EKKIO: Tensor, options: InputGradientOptions) -> Tile:
    """Tile asked for, or the default of the shape."""
    if options.tile:
        tiles.check_fits(Tile(*options.tile), dy_MBHWC.element_size(), dy_MBHWC.device)
        return Tile(*options.tile)
    (M, B), (k, _, CI, CO) = dy_MBHWC.shape[:2], w_EKKIO.shape[1:]
    # plain numbers: what tiles are chosen by
    shape = map(int, (1 if options.shared else M, B, *options.size, CI, CO, k, options.stride))
    shared_limit, forms = tiles.limits(dy_MBHWC.device)
    return tiles.input_gradient_tiles(
        *shape,
        dy_MBHWC.dtype,
        shared_limit=shared_limit,
        forms=(tiles.POINTERS,) if options.shared else forms,  # only pointers add members up
        patches=_fit_patches(w_EKKIO, options),
    )[0]


def _fit_patches(w_EKKIO: Tensor, options: InputGradientOptions) -> bool:
    beside = options.before, options.bits, options.norm, options.after
    return tiles.fit_patches(w_EKKIO.shape[3], w_EKKIO.shape[1], options.stride, beside)


def _outputs(
    dy_MBHWC: Tensor, w_EKKIO: Tensor, options: InputGradientOptions, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """Memory for what is asked for."""
    M = 1 if options.shared else dy_MBHWC.shape[0]
    B, CI, H, W, stride = map(int, (dy_MBHWC.shape[1], w_EKKIO.shape[3], *options.size, options.stride))
    shape = (B, H, W, CI) if options.shared else (M, B, H, W, CI)
    dx = torch.empty(shape, dtype=options.out_dtype or dy_MBHWC.dtype, device=dy_MBHWC.device)
    if options.norm is None:
        return dx, None
    if tile.form in (tiles.POINTERS, tiles.PATCHES):
        T = stride**2 * cdiv(B * cdiv(H, stride) * cdiv(W, stride), tile.BLOCK_M)
    else:
        T = boxed.num_tiles(B, H, W, tile)
    return dx, torch.empty(M, T, 2, CI, dtype=torch.float32, device=dy_MBHWC.device)


def _check(dy: Tensor, w_EKKIO: Tensor, options: InputGradientOptions) -> None:
    size, stride, members, norm, bits = options.size, options.stride, options.members, options.norm, options.bits
    check_weights("dy", dy, w_EKKIO, members, stride, -1)
    check(dy.ndim == 5, "dy", "shape (M, B, OH, OW, CO)", dy)
    check(len(options.tile) in (0, len(Tile._fields)), "tile", "a tiles.Tile or ()", options.tile)
    check(len(size) == 2, "size", "(H, W)", size)
    M, B, CI, pad = dy.shape[0], dy.shape[1], w_EKKIO.shape[3], w_EKKIO.shape[1] // 2
    rows = 1 if options.shared else w_EKKIO.shape[0]
    out_size = tuple((n + 2 * pad - w_EKKIO.shape[1]) // stride + 1 for n in size)
    check(dy.shape[2:4] == out_size, "dy", f"shape (M, B, {out_size}, CO) for size {size}", dy)
    given = w_EKKIO.shape[0] if members is None else members.shape[0]
    check(given == M, "dy", f"{given} members", dy)
    shape = (B, *size, CI) if options.shared else (M, B, *size, CI)
    norm_x, norm_a, norm_b = norm or (None, None, None)
    for name, x in (("before", options.before), ("norm's x", norm_x), ("after", options.after)):
        check_activation(name, x, shape, dy)
    for name, vector in (("norm's a", norm_a), ("norm's b", norm_b), ("scale", options.scale)):
        check_vector(name, vector, rows, CI, dy)
    check(max(size[0] * size[1] * CI, dy[0, 0].numel()) * B < 2**31, "dy", "fewer than 2^31 elements a member", dy)
    check(norm is None or norm[1].shape == norm[2].shape, "norm", "a and b of one shape", norm)
    if bits is not None:
        right = bits.dtype == torch.uint8 and bits.shape[-4:] == (B, *size, cdiv(CI, 8)) and bits.is_contiguous()
        enough = options.shared if bits.ndim == 4 else bits.ndim == 5 and bits.shape[0] >= (1 if options.shared else M)
        check(right and enough, "bits", f"uint8 ({M} or more, {B}, {size[0]}, {size[1]}, {cdiv(CI, 8)})", bits)


@convolution(
    "input gradient",
    InputGradientOptions,
    definition=member_conv_input_gradient_ref,
    partial_sums=lambda options, out: out[1],
)
def member_conv_input_gradient(
    dy_MBHWC: Tensor, w_EKKIO: Tensor, options: InputGradientOptions
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `member_conv`'s input, (M, B, H, W, CI); see the module's docstring. Not differentiable.

    Args:
        dy_MBHWC: gradient of the output (M, B, OH, OW, CO), bf16 or fp32.
        w_EKKIO: the forward's weights (E, k, k, CI, CO), of dy's type; k 1, 3 or 7.
        options: keyword arguments, see `InputGradientOptions`.

    Returns:
        dx, and with `norm` the sums (M, T, 2, CI) fp32, to be added over T; M is 1 with `shared`.

    Raises:
        ValueError: a shape or type is not as it should be.
    """
    _check(dy_MBHWC, w_EKKIO, options)
    M, B, OH, OW, CO = dy_MBHWC.shape
    (H, W), k, CI = options.size, w_EKKIO.shape[1], w_EKKIO.shape[3]
    stride, members, shared, norm = options.stride, options.members, options.shared, options.norm or (None, None, None)
    tile = choose_tile(dy_MBHWC, w_EKKIO, options)
    dx, sums = _outputs(dy_MBHWC, w_EKKIO, options, tile)
    epilogue = Epilogue(
        (dx, sums, options.before, options.bits, *norm, options.scale, options.after),
        {"CI": CI, "NORM_ROW": row_stride(norm[1]), "SCALE_ROW": row_stride(options.scale)},
    )
    if tile.form == tiles.PERSISTENT:
        check(not shared and stride == 1, "tile", "another form for a sum of members or a stride of 2", stride)
    if tile.form == tiles.PATCHES:
        check(_fit_patches(w_EKKIO, options), "tile", "another form for all but 7×7, stride 2, a few channels", tile)
        launch_patches(
            dy_MBHWC, w_EKKIO, members, dx, options.scale, shared=shared, scale_row=row_stride(options.scale), tile=tile
        )
        return dx, sums
    if tile.form != tiles.POINTERS:
        boxed.launch_boxed(dy_MBHWC, w_EKKIO, members, None, epilogue, M=M, transposed=True, tile=tile)
        return dx, sums
    pixels = B * cdiv(H, stride) * cdiv(W, stride)
    flags = {
        **epilogue.flags,
        "MASK_M": pixels % tile.BLOCK_M != 0 or H % stride != 0 or W % stride != 0,
        **{name: getattr(tile, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")},
    }
    launch(
        member_conv_input_gradient_kernel,
        (cdiv(pixels, tile.BLOCK_M) * cdiv(CI, tile.BLOCK_N), 1 if shared else M, stride * stride), dy_MBHWC,
        w_EKKIO, members, *epilogue.pointers, M, B, H=H, W=W, OH=OH, OW=OW, CO=CO, K=k, STRIDE=stride, SHARED=shared,
        **flags,
    )  # fmt: skip
    return dx, sums

"""Member-batched convolution: every member's own weights, one launch, the element-wise work around it included.

    x' = x, or relu(a·x + b) with a prologue (a, b); 0 in the padding
    v[m, b, oh, ow, co] = Σ over kh, kw, ci of x'[m, b, i, j, ci] · w[e, kh, kw, ci, co]
                          i = oh·stride + kh − P, j = ow·stride + kw − P; e = members[m]
    y = [relu](v + bias[e] + residual[m])
    z = relu(a·y + b)                                       with a second output (a, b)
    sums = Σ y, Σ y²;  bits = z > 0 (y > 0 without a second output)

x (M, B, H, W, CI), or (B, H, W, CI) shared by all members; w (E, k, k, CI, CO), all bf16 or all fp32; P = k // 2. z,
sums and bits are of y as it is stored. Vectors of a channel are fp32, (E, C) or (1, C).

It must do 2·M·B·OH·OW·k·k·CI·CO FLOP and read x and write y once: at E = 4, B = 128 each of WRN-28-4's layers between
equal widths is 38.7 GFLOP; 134 MB at 64 channels, 67 MB at 128, 34 MB at 256; a residual or a second output adds half
of that. Source: the definition of the convolution.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.conv import cudnn, tiles
from ensdistill.kernels.conv.arguments import (
    ForwardOptions,
    check_activation,
    check_vector,
    check_weights,
    convolution,
    keywords,
    row_stride,
    sizes,
)
from ensdistill.kernels.conv.forms import boxed
from ensdistill.kernels.conv.forms.implicit_gemm import flat_gemm, implicit_gemm
from ensdistill.kernels.conv.tiles import Tile
from ensdistill.kernels.epilogue import ConvOutput, Epilogue, forward_epilogue
from ensdistill.kernels.launch import begin, cdiv, check, launch
from ensdistill.kernels.operation import compiled


@keywords(ForwardOptions)
@torch.no_grad()
def member_conv_ref(x: Tensor, w_EKKIO: Tensor, options: ForwardOptions) -> ConvOutput:
    """Definition, by PyTorch's convolution and plain element-wise work; float64 is taken too and gives float64."""
    o, out_dtype = options, options.out_dtype or x.dtype
    w_MKKIO = cudnn.chosen(w_EKKIO, o.members)
    if o.prologue is not None:
        x = compiled(cudnn.affine_relu, x, *o.prologue, o.members)
    v = cudnn.convolve(x, w_MKKIO, stride=o.stride, grouped=o.grouped)
    plain = o.bias is None and o.residual is None and o.second is None and not (o.relu or o.sums or o.bits)
    if plain and out_dtype == v.dtype and v.is_contiguous():
        return ConvOutput(v if o.keep_y else None, None, None, None)
    return compiled(
        cudnn.forward_epilogue_ref,
        v,
        members=o.members,
        bias=o.bias,
        residual=o.residual,
        relu=o.relu,
        second=o.second,
        keep_y=o.keep_y,
        keep_z=o.keep_z,
        sums=o.sums,
        bits=o.bits,
        out_dtype=out_dtype,
    )


@triton.jit
def member_conv_kernel(
    p_x,
    p_w,
    p_members,
    p_prologue_a,
    p_prologue_b,
    p_y,
    p_z,
    p_sums,
    p_bits,
    p_bias,
    p_residual,
    p_a,
    p_b,
    B,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    SHARED: tl.constexpr,  # x has no member axis
    PROLOGUE_ROW: tl.constexpr,
    RELU: tl.constexpr,
    BITS: tl.constexpr,
    BIAS_ROW: tl.constexpr,
    SECOND_ROW: tl.constexpr,
    MASK_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    # tiles of channels run fastest: those of the same pixels find them in L2
    TILES_N: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    i_m, i_n = tl.program_id(0) // TILES_N, tl.program_id(0) % TILES_N
    i_member = tl.program_id(1).to(tl.int64)
    i_weight = i_member
    if p_members is not None:
        i_weight = tl.load(p_members + i_member)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i_image = o_m // (OH * OW)
    m_pixel = i_image < B
    o_h = (o_m // OW) % OH * STRIDE - K // 2
    o_w = o_m % OW * STRIDE - K // 2
    if not SHARED:
        p_x += i_member * B * (H * W * CI)
    if p_prologue_a is not None:
        p_prologue_a += i_weight * PROLOGUE_ROW
        p_prologue_b += i_weight * PROLOGUE_ROW
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    p_w += i_weight * (K * K * CI * CO)
    o_pixel = (i_image * H + o_h) * W + o_w
    if (K == 3 and BLOCK_K >= K * K * CI) or (K == 7 and CI < 16):
        b_acc = flat_gemm(
            b_acc, p_x, p_w, p_prologue_a, p_prologue_b, o_pixel, o_h, o_w, m_pixel, o_n, K=K, HEIGHT=H, WIDTH=W,
            READ=CI, COLUMNS=CO, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    else:
        b_acc = implicit_gemm(
            b_acc, p_x, p_w, p_prologue_a, p_prologue_b, o_pixel, o_h, o_w, m_pixel, o_n, 0, K, K, K, 1, HEIGHT=H,
            WIDTH=W, READ=CI, COLUMNS=CO, DIRECTION=1, TRANSPOSED=False, INSIDE=K == 1, MASK_M=MASK_M,
            MASK_N=CO % BLOCK_N != 0, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    pixels = B * (OH * OW)
    forward_epilogue(
        b_acc, i_member, i_weight, o_m, m_pixel, i_n, pixels, i_m, (pixels + BLOCK_M - 1) // BLOCK_M, p_y, p_z,
        p_sums, p_bits, p_bias, p_residual, p_a, p_b, CO, RELU, BITS, BIAS_ROW, SECOND_ROW, MASK_M, CO % BLOCK_N != 0,
    )  # fmt: skip


def choose_tile(x: Tensor, w_EKKIO: Tensor, options: ForwardOptions) -> Tile:
    """Tile asked for, or the default of the shape."""
    if options.tile:
        tiles.check_fits(Tile(*options.tile), x.element_size(), x.device)
        return Tile(*options.tile)
    M, B, _, _, CI, OH, OW, CO = sizes(x, w_EKKIO, options.stride, options.members)
    shared_limit, forms = tiles.limits(x.device)
    shape = (M, B, OH, OW, CI, CO, int(w_EKKIO.shape[1]), int(options.stride))
    return tiles.forward_tiles(*shape, x.dtype, shared_limit=shared_limit, forms=forms)[0]


def _outputs(x: Tensor, w_EKKIO: Tensor, options: ForwardOptions, tile: Tile) -> ConvOutput:
    """Memory for what is asked for."""
    M, B, _, _, _, OH, OW, CO = sizes(x, w_EKKIO, options.stride, options.members)

    def empty(wanted: bool | int, *shape: int, dtype: torch.dtype = options.out_dtype or x.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    T = cdiv(B * OH * OW, tile.BLOCK_M) if tile.form == tiles.POINTERS else boxed.num_tiles(B, OH, OW, tile)
    return ConvOutput(
        y=empty(options.keep_y, M, B, OH, OW, CO),
        z=empty(options.second is not None and options.keep_z, M, B, OH, OW, CO),
        sums=empty(options.sums, M, T, 2, CO, dtype=torch.float32),
        bits=empty(options.bits, options.bits, B, OH, OW, cdiv(CO, 8), dtype=torch.uint8),
    )


def _check(x: Tensor, w_EKKIO: Tensor, options: ForwardOptions) -> None:
    members, second = options.members, options.second
    check_weights("x", x, w_EKKIO, members, options.stride, -2)
    E, (CI, CO) = w_EKKIO.shape[0], w_EKKIO.shape[3:]
    M, B, H, W, _, OH, OW, _ = sizes(x, w_EKKIO, options.stride, members)
    check(x.ndim in (4, 5), "x", "shape (M, B, H, W, CI) or (B, H, W, CI)", x)
    given = E if members is None else members.shape[0]
    check(given == M, "x", f"{given} members", x)
    for name, pair, channels in (("prologue", options.prologue, CI), ("second", second, CO)):
        for vector in pair or ():
            check_vector(name, vector, E, channels, x)
        check(pair is None or pair[0].shape == pair[1].shape, name, "a and b of one shape", pair)
    check_vector("bias", options.bias, E, CO, x)
    check_activation("residual", options.residual, (M, B, OH, OW, CO), x)
    is_kept = options.keep_y or (second is not None and options.keep_z)
    check(is_kept, "keep_y", "True without a second output that is kept", options.keep_y)
    check(len(options.tile) in (0, len(Tile._fields)), "tile", "a tiles.Tile or ()", options.tile)
    check(0 <= options.bits <= M, "bits", f"0 to {M} members", options.bits)
    check(max(H * W * CI, OH * OW * CO) * B < 2**31, "x", "fewer than 2^31 elements a member", x)


@convolution("forward", ForwardOptions, definition=member_conv_ref, partial_sums=lambda options, out: out.sums)
def member_conv(x: Tensor, w_EKKIO: Tensor, options: ForwardOptions) -> ConvOutput:
    """Convolve each member's images with its own weights; see the module's docstring. No gradient flows through it.

    Args:
        x: (M, B, H, W, CI), or (B, H, W, CI) shared by all members, contiguous, bf16 or fp32.
        w_EKKIO: (E, k, k, CI, CO), of x's type; k 1, 3 or 7.
        options: keyword arguments, see `ForwardOptions`.

    Raises:
        ValueError: a shape or type is not as it should be.
    """
    _check(x, w_EKKIO, options)
    members, prologue = options.members, options.prologue
    prologue_a, prologue_b = prologue or (None, None)
    second_a, second_b = options.second or (None, None)
    tile = choose_tile(x, w_EKKIO, options)
    out = _outputs(x, w_EKKIO, options, tile)
    M, B, H, W, CI, OH, OW, CO = sizes(x, w_EKKIO, options.stride, members)
    flags: dict[str, Any] = {
        "CO": CO,
        "RELU": options.relu,
        "BITS": options.bits,
        "BIAS_ROW": row_stride(options.bias),
        "SECOND_ROW": row_stride(second_a),
    }
    epilogue = Epilogue((*out, options.bias, options.residual, second_a, second_b), flags)
    if tile.form == tiles.PERSISTENT:
        fits = prologue is None and options.stride == 1
        check(fits, "tile", "another form for a prologue or a stride of 2", options.stride)
    if tile.form != tiles.POINTERS:
        boxed.launch_boxed(x, w_EKKIO, members, prologue, epilogue, M=M, transposed=False, tile=tile)
        return out
    pixels = B * OH * OW
    launch(
        member_conv_kernel, (cdiv(pixels, tile.BLOCK_M) * cdiv(CO, tile.BLOCK_N), M), x, w_EKKIO, members,
        prologue_a, prologue_b, *epilogue.pointers, B, H=H, W=W, OH=OH, OW=OW, CI=CI, K=w_EKKIO.shape[1],
        STRIDE=options.stride, SHARED=x.ndim == 4, PROLOGUE_ROW=row_stride(prologue_a), **flags,
        MASK_M=pixels % tile.BLOCK_M != 0, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out

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

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.conv import boxes_kernel as member_conv_boxes
from ensdistill.kernels.conv import rows_kernel as member_conv_rows
from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.autograd import backward, setup_context
from ensdistill.kernels.conv.implicit_gemm import flat_gemm, implicit_gemm
from ensdistill.kernels.conv.shapes import check_activation, check_vector, check_weights, row_stride, sizes
from ensdistill.kernels.conv.tiles import Tile
from ensdistill.kernels.epilogue import ConvOutput, Epilogue, conv_epilogue_ref, forward_epilogue, rows, wide
from ensdistill.kernels.launch import begin, cdiv, check, launch

Affine = tuple[Tensor, Tensor]


def member_conv_ref(
    x: Tensor,
    w_EKKIO: Tensor,
    *,
    stride: int = 1,
    members: Tensor | None = None,
    prologue: Affine | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    second: Affine | None = None,
    keep_y: bool = True,
    keep_z: bool = True,
    sums: bool = False,
    bits: int = 0,
    out_dtype: torch.dtype | None = None,
    grouped: bool = False,
) -> ConvOutput:
    """The definition, through the library's convolution: a member at a time, or `grouped` as one conv of M groups.

    Shapes and types as in `member_conv`; float64 is taken too and gives float64.
    """
    w_MOIKK = (w_EKKIO if members is None else w_EKKIO.index_select(0, members)).permute(0, 4, 3, 1, 2)
    M, CO, CI, k, _ = w_MOIKK.shape
    x_MBHWC = x if x.ndim == 5 else x[None]
    if prologue is not None:
        a, b = (rows(vector, members) for vector in prologue)
        x_MBHWC = (a * wide(x_MBHWC) + b).relu().to(x.dtype)
    if grouped:
        x_MBHWC = x_MBHWC.expand(M, *x_MBHWC.shape[1:])
        x_BCHW = x_MBHWC.permute(1, 0, 4, 2, 3).flatten(1, 2)
        v = F.conv2d(x_BCHW, w_MOIKK.reshape(M * CO, CI, k, k), stride=stride, padding=k // 2, groups=M)
        v_MBHWC = v.unflatten(1, (M, CO)).permute(1, 0, 3, 4, 2)
    else:
        images = x_MBHWC.permute(0, 1, 4, 2, 3).expand(M, -1, -1, -1, -1)
        convs = [F.conv2d(image, w, stride=stride, padding=k // 2) for image, w in zip(images, w_MOIKK, strict=True)]
        v_MBHWC = torch.stack([v.permute(0, 2, 3, 1) for v in convs])
    return conv_epilogue_ref(
        v_MBHWC, members=members, bias=bias, residual=residual, relu=relu, second=second, keep_y=keep_y, keep_z=keep_z,
        sums=sums, bits=bits, out_dtype=out_dtype,
    )  # fmt: skip


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
    if K == 3 and BLOCK_K >= K * K * CI:
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


def _launch(
    x: Tensor,
    w_EKKIO: Tensor,
    stride: int,
    members: Tensor | None,
    prologue_a: Tensor | None,
    prologue_b: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    second_a: Tensor | None,
    second_b: Tensor | None,
    keep_y: bool,
    keep_z: bool,
    sums: bool,
    bits: int,
    out_dtype: torch.dtype,
    tile: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    block = choose_tile(x, w_EKKIO, stride, members, tile)
    y, z, partial, packed = _outputs(
        x, w_EKKIO, stride, members, keep_z and second_a is not None, keep_y, sums, bits, out_dtype, block
    )
    M, B, H, W, CI, OH, OW, CO = sizes(x, w_EKKIO, stride, members)
    flags: dict[str, Any] = {
        "CO": CO,
        "RELU": relu,
        "BITS": bits,
        "BIAS_ROW": row_stride(bias),
        "SECOND_ROW": row_stride(second_a),
    }
    outputs = (
        y if keep_y else None,
        z if keep_z and second_a is not None else None,
        partial if sums else None,
        packed if bits else None,
    )
    epilogue = Epilogue((*outputs, bias, residual, second_a, second_b), flags)
    prologue = None if prologue_a is None or prologue_b is None else (prologue_a, prologue_b)
    if block.form == tiles.ROWS:
        member_conv_rows.launch_rows(x, w_EKKIO, members, prologue, epilogue, M=M, transposed=False, tile=block)
        return y, z, partial, packed
    if block.form in (tiles.BOXES, tiles.TAP_ROWS):
        member_conv_boxes.launch_boxes(x, w_EKKIO, members, prologue, epilogue, M=M, transposed=False, tile=block)
        return y, z, partial, packed
    if block.form == tiles.PERSISTENT:
        check(prologue is None and stride == 1, "tile", "another form for a prologue or a stride of 2", stride)
        from ensdistill.kernels.conv.persistent_kernel import launch_persistent  # not in every Triton

        launch_persistent(x, w_EKKIO, members, epilogue, M=M, transposed=False, tile=block)
        return y, z, partial, packed
    pixels = B * OH * OW
    launch(
        member_conv_kernel, (cdiv(pixels, block.BLOCK_M) * cdiv(CO, block.BLOCK_N), M), x, w_EKKIO, members,
        prologue_a, prologue_b, *epilogue.pointers, B, H=H, W=W, OH=OH, OW=OW, CI=CI, K=w_EKKIO.shape[1],
        STRIDE=stride, SHARED=x.ndim == 4, PROLOGUE_ROW=row_stride(prologue_a), **flags,
        MASK_M=pixels % block.BLOCK_M != 0, BLOCK_M=block.BLOCK_M, BLOCK_N=block.BLOCK_N, BLOCK_K=block.BLOCK_K,
        num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return y, z, partial, packed


def choose_tile(x: Tensor, w_EKKIO: Tensor, stride: int, members: Tensor | None, tile: Sequence[int]) -> Tile:
    """The tile asked for, or the default of the shape."""
    if tile:
        tiles.check_fits(Tile(*tile), x.element_size(), x.device)
        return Tile(*tile)
    M, B, _, _, CI, OH, OW, CO = sizes(x, w_EKKIO, stride, members)
    shared_limit, forms = tiles.limits(x.device)
    k = int(w_EKKIO.shape[1])
    return tiles.forward_tiles(M, B, OH, OW, CI, CO, k, int(stride), x.dtype, shared_limit=shared_limit, forms=forms)[0]


def _outputs(
    x: Tensor,
    w_EKKIO: Tensor,
    stride: int,
    members: Tensor | None,
    second: bool,
    keep_y: bool,
    sums: bool,
    bits: int,
    out_dtype: torch.dtype,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, z, sums and bits, of no elements where not wanted."""
    M, B, _, _, _, OH, OW, CO = sizes(x, w_EKKIO, stride, members)
    if tile.form == tiles.ROWS:
        num_tiles = member_conv_rows.num_tiles(B, OH, OW, tile)
    elif tile.form in (tiles.BOXES, tiles.TAP_ROWS):
        num_tiles = member_conv_boxes.num_tiles(B, OH, OW, tile)
    elif tile.form == tiles.PERSISTENT:
        num_tiles = tiles.persistent_sums(B, OH, OW, tile)
    else:
        num_tiles = cdiv(B * OH * OW, tile.BLOCK_M)

    def empty(wanted: bool | int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=x.device)

    return (
        empty(keep_y, (M, B, OH, OW, CO), out_dtype),
        empty(second, (M, B, OH, OW, CO), out_dtype),
        empty(sums, (M, num_tiles, 2, CO), torch.float32),
        empty(bits, (bits, B, OH, OW, cdiv(CO, 8)), torch.uint8),
    )


_operation = torch.library.custom_op("ensdistill::member_conv", _launch, mutates_args=())


@_operation.register_fake
def _(
    x: Tensor,
    w_EKKIO: Tensor,
    stride: int,
    members: Tensor | None,
    prologue_a: Tensor | None,
    prologue_b: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    second_a: Tensor | None,
    second_b: Tensor | None,
    keep_y: bool,
    keep_z: bool,
    sums: bool,
    bits: int,
    out_dtype: torch.dtype,
    tile: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    block = choose_tile(x, w_EKKIO, stride, members, tile)
    return _outputs(x, w_EKKIO, stride, members, keep_z and second_a is not None, keep_y, sums, bits, out_dtype, block)


_operation.register_autograd(backward, setup_context=setup_context)


def member_conv(
    x: Tensor,
    w_EKKIO: Tensor,
    *,
    stride: int = 1,
    members: Tensor | None = None,
    prologue: Affine | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    second: Affine | None = None,
    keep_y: bool = True,
    keep_z: bool = True,
    sums: bool = False,
    bits: int = 0,
    out_dtype: torch.dtype | None = None,
    tile: Sequence[int] = (),
) -> ConvOutput:
    """Convolve each member's images with its own weights; see the module's docstring. Differentiable but for the bits.

    Args:
        x: (M, B, H, W, CI), or (B, H, W, CI) shared by all members, contiguous, bf16 or fp32.
        w_EKKIO: (E, k, k, CI, CO), of x's type; k 1 or 3.
        stride: 1 or 2.
        members: int64 (M,) on the device, which of the E weights each output has; None for 0 … E − 1.
        prologue: (a, b), fp32 (E, CI) or (1, CI): relu(a·x + b) is what is read.
        bias: fp32 (E, CO) or (1, CO).
        residual: added before the ReLU, (M, B, OH, OW, CO).
        relu: whether y ends in one.
        second: (a, b), fp32 (E, CO) or (1, CO): asks for z = relu(a·y + b).
        keep_y, keep_z: whether y, and z where there is one, are stored; one of them must be. Bits are of z either way.
        sums: ask for Σ y and Σ y², (M, T, 2, CO), to be added over T. Their gradient must be the same for every T.
        bits: for how many of the first members to pack z > 0 (y > 0 without a second output).
        out_dtype: type of y and z, x's by default.
        tile: a `tiles.Tile`, empty for the default of the shape.

    Raises:
        ValueError: a shape or type is not as above.
    """
    check_weights("x", x, w_EKKIO, members, stride, -2)
    E, (CI, CO) = w_EKKIO.shape[0], w_EKKIO.shape[3:]
    M, B, H, W, _, OH, OW, _ = sizes(x, w_EKKIO, stride, members)
    check(x.ndim in (4, 5), "x", "shape (M, B, H, W, CI) or (B, H, W, CI)", x)
    given = E if members is None else members.shape[0]
    check(given == M, "x", f"{given} members", x)
    for name, pair, channels in (("prologue", prologue, CI), ("second", second, CO)):
        for vector in pair or ():
            check_vector(name, vector, E, channels, x)
        check(pair is None or pair[0].shape == pair[1].shape, name, "a and b of one shape", pair)
    check_vector("bias", bias, E, CO, x)
    check_activation("residual", residual, (M, B, OH, OW, CO), x)
    check(keep_y or (second is not None and keep_z), "keep_y", "True without a second output that is kept", keep_y)
    check(len(tile) in (0, len(Tile._fields)), "tile", "a tiles.Tile or ()", tile)
    check(0 <= bits <= M, "bits", f"0 to {M} members", bits)
    check(max(H * W * CI, OH * OW * CO) * B < 2**31, "x", "fewer than 2^31 elements a member", x)
    # tensors on `meta` go to the launcher itself, which a recorder may listen to
    operation = _launch if x.is_meta else _operation
    pa, pb = prologue or (None, None)
    sa, sb = second or (None, None)
    out = out_dtype or x.dtype
    y, z, partial, packed = operation(
        x, w_EKKIO, stride, members, pa, pb, bias, residual, relu, sa, sb, keep_y, keep_z, sums, bits, out, list(tile)
    )
    has_z = keep_z and second is not None
    return ConvOutput(y if keep_y else None, z if has_z else None, partial if sums else None, packed if bits else None)

"""Gradient of max-pooling by windows of 3 × 3 with stride 2, with what lies before the pooling: a ReLU, a BatchNorm.

    v[h, w] = mask ∘ (Σ of dy[i, j] over the windows whose maximum is at (h, w) + before[h, w])
    sums = Σv, Σv·x         dx = scale ∘ v + after         mask: packed bits, or a·x + b > 0

dy (M, B, ⌈H/2⌉, ⌈W/2⌉, C) and positions of its shape -> dx (M, B, H, W, C) of dy's type and sums (M, T, 2, C). A pixel
asks the windows that it lies in, one, two or four of them by the parities of its row and column, in that order: no
atomics, the same bits every time. Where a ReLU lies before the pooling a maximum of 0 passes nothing on, whichever
of the zeros it is: mask. Bytes: dy, positions and dx, what else is given; 2 to 11 FLOPs a value, in fp32. Mask, sums
and scale are those of a convolution's input gradient (`epilogue.py`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch as launching
from ensdistill.kernels.epilogue import input_gradient_epilogue, input_gradient_epilogue_ref, wide
from ensdistill.kernels.launch import begin, cdiv, check, launch
from ensdistill.kernels.norm.channels import channel_tile, check_activations, check_vectors
from ensdistill.kernels.norm.max_pool import pooled
from ensdistill.kernels.operation import Arguments, Options, images_shape, operation


def max_pool_gradient_ref(
    dy_MBHWC: Tensor,
    positions_MBHWC: Tensor,
    *,
    size: tuple[int, int],
    members: Tensor | None = None,
    before: Tensor | None = None,
    bits: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Define dx and the sums, in fp32 or float64; sums come as one tile, T = 1."""
    M, B, OH, OW, C = dy_MBHWC.shape
    dy, positions = wide(dy_MBHWC), positions_MBHWC[:M]
    # from one pixel before the image to where the last window ends
    v_MBHWC = dy.new_zeros(M, B, 2 * OH + 1, 2 * OW + 1, C)
    for kh in range(3):
        for kw in range(3):
            is_here = positions == 3 * kh + kw
            v_MBHWC[:, :, kh : kh + 2 * OH : 2, kw : kw + 2 * OW : 2] += torch.where(is_here, dy, 0)
    return input_gradient_epilogue_ref(
        v_MBHWC[:, :, 1 : 1 + size[0], 1 : 1 + size[1]].contiguous(),
        members=members,
        before=before,
        bits=bits,
        norm=norm,
        scale=scale,
        after=after,
        out_dtype=dy_MBHWC.dtype,
    )


@triton.jit
def max_pool_gradient_kernel(
    p_dy,
    p_positions,
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
    rows,  # of a member's dx, B·H·W
    B,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    NORM_ROW: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    MASKED_C: tl.constexpr = C % BLOCK_C != 0
    i_m = tl.program_id(1).to(tl.int64)
    i_t, i_c = tl.program_id(0) // BLOCKS_C, tl.program_id(0) % BLOCKS_C
    o_n, o_c = i_t * BLOCK_N + tl.arange(0, BLOCK_N), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_n = o_n < rows
    o_h, o_w, i_image = (o_n // W) % H, o_n % W, o_n // (H * W)
    o_dy = i_m * B * (OH * OW * C)
    b_acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_h in tl.static_range(2):  # an even row lies in the middle of one window, an odd one at the ends of two
        for i_w in tl.static_range(2):
            o_i, o_j = (o_h + i_h) // 2, (o_w + i_w) // 2
            m_window = m_n & (o_i < OH) & (o_j < OW)
            if i_h == 1:
                m_window &= o_h % 2 == 1
            if i_w == 1:
                m_window &= o_w % 2 == 1
            o_y = ((i_image * OH + o_i) * OW + o_j)[:, None] * C + o_c[None, :]
            m_y = tl.broadcast_to(m_window[:, None], (BLOCK_N, BLOCK_C))
            if MASKED_C:
                m_y &= (o_c < C)[None, :]
            b_position = tl.load(p_positions + o_dy + o_y, mask=m_y, other=9).to(tl.int32)
            b_dy = tl.load(p_dy + o_dy + o_y, mask=m_y, other=0.0).to(tl.float32)
            is_here = b_position == (3 * (o_h - 2 * o_i + 1) + o_w - 2 * o_j + 1)[:, None]
            b_acc += tl.where(is_here, b_dy, 0.0)
    i_weight = i_m
    if p_members is not None:
        i_weight = tl.load(p_members + i_m)
    input_gradient_epilogue(
        b_acc, i_m, i_weight, o_n, m_n, i_c, rows, i_t, tl.num_programs(0) // BLOCKS_C, p_dx, p_sums, p_before, p_bits,
        p_x, p_a, p_b, p_scale, p_after, C, NORM_ROW, SCALE_ROW, not EVEN, MASKED_C,
    )  # fmt: skip


def _shape(args: Arguments, options: Options, out: Any) -> str:
    return images_shape((), {}, out)


@operation(definition=max_pool_gradient_ref, shape=_shape)
def max_pool_gradient(
    dy_MBHWC: Tensor,
    positions_MBHWC: Tensor,
    *,
    size: tuple[int, int],
    members: Tensor | None = None,
    before: Tensor | None = None,
    bits: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute dx (M, B, H, W, C); with `norm` also Σv and Σv·x (M, T, 2, C), to be added over T.

    Args:
        dy_MBHWC: gradient of the pooled images (M, B, ⌈H/2⌉, ⌈W/2⌉, C), bf16 or fp32, contiguous.
        positions_MBHWC: what `max_pool` gave for at least M members.
        size: H, W.
        members: int64 (M,) on the device: which row of the vectors each member has; None for 0 … M − 1.
        before: added before the mask, of dx's shape.
        bits: the mask, packed: uint8 (at least M, B, H, W, ⌈C/8⌉).
        norm: x (M, B, H, W, C), with which the sums are taken, and a, b, fp32 (1, C) or a row a member: without `bits`
            the mask is a·x + b > 0.
        scale: fp32 (1, C) or a row a member.
        after: added last, of dx's shape.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    check_activations(dy_MBHWC, "dy_MBHWC")
    check(dy_MBHWC.ndim == 5 and dy_MBHWC.numel() > 0, "dy_MBHWC", "(M, B, OH, OW, C)", dy_MBHWC)
    (M, B, OH, OW, C), (H, W) = dy_MBHWC.shape, size
    check((pooled(H), pooled(W)) == (OH, OW), "size", f"rows and columns that {(OH, OW)} are pooled of", size)
    check(B * H * W * C < 2**31, "size", "fewer than 2^31 elements a member", size)
    p = positions_MBHWC
    right = p.dtype == torch.uint8 and p.ndim == 5 and len(p) >= M and p.shape[1:] == dy_MBHWC.shape[1:]
    right = right and p.is_contiguous() and p.device == dy_MBHWC.device
    check(right, "positions_MBHWC", f"contiguous uint8 {tuple(dy_MBHWC.shape)}, or of more members", p)
    if members is not None:
        right = members.dtype == torch.int64 and members.shape == (M,) and members.is_contiguous()
        check(right and members.device == dy_MBHWC.device, "members", f"contiguous int64 ({M},)", members)
    shape = torch.Size((M, B, H, W, C))
    x, a, b = norm if norm is not None else (None, None, None)
    for name, one in (("before", before), ("norm's x", x), ("after", after)):
        if one is not None:
            check_activations(one, name, shape)
    for name, vector in (("norm's a", a), ("norm's b", b), ("scale", scale)):
        if vector is not None:
            check_vectors(vector, name, M if members is None else len(vector), C)  # of slots M are chosen
    check(a is None or b is None or a.shape == b.shape, "norm", "a and b of one shape", norm)
    if bits is not None:
        right = bits.dtype == torch.uint8 and bits.ndim == 5 and len(bits) >= M and bits.is_contiguous()
        right = right and bits.shape[1:] == (B, H, W, cdiv(C, 8)) and bits.device == dy_MBHWC.device
        check(right, "bits", f"contiguous uint8 ({M} or more, {B}, {H}, {W}, {cdiv(C, 8)})", bits)
    rows = B * H * W
    tile = channel_tile(M, rows, C)
    if not launching.INTERPRETED and rows > tile.BLOCK_N:  # half as many partial sums
        tile = tile._replace(BLOCK_N=2 * tile.BLOCK_N)
    dx = torch.empty(shape, dtype=dy_MBHWC.dtype, device=dy_MBHWC.device)
    sums = None
    if norm is not None:
        sums = torch.empty(M, tile.programs(rows), 2, C, dtype=torch.float32, device=dx.device)
    launch(
        max_pool_gradient_kernel,
        (tile.programs(rows) * tile.blocks(C), M),
        *(dy_MBHWC, positions_MBHWC, members, dx, sums, before, bits, x, a, b, scale, after, rows, B),
        H=H,
        W=W,
        OH=OH,
        OW=OW,
        C=C,
        NORM_ROW=C if a is not None and len(a) > 1 else 0,
        SCALE_ROW=C if scale is not None and len(scale) > 1 else 0,
        EVEN=rows % tile.BLOCK_N == 0,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=8,
    )
    return dx, sums

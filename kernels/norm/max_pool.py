"""Max-pooling of members' activations by windows of 3 × 3, with stride 2 and padding 1, behind a norm or not.

    v = x, or relu(a·x + b) rounded to x's type
    y[m, b, i, j, c] = max of v[m, b, h, w, c] over the window h = 2·i − 1 … 2·i + 1, w = 2·j − 1 … 2·j + 1
    position         = 3·(h − 2·i + 1) + (w − 2·j + 1) of that v: of equals the first, in rows, and of NaN the last

x (M, B, H, W, C) -> y (M, B, ⌈H/2⌉, ⌈W/2⌉, C) of its type, and for the first `positions` members a byte a value, which
the gradient needs (max_pool_gradient.py). What lies outside the image never wins. Rounding before comparing makes ties
where PyTorch, which compares what it has stored, makes them. Bytes: x, y and the positions, once each; 9 to 36 FLOPs a
value of y. Source: the definition, with the ties of PyTorch's `max_pool2d`.

A byte, not 4 bits: of ResNet-50's step at 224 pixels, B = 128, E = 4 the difference is 0.2 of some 190 GB, while
unpacking would come four times into the loop of the gradient.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ensdistill.kernels.epilogue import wide
from ensdistill.kernels.launch import begin, check, launch
from ensdistill.kernels.norm.channels import (
    channel_tile,
    check_activations,
    check_vectors,
    load_f32,
    over_pixels,
    store,
)
from ensdistill.kernels.operation import operation


def pooled(side: int) -> int:
    """Rows or columns of the pooled images, of `side` rows or columns."""
    return (side + 1) // 2


def max_pool_ref(
    x_MBHWC: Tensor, *, prologue: tuple[Tensor, Tensor] | None = None, positions: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Define y and the positions, by PyTorch's max-pool; float64 is taken too and gives float64."""
    v = x_MBHWC
    if prologue is not None:
        v = (wide(v) * over_pixels(prologue[0], v) + over_pixels(prologue[1], v)).relu().to(v.dtype)
    M, _, _, W, _ = v.shape
    y, index = F.max_pool2d(v.flatten(0, 1).permute(0, 3, 1, 2), 3, 2, padding=1, return_indices=True)
    y_MBHWC, index_MBHWC = (t.permute(0, 2, 3, 1).unflatten(0, (M, -1)).contiguous() for t in (y, index))
    if not positions:
        return y_MBHWC, None
    first_H, first_W = (2 * torch.arange(n, device=v.device) - 1 for n in y_MBHWC.shape[2:4])
    row = index_MBHWC[:positions] // W - first_H[:, None, None]
    column = index_MBHWC[:positions] % W - first_W[:, None]
    return y_MBHWC, (3 * row + column).to(torch.uint8)


@triton.jit(do_not_specialize=["positions"])
def max_pool_kernel(
    p_x,
    p_a,
    p_b,
    p_y,
    p_positions,
    rows,  # of a member's y, B·OH·OW
    B,
    positions,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    PER_MEMBER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    begin()
    i_m = tl.program_id(1).to(tl.int64)
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    MASKED_C: tl.constexpr = C % BLOCK_C != 0
    MASKED: tl.constexpr = MASKED_C or not EVEN
    o_n = tl.program_id(0) // BLOCKS_C * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m_n, m_c = o_n < rows, o_c < C
    o_h, o_w = (o_n // OW) % OH * 2 - 1, o_n % OW * 2 - 1
    o_first = ((o_n // (OH * OW) * H + o_h) * W + o_w)[:, None] * C + o_c[None, :]
    p_x += i_m * B * (H * W * C)
    o_vector = i_m * C + o_c if PER_MEMBER else o_c
    if p_a is not None:
        b_a = load_f32(p_a + o_vector, m_c, MASKED_C)[None, :]
        b_b = load_f32(p_b + o_vector, m_c, MASKED_C)[None, :]
    b_y = tl.full((BLOCK_N, BLOCK_C), float("-inf"), tl.float32)
    # where all is −∞ the first in the image wins
    b_first = tl.where(o_h < 0, 3, 0) + tl.where(o_w < 0, 1, 0)
    b_position = tl.broadcast_to(b_first[:, None], (BLOCK_N, BLOCK_C))
    for kh in tl.static_range(3):
        for kw in tl.static_range(3):
            m_v = m_n & (o_h + kh >= 0) & (o_h + kh < H) & (o_w + kw >= 0) & (o_w + kw < W)
            m_x = m_v[:, None] & m_c[None, :] if MASKED_C else tl.broadcast_to(m_v[:, None], (BLOCK_N, BLOCK_C))
            b_v = tl.load(p_x + o_first + (kh * W + kw) * C, mask=m_x, other=0.0).to(tl.float32)
            if p_a is not None:
                b_v = tl.maximum(b_v * b_a + b_b, 0.0, propagate_nan=tl.PropagateNan.ALL)
                b_v = b_v.to(p_y.dtype.element_ty).to(tl.float32)
            wins = m_x & ((b_v > b_y) | (b_v != b_v))
            b_y = tl.where(wins, b_v, b_y)
            b_position = tl.where(wins, 3 * kh + kw, b_position)
    o_y = i_m * rows * C + o_n[:, None] * C + o_c[None, :]
    m_y = m_n[:, None] & m_c[None, :]
    store(p_y + o_y, b_y, m_y, MASKED)
    if p_positions is not None:  # noqa: SIM102 - decided when it is compiled, the next when it runs
        if i_m < positions:
            store(p_positions + o_y, b_position, m_y, MASKED)


@operation(definition=max_pool_ref)
def max_pool(
    x_MBHWC: Tensor, *, prologue: tuple[Tensor, Tensor] | None = None, positions: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Pool x, or relu(a·x + b), to y (M, B, ⌈H/2⌉, ⌈W/2⌉, C), with the positions of the first members' maxima.

    No gradient flows through it: see `max_pool_gradient.py`.

    Args:
        x_MBHWC: bf16 or fp32, contiguous.
        prologue: a and b, fp32 (1, C) or (M, C).
        positions: members whose positions are wanted: uint8 (positions, B, ⌈H/2⌉, ⌈W/2⌉, C), None for 0.

    Raises:
        ValueError: a shape or type that is none of these.
    """
    check_activations(x_MBHWC, "x_MBHWC")
    check(x_MBHWC.ndim == 5, "x_MBHWC", "(M, B, H, W, C)", x_MBHWC)
    check(x_MBHWC.numel() > 0, "x_MBHWC", "at least one element", x_MBHWC)
    M, B, H, W, C = x_MBHWC.shape
    check(B * H * W * C < 2**31, "x_MBHWC", "fewer than 2^31 elements a member", x_MBHWC)
    check(0 <= positions <= M, "positions", f"0 to {M} members", positions)
    a, b = prologue if prologue is not None else (None, None)
    if a is not None and b is not None:
        check_vectors(a, "prologue a", M, C)
        check_vectors(b, "prologue b", M, C)
        check(a.shape == b.shape, "prologue b", f"the shape of a, {tuple(a.shape)}", b)
    OH, OW = pooled(H), pooled(W)
    y_MBHWC = torch.empty(M, B, OH, OW, C, dtype=x_MBHWC.dtype, device=x_MBHWC.device)
    kept = torch.empty(positions, B, OH, OW, C, dtype=torch.uint8, device=x_MBHWC.device) if positions else None
    rows = B * OH * OW
    tile = channel_tile(M, rows, C)
    launch(
        max_pool_kernel,
        (tile.programs(rows) * tile.blocks(C), M),
        *(x_MBHWC, a, b, y_MBHWC, kept, rows, B, positions),
        H=H,
        W=W,
        OH=OH,
        OW=OW,
        C=C,
        PER_MEMBER=a is not None and len(a) > 1,
        EVEN=rows % tile.BLOCK_N == 0,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=4,
    )
    return y_MBHWC, kept

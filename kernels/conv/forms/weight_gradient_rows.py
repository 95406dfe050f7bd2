"""Weight gradient of 3×3 convolutions of stride 1, by rows of images: the loop that reads each activation three times.

The formula and the shapes are those of `weight_gradient.py`. There a tile reads x again for each of its taps
and dy for each tile of rows. Here a program owns BLOCK_I input and BLOCK_O output channels for all nine taps, with
9·BLOCK_I·BLOCK_O sums in registers, and goes over (group of images, row of the image) in steps: row h of x three times,
shifted by −1, 0 and 1, against rows h + 1, h and h − 1 of dy,

    dw[kh, kw] += Σ over images and w of x[h, w + kw − 1] · dy[h + 1 − kh, w].

Six tiles loaded for nine products: 96 FLOP a byte of bf16 with 64 × 64 channels, where a tile of 256 rows × 64 columns
has 51 and one of 128 × 128 has 64. From step to step only scalar offsets change. At E = 4 and B = 128 layers of 64, 128
and 256 channels make 4, 16 and 64 such programs: 33, 8 and 2 splits fill 132 multiprocessors with one each.

For compute capability 9: the nine sums fit its registers beside operands in shared memory. Ampere's products take their
operands from registers too, and for Blackwell the compiler rejects the loop.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.launch import begin, cdiv, launch


@triton.jit
def _store(p_dw, b_acc, o_kh, kw: tl.constexpr, o_ci, o_co, CI: tl.constexpr, CO: tl.constexpr, EVEN: tl.constexpr):
    """Sums (columns, ci) of one kw, to dw (3, 3, CI, CO)."""
    o_dw = ((o_kh * 3 + kw)[None, :] * CI + o_ci[:, None]) * CO + o_co[None, :]
    if EVEN:
        tl.store(p_dw + o_dw, tl.trans(b_acc))
    else:
        tl.store(p_dw + o_dw, tl.trans(b_acc), mask=(o_ci < CI)[:, None] & (o_co < CO)[None, :])


@triton.jit
def _shifted(
    p_x, b_a, b_b, o_pixel, o_w, m_pixel, o_ci, kw: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, EVEN: tl.constexpr
):
    """x[h, w + kw − 1] for a step's pixels, 0 outside; after the prologue where there is one."""
    mask = (m_pixel & (o_w + (kw - 1) >= 0) & (o_w + (kw - 1) < W))[:, None]
    if not EVEN:
        mask &= (o_ci < CI)[None, :]
    b_x = tl.load(p_x + ((o_pixel + (kw - 1)) * CI)[:, None] + o_ci[None, :], mask=mask, other=0.0)
    if b_a is not None:
        b_z = tl.maximum(b_a[None, :] * b_x.to(tl.float32) + b_b[None, :], 0.0)
        b_x = tl.where(mask, b_z, 0.0).to(b_x.dtype)
    return b_x


@triton.jit(do_not_specialize=["M"])
def weight_gradient_rows_kernel(
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
    SHARED: tl.constexpr,  # x has no member axis
    VECTOR_STEP: tl.constexpr,  # from a member's row of a and b to the next: CI, or 0 where they share one
    IMAGES: tl.constexpr,  # a step's: IMAGES · W <= BLOCK_K
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    EVEN_I: tl.constexpr = CI % BLOCK_I == 0
    EVEN_O: tl.constexpr = CO % BLOCK_O == 0
    i_split = tl.program_id(1)
    splits = tl.num_programs(1)
    i_m = tl.program_id(2).to(tl.int64)
    TILES_O: tl.constexpr = (CO + BLOCK_O - 1) // BLOCK_O
    o_ci = tl.program_id(0) // TILES_O * BLOCK_I + tl.arange(0, BLOCK_I)
    i_co = tl.program_id(0) % TILES_O * BLOCK_O
    # kh = 0 and 1 lie side by side in one tile of 2 · BLOCK_O columns, kh = 2 is a tile of its own
    o_pair = tl.arange(0, 2 * BLOCK_O)
    o_kh = o_pair // BLOCK_O
    o_co_pair = i_co + o_pair % BLOCK_O
    o_co = i_co + tl.arange(0, BLOCK_O)

    if p_a is not None:
        m_ci = o_ci < CI
        b_a = tl.load(p_a + i_m * VECTOR_STEP + o_ci, mask=m_ci, other=0.0)
        b_b = tl.load(p_b + i_m * VECTOR_STEP + o_ci, mask=m_ci, other=0.0)
    else:
        b_a = None
        b_b = None

    o_k = tl.arange(0, BLOCK_K)
    o_w = o_k % W
    o_pixel = o_k // W * (H * W) + o_w
    o_dy_pair = o_pixel[:, None] * CO + ((1 - o_kh) * (W * CO) + o_co_pair)[None, :]
    o_dy_last = (o_pixel - W)[:, None] * CO + o_co[None, :]
    if not SHARED:
        p_x += i_m * B * (H * W * CI)
    p_dy += i_m * B * (H * W * CO)

    steps = tl.cdiv(B, IMAGES) * H
    first = (i_split.to(tl.int64) * steps // splits).to(tl.int32)
    last = ((i_split.to(tl.int64) + 1) * steps // splits).to(tl.int32)
    b_pair_0 = tl.zeros((2 * BLOCK_O, BLOCK_I), dtype=tl.float32)
    b_pair_1 = tl.zeros((2 * BLOCK_O, BLOCK_I), dtype=tl.float32)
    b_pair_2 = tl.zeros((2 * BLOCK_O, BLOCK_I), dtype=tl.float32)
    b_last_0 = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    b_last_1 = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    b_last_2 = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for i_step in range(first, last):
        h = i_step % H
        i_image = i_step // H * IMAGES
        i_pixel = ((i_image * H + h) * W).to(tl.int64)
        m_pixel = i_image + o_k // W < B
        if IMAGES * W != BLOCK_K:
            m_pixel &= o_k < IMAGES * W
        m_pair = m_pixel[:, None] & (h + 1 - o_kh < H)[None, :]
        m_last = (m_pixel & (h > 0))[:, None]
        if not EVEN_O:
            m_pair &= (o_co_pair < CO)[None, :]
            m_last &= (o_co < CO)[None, :]
        b_dy_pair = tl.trans(tl.load(p_dy + i_pixel * CO + o_dy_pair, mask=m_pair, other=0.0))
        b_dy_last = tl.trans(tl.load(p_dy + i_pixel * CO + o_dy_last, mask=m_last, other=0.0))
        p_row = p_x + i_pixel * CI
        b_x = _shifted(p_row, b_a, b_b, o_pixel, o_w, m_pixel, o_ci, 0, W, CI, EVEN_I)
        b_pair_0 = tl.dot(b_dy_pair, b_x, b_pair_0, input_precision="ieee")
        b_last_0 = tl.dot(b_dy_last, b_x, b_last_0, input_precision="ieee")
        b_x = _shifted(p_row, b_a, b_b, o_pixel, o_w, m_pixel, o_ci, 1, W, CI, EVEN_I)
        b_pair_1 = tl.dot(b_dy_pair, b_x, b_pair_1, input_precision="ieee")
        b_last_1 = tl.dot(b_dy_last, b_x, b_last_1, input_precision="ieee")
        b_x = _shifted(p_row, b_a, b_b, o_pixel, o_w, m_pixel, o_ci, 2, W, CI, EVEN_I)
        b_pair_2 = tl.dot(b_dy_pair, b_x, b_pair_2, input_precision="ieee")
        # The condition is always true. With it the compiler waits for the products of a step at its end; without, for
        # those of the step before, which ptxas does not follow through six accumulators: it waits for each instruction.
        b_last_2 = tl.where(i_step < last, tl.dot(b_dy_last, b_x, b_last_2, input_precision="ieee"), 0.0)

    p_dw += (i_split.to(tl.int64) * M + i_m) * (9 * CI * CO)
    EVEN: tl.constexpr = EVEN_I and EVEN_O
    o_kh_last = tl.full((BLOCK_O,), 2, dtype=tl.int32)
    _store(p_dw, b_pair_0, o_kh, 0, o_ci, o_co_pair, CI, CO, EVEN)
    _store(p_dw, b_pair_1, o_kh, 1, o_ci, o_co_pair, CI, CO, EVEN)
    _store(p_dw, b_pair_2, o_kh, 2, o_ci, o_co_pair, CI, CO, EVEN)
    _store(p_dw, b_last_0, o_kh_last, 0, o_ci, o_co, CI, CO, EVEN)
    _store(p_dw, b_last_1, o_kh_last, 1, o_ci, o_co, CI, CO, EVEN)
    _store(p_dw, b_last_2, o_kh_last, 2, o_ci, o_co, CI, CO, EVEN)


def launch_rows(
    x: Tensor,
    dy_MBHWC: Tensor,
    parts: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    blocks: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
    splits: int,
) -> None:
    """Partial sums of `splits` shares of the steps into `parts` (splits, M, 3, 3, CI, CO); blocks (I, O, K), K >= W."""
    (M, B, H, W, CO), CI = dy_MBHWC.shape, x.shape[-1]
    BLOCK_I, BLOCK_O, BLOCK_K = blocks
    launch(
        weight_gradient_rows_kernel, (cdiv(CI, BLOCK_I) * cdiv(CO, BLOCK_O), splits, M), x, dy_MBHWC, parts, a, b, M, B,
        H=H, W=W, CI=CI, CO=CO, SHARED=x.dim() == 4, VECTOR_STEP=0 if a is None or a.shape[0] == 1 else CI,
        IMAGES=BLOCK_K // W, BLOCK_I=BLOCK_I, BLOCK_O=BLOCK_O, BLOCK_K=BLOCK_K,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip

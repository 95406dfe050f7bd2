"""Gradient of the image through a 7×7 convolution of stride 2, by patches of 4 × 4 pixels.

    acc[patch, (i, j, c)] = Σ over s, t = −1 … 3, channels n of dy[2·row + s, 2·column + t, n] · w[kh, kw, c, n]
                            kh = i + P − 2·s, kw = j + P − 2·t, where those are taps
    dx[4·row + i, 4·column + j, c] = scale[c] · acc         with `shared` the sum over the members of acc

An image has three channels, so that the input gradient's product would have 3 columns of 16, for each of four parities,
and read dy once for each of 49 taps that they meet. Here the pixels of a patch are columns side by side, 48 of 64, and
a patch reads the 5 × 5 pixels of dy that it meets once: 6.25 reads of dy for 2 × 2 pixels, where the parities make 49.

At 224 pixels, B = 128, two members and 64 channels dy is 411 MB, which takes 137 µs at 3.0 TB/s. By these counts the
loads from L2, at 5.5 TB/s, take 3.7 ms by parities and 0.5 ms by patches, whose weights take another 0.2 ms (205 KB for
128 patches), the products 0.2 ms of 800 TFLOP/s: predicted, not measured. Source: the definition of the convolution's
derivative.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels.conv.tiles import PATCH, Tile
from ensdistill.kernels.launch import begin, cdiv, launch


@triton.jit(do_not_specialize=["M"])
def patch_gradient_kernel(
    p_dy,
    p_w,
    p_members,
    p_dx,
    p_scale,
    M,
    B,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SCALE_ROW: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    ROWS: tl.constexpr = (H + PATCH - 1) // PATCH
    COLUMNS: tl.constexpr = (W + PATCH - 1) // PATCH
    P: tl.constexpr = K // 2
    FIRST: tl.constexpr = -(P // 2)  # row of dy, beyond twice the patch's, that its first pixels meet
    TAPS: tl.constexpr = (PATCH - 1 + P) // 2 - FIRST + 1
    K_BLOCKS: tl.constexpr = (CO + BLOCK_K - 1) // BLOCK_K
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    i_image, o_row, o_column = o_m // (ROWS * COLUMNS), (o_m // COLUMNS) % ROWS, o_m % COLUMNS
    m_patch = i_image < B
    o_i, o_j, o_c = o_n // (PATCH * CI), o_n // CI % PATCH, o_n % CI
    m_column = o_n < PATCH * PATCH * CI
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
        p_image = p_dy + i_read * B * (OH * OW * CO)
        p_weights = p_w + i_weight * (K * K * CI * CO)
        for i_k in range(TAPS * TAPS * K_BLOCKS):
            i_tap = i_k // K_BLOCKS
            i_s, i_t = i_tap // TAPS + FIRST, i_tap % TAPS + FIRST
            o_k = (i_k % K_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
            o_h, o_w = o_row * (PATCH // 2) + i_s, o_column * (PATCH // 2) + i_t
            m_dy = m_patch & (o_h >= 0) & (o_h < OH) & (o_w >= 0) & (o_w < OW)
            p_tile = p_image + ((i_image * OH + o_h) * OW + o_w)[:, None] * CO + o_k[None, :]
            b_dy = tl.load(p_tile, mask=m_dy[:, None] & (o_k < CO)[None, :], other=0.0)
            o_kh, o_kw = o_i + P - 2 * i_s, o_j + P - 2 * i_t
            m_w = m_column & (o_kh >= 0) & (o_kh < K) & (o_kw >= 0) & (o_kw < K)
            p_tile = p_weights + ((o_kh * K + o_kw) * CI + o_c)[:, None] * CO + o_k[None, :]
            b_w = tl.load(p_tile, mask=m_w[:, None] & (o_k < CO)[None, :], other=0.0)
            b_acc = tl.dot(b_dy, tl.trans(b_w), b_acc, input_precision="ieee")
    if p_scale is not None:
        b_acc *= tl.load(p_scale + i_weight * SCALE_ROW + o_c)[None, :]
    o_h, o_w = o_row[:, None] * PATCH + o_i[None, :], o_column[:, None] * PATCH + o_j[None, :]
    m_x = m_patch[:, None] & m_column[None, :] & (o_h < H) & (o_w < W)
    o_x = ((i_image[:, None] * H + o_h) * W + o_w) * CI + o_c[None, :]
    tl.store(p_dx + i_member * B * (H * W * CI) + o_x, b_acc.to(p_dx.dtype.element_ty), mask=m_x)


def launch_patches(
    dy_MBHWC: Tensor,
    w_EKKIO: Tensor,
    members: Tensor | None,
    dx: Tensor,
    scale: Tensor | None,
    *,
    shared: bool,
    scale_row: int,
    tile: Tile,
) -> None:
    """Write dx (M, B, H, W, CI), or with `shared` the members' sum (B, H, W, CI); `tile` of the PATCHES form."""
    (M, B, OH, OW, CO), k = dy_MBHWC.shape, w_EKKIO.shape[1]
    H, W, CI = dx.shape[-3:]
    patches = B * cdiv(H, PATCH) * cdiv(W, PATCH)
    launch(
        patch_gradient_kernel, (cdiv(patches, tile.BLOCK_M), 1 if shared else M), dy_MBHWC, w_EKKIO, members, dx,
        scale, M, B, H=H, W=W, OH=OH, OW=OW, CI=CI, CO=CO, K=k, SHARED=shared, SCALE_ROW=scale_row, PATCH=PATCH,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_K=tile.BLOCK_K, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip

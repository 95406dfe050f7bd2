"""Weights of ODS: K uniform numbers an image, whose sum with the teacher's probabilities is differentiated.

    w[i, k] = 2 · uniform(word k % 4 of Philox block k // 4 of row first_row + i) − 1        in (−1, 1)

w (B, K) float32, a multiple of 2**-23 each: kernel and reference agree to the bit on every device. Writes 4·B·K bytes
and reads the counter; some 15 integer operations a value. Source: Nam et al. 2021.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch
from ensdistill.kernels.launch import begin, cdiv, check, power_of_2, use_kernel
from ensdistill.kernels.philox import STREAM_ODS, check_counter, philox, uniform


def ods_weights_ref(counter: Tensor, B: int, K: int) -> Tensor:
    """Define w (B, K) by words of Philox, drawn on the counter's device."""
    rows = torch.arange(B, device=counter.device) + counter[2]
    blocks = torch.arange(cdiv(K, 4), device=counter.device)
    words = philox(counter[0], rows[:, None], counter[1], STREAM_ODS, blocks[None, :])
    return torch.stack([2 * uniform(word) - 1 for word in words], dim=-1).flatten(1)[:, :K]


@triton.jit
def ods_weights_kernel(
    p_counter, p_w, B, K: tl.constexpr, STREAM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):
    begin()
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_four = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
    seed, step, first_row = tl.load(p_counter), tl.load(p_counter + 1), tl.load(p_counter + 2)
    row = (first_row + o_b).to(tl.uint32)[:, None]
    word_0, word_1, word_2, word_3 = tl.philox(seed, row, step.to(tl.uint32), STREAM, o_four[None, :])
    # the last axis that `join` adds is the fastest
    b_word = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).reshape(BLOCK_B, BLOCK_K)
    b_w = 2.0 * (((b_word >> 9).to(tl.float32) + 0.5) * (1.0 / (1 << 23))) - 1.0
    o_w = o_b.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_w + o_w, b_w, mask=(o_b < B)[:, None] & (o_k < K)[None, :])


def launch_ods_weights(counter: Tensor, B: int, K: int) -> Tensor:
    """Allocate and launch: w (B, K)."""
    w_BK = torch.empty((B, K), dtype=torch.float32, device=counter.device)
    BLOCK_K = min(max(4, power_of_2(K)), 1 << 14 if launch.INTERPRETED else 1024)
    BLOCK_B = 1024 // BLOCK_K if BLOCK_K < 1024 else 1
    if launch.INTERPRETED:  # tiles that keep the programs few
        few = power_of_2(cdiv(B * cdiv(K, BLOCK_K), launch.MAX_INTERPRETED_PROGRAMS))
        BLOCK_B = min(max(few, BLOCK_B), launch.MAX_TILE // BLOCK_K)
    grid = (cdiv(B, BLOCK_B), cdiv(K, BLOCK_K))
    tile = {"BLOCK_B": BLOCK_B, "BLOCK_K": BLOCK_K}
    launch.launch(ods_weights_kernel, grid, counter, w_BK, B, K=K, STREAM=STREAM_ODS, **tile, num_warps=4)
    return w_BK


def ods_weights(counter: Tensor, B: int, K: int, *, kernel: bool | None = None) -> Tensor:
    """Draw the batch's weights (B, K), float32; see the module's docstring.

    Args:
        counter: (seed, step, first_row), int64 (3,), from `philox.counter_of`; w is drawn on its device.
        B, K: images and classes.
        kernel: see `use_kernel`.

    Raises:
        ValueError: `counter` is no int64 tensor (3,), or there is no image or no class.
    """
    check_counter(counter)
    check(B >= 1 and K >= 1, "B, K", "at least 1 image and 1 class", (B, K))
    return launch_ods_weights(counter, B, K) if use_kernel(kernel, counter) else ods_weights_ref(counter, B, K)

"""Seeds of the perturbation's backward: gradients of its objectives with respect to the logits, written down.

    ∂L/∂t_a = p_a − p_b,   ∂L/∂s_a = −(q_a − q_b),   p, q = softmax of teacher and student logits at τ = 1
    ods: ∂/∂t Σ_k w_k p_k = p ∘ (w − Σ_k w_k p_k) / τ,   confidence = max_k p_k,   p = softmax(t / τ)

L is the perturbation's objective, cross-entropy of a under b, teachers minus student, p_b and q_b held constant; the
1/B of its mean is left out, for the perturbation normalises the gradient. Softmax and differences in fp32: the
differences cancel. No logarithm is taken of a probability, which may be exactly 0. All (B, K): reads two, writes one;
some 10 FLOP a value. Sources: Nam et al. 2022, equations 8 to 12; output diversified sampling (Tashiro et al. 2020) at
the temperature of Nam et al. 2021.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ensdistill.kernels import launch
from ensdistill.kernels.launch import KERNEL_TYPES, begin, cdiv, check, power_of_2, use_kernel


def divergence_seeds_ref(a_BK: Tensor, b_BK: Tensor) -> Tensor:
    """Define softmax(a) − softmax(b), the gradient of the cross-entropy of a under b in a's logits (…, K)."""
    return a_BK.to(at_least_fp32(a_BK)).softmax(-1) - b_BK.to(at_least_fp32(b_BK)).softmax(-1)


def ods_seeds_ref(t_BK: Tensor, w_BK: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Define the gradient of Σ w · softmax(t / τ) in t (B, K), and the confidence max softmax(t / τ) (B,)."""
    p_BK = (t_BK.to(at_least_fp32(t_BK)) / tau).softmax(-1)
    return p_BK * (w_BK - (p_BK * w_BK).sum(-1, keepdim=True)) / tau, p_BK.amax(-1)


def at_least_fp32(x: Tensor) -> torch.dtype:
    """Choose the type to compute with: that of `x`, at least float32."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


@triton.jit
def row_softmax(p_row, inverse_tau, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """Find the largest of each row of logits, and Σ exp((x − largest) / τ)."""
    # Each lane gathers its own over the blocks, and one reduction ends it: fewer of them, and Triton 3.6 fails to
    # compile some loops that reduce in every turn.
    o_k = tl.arange(0, BLOCK_K)[None, :]
    b_top = tl.full([BLOCK_R, BLOCK_K], float("-inf"), tl.float32)
    for k in range(0, K, BLOCK_K):
        b_x = tl.load(p_row[:, None] + (k + o_k), mask=k + o_k < K, other=float("-inf")).to(tl.float32)
        b_top = tl.maximum(b_top, b_x)
    top = tl.max(b_top, axis=1)
    b_total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        b_x = tl.load(p_row[:, None] + (k + o_k), mask=k + o_k < K, other=float("-inf")).to(tl.float32)
        b_total += tl.exp((b_x - top[:, None]) * inverse_tau)
    return top, tl.sum(b_total, axis=1)


@triton.jit
def divergence_seeds_kernel(
    p_a, p_b, p_out, first, second, B, R, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    begin()
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_sign = tl.where(o_r < B, first, second)[:, None]
    # rows past the end compute the last one again
    o_row = tl.minimum(o_r, R - 1).to(tl.int64) * K
    top_a, total_a = row_softmax(p_a + o_row, 1.0, K, BLOCK_R, BLOCK_K)
    top_b, total_b = row_softmax(p_b + o_row, 1.0, K, BLOCK_R, BLOCK_K)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)[None, :]
        b_a = tl.load(p_a + o_row[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32)
        b_b = tl.load(p_b + o_row[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32)
        p = tl.exp(b_a - top_a[:, None]) / total_a[:, None]
        q = tl.exp(b_b - top_b[:, None]) / total_b[:, None]
        b_out = (b_sign * (p - q)).to(p_out.dtype.element_ty)
        tl.store(p_out + o_row[:, None] + o_k, b_out, mask=(o_r < R)[:, None] & (o_k < K))


@triton.jit
def ods_seeds_kernel(
    p_t, p_w, p_out, p_confidence, tau, R, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    begin()
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row = tl.minimum(o_r, R - 1).to(tl.int64) * K
    inverse_tau = 1.0 / tau
    top, total = row_softmax(p_t + o_row, inverse_tau, K, BLOCK_R, BLOCK_K)
    b_mean = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)[None, :]
        b_t = tl.load(p_t + o_row[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32)
        b_w = tl.load(p_w + o_row[:, None] + o_k, mask=o_k < K, other=0).to(tl.float32)
        b_mean += tl.exp((b_t - top[:, None]) * inverse_tau) / total[:, None] * b_w
    mean_w = tl.sum(b_mean, axis=1)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)[None, :]
        b_t = tl.load(p_t + o_row[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32)
        b_w = tl.load(p_w + o_row[:, None] + o_k, mask=o_k < K, other=0).to(tl.float32)
        p = tl.exp((b_t - top[:, None]) * inverse_tau) / total[:, None]
        b_out = (p * (b_w - mean_w[:, None]) * inverse_tau).to(p_out.dtype.element_ty)
        tl.store(p_out + o_row[:, None] + o_k, b_out, mask=(o_r < R)[:, None] & (o_k < K))
    tl.store(p_confidence + o_r, 1.0 / total, mask=o_r < R)  # exp(0) is the largest term


def row_tiles(R: int, K: int) -> tuple[int, dict[str, int]]:
    """Count the programs over R rows of K logits and choose their tile: a warp a row of up to 512 logits."""
    BLOCK_K = min(power_of_2(K), 1 << 15 if launch.INTERPRETED else 2048)
    BLOCK_R = max(1, 512 // BLOCK_K)
    if launch.INTERPRETED:
        BLOCK_R = min(power_of_2(cdiv(R, launch.MAX_INTERPRETED_PROGRAMS)), launch.MAX_TILE // BLOCK_K)
    return cdiv(R, BLOCK_R), {"BLOCK_R": BLOCK_R, "BLOCK_K": BLOCK_K, "num_warps": 4 if BLOCK_K <= 1024 else 8}


def launch_divergence_seeds(a_GBK: Tensor, b_GBK: Tensor, signs: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Allocate and launch: signs_g · (softmax(a_g) − softmax(b_g)) in `dtype`."""
    (G, B, K), out_GBK = a_GBK.shape, torch.empty(a_GBK.shape, dtype=dtype, device=a_GBK.device)
    programs, tile = row_tiles(G * B, K)
    args = (a_GBK.contiguous(), b_GBK.contiguous(), out_GBK, float(signs[0]), float(signs[-1]), B, G * B)
    launch.launch(divergence_seeds_kernel, (programs,), *args, K=K, **tile)
    return out_GBK


def launch_ods_seeds(t_BK: Tensor, w_BK: Tensor, tau: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Allocate and launch: the seeds in `dtype`, the confidence in float32."""
    (B, K), out_BK = t_BK.shape, torch.empty(t_BK.shape, dtype=dtype, device=t_BK.device)
    confidence_B = torch.empty(B, dtype=torch.float32, device=t_BK.device)
    programs, tile = row_tiles(B, K)
    args = (t_BK.contiguous(), w_BK.contiguous(), out_BK, confidence_B, tau, B)
    launch.launch(ods_seeds_kernel, (programs,), *args, K=K, **tile)
    return out_BK, confidence_B


def divergence_seeds(
    a_GBK: Tensor,
    b_GBK: Tensor,
    signs: Sequence[float] = (1.0,),
    *,
    dtype: torch.dtype | None = None,
    kernel: bool | None = None,
) -> Tensor:
    """Compute signs_g · (softmax(a_g) − softmax(b_g)), (G, B, K): the seeds of a's backward.

    Args:
        a_GBK, b_GBK: logits of the members a and b of one network or two: G is 1 or 2.
        signs: G of them, 1 for teachers, −1 for the student.
        dtype: of the result; None for the type that it is computed in, at least float32.
        kernel: see `use_kernel`.

    Raises:
        ValueError: the shapes are not one (G, B, K), or G is neither 1 nor 2.
    """
    is_logits = a_GBK.is_floating_point() and a_GBK.ndim == 3 and a_GBK.numel() > 0
    check(is_logits, "a_GBK", "floating-point logits (G, B, K)", a_GBK)
    check(a_GBK.shape == b_GBK.shape, "b_GBK", f"the shape of a_GBK, {tuple(a_GBK.shape)}", b_GBK)
    check(len(signs) == len(a_GBK) <= 2, "signs", f"{len(a_GBK)}, one for each of at most two networks", signs)
    if use_kernel(kernel, a_GBK, b_GBK):
        return launch_divergence_seeds(a_GBK.detach(), b_GBK.detach(), signs, _kernel_type(dtype))
    differences = divergence_seeds_ref(a_GBK.detach(), b_GBK.detach())
    seeds_GBK = torch.stack([sign * one for sign, one in zip(signs, differences, strict=True)])
    return seeds_GBK if dtype is None else seeds_GBK.to(dtype)


def ods_seeds(
    t_BK: Tensor, w_BK: Tensor, tau: float, *, dtype: torch.dtype | None = None, kernel: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of Σ w · softmax(t / τ) in the logits t (B, K), and the confidence max softmax(t / τ) (B,).

    Args:
        t_BK: logits.
        w_BK: weights.
        tau: temperature τ.
        dtype: of the gradient; None for the type that it is computed in, at least float32, as the confidence has.
        kernel: see `use_kernel`.

    Raises:
        ValueError: the shapes are not one (B, K), or τ is not positive.
    """
    _check_rows("t_BK", t_BK)
    check(t_BK.shape == w_BK.shape, "w_BK", f"the shape of t_BK, {tuple(t_BK.shape)}", w_BK)
    check(tau > 0, "tau", "a positive temperature", tau)
    if use_kernel(kernel, t_BK, w_BK):
        return launch_ods_seeds(t_BK.detach(), w_BK.detach(), tau, _kernel_type(dtype))
    seeds_BK, confidence_B = ods_seeds_ref(t_BK.detach(), w_BK.detach(), tau)
    return seeds_BK if dtype is None else seeds_BK.to(dtype), confidence_B


def _check_rows(name: str, x_BK: Tensor) -> None:
    check(x_BK.is_floating_point() and x_BK.ndim == 2 and x_BK.numel() > 0, name, "floating-point logits (B, K)", x_BK)


def _kernel_type(dtype: torch.dtype | None) -> torch.dtype:
    check(dtype is None or dtype in KERNEL_TYPES, "dtype", "float32 or bfloat16", dtype)
    return dtype or torch.float32

"""Distillation loss: everything between the logits and the student's gradient.

    loss_kd = τ² · mean over members and images of −Σ_k softmax(t_m / τ)_k · log softmax(s_m / τ)_k
    loss_ce = mean over members and images of −log softmax(s_m)_label,   acc1 = mean of [argmax s_m = label]
    loss    = α · loss_kd + (1 − α) · loss_ce
    ∂loss/∂s = (α τ (softmax(s / τ) − softmax(t / τ)) + (1 − α) (softmax(s) − onehot)) / (M B)

t (E, B, K) teachers, s (M, B, K) student: M = E (one member, one teacher) or M = 1 (`kd`: one student, every teacher;
then the teachers' softmax is their mean). One pass: logits of both are read from memory once (and again from the
caches, where the row maximum and the sums must come first) and the gradient is written once, in the student's type;
some 30 FLOP a value. The rows' losses are summed in a fixed order by a second, tiny kernel. Arithmetic in fp32,
differences of logits before they are divided by τ. Source: Nam et al. 2022, equations 8 to 12. The seeds of the
perturbation's backward are in seeds.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ensdistill.kernels import launch
from ensdistill.kernels.launch import begin, check, power_of_2, use_kernel
from ensdistill.kernels.loss.seeds import at_least_fp32, row_softmax, row_tiles


class DistilOutput(NamedTuple):
    """Scalars on the device, at least float32; `loss` alone is differentiable, and only without `gradient_MBK`."""

    loss: Tensor
    """Sum α · loss_kd + (1 − α) · loss_ce."""
    loss_kd: Tensor | None
    """Distillation loss; None without teachers."""
    loss_ce: Tensor
    acc1: Tensor
    """Share of the M·B rows whose largest logit, the first of equal ones, is the label's."""
    gradient_MBK: Tensor | None
    """∂loss/∂s, which the kernel writes with the loss; None from the reference, where autograd has it."""


def distil_ref(s_MBK: Tensor, t_EBK: Tensor, tau: float) -> Tensor:
    """Define loss_kd, a scalar that is differentiable in `s_MBK`."""
    s_MBK, t_EBK = s_MBK.to(at_least_fp32(s_MBK)), t_EBK.to(at_least_fp32(t_EBK))
    return -(tau**2) * ((t_EBK / tau).softmax(-1) * (s_MBK / tau).log_softmax(-1)).sum(-1).mean()


def cross_entropy_ref(s_MBK: Tensor, labels_B: Tensor) -> Tensor:
    """Average the plain cross-entropy on labels over all M·B rows."""
    M, B, K = s_MBK.shape
    return F.cross_entropy(s_MBK.to(at_least_fp32(s_MBK)).reshape(M * B, K), labels_B.repeat(M))


def distil_output_ref(s_MBK: Tensor, t_EBK: Tensor | None, labels_B: Tensor, tau: float, alpha: float) -> DistilOutput:
    """Define all measures; at α = 1 the labels only measure."""
    loss_ce = cross_entropy_ref(s_MBK if alpha < 1 else s_MBK.detach(), labels_B)
    loss_kd = distil_ref(s_MBK, t_EBK.detach(), tau) if t_EBK is not None else None
    loss = (1 - alpha) * loss_ce if loss_kd is None or alpha < 1 else torch.zeros_like(loss_ce)
    if loss_kd is not None and alpha > 0:
        loss = alpha * loss_kd + loss
    acc1 = (s_MBK.argmax(-1) == labels_B).to(loss_ce.dtype).mean()
    return DistilOutput(loss, None if loss_kd is None else loss_kd.detach(), loss_ce.detach(), acc1, None)


@triton.jit
def distil_kernel(
    p_s,
    p_t,
    p_labels,
    p_rows,
    p_ds,
    R,
    B,
    tau,
    alpha,
    K: tl.constexpr,
    TEACHERS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    begin()
    # rows r = m · B + b of the student; teacher e of row r is row e · R + r
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    i_r = tl.minimum(o_r, R - 1).to(tl.int64)  # rows past the end compute the last one again
    label = tl.load(p_labels + i_r % B).to(tl.int32)
    inverse_tau = 1.0 / tau
    o_s = i_r * K
    b_best = tl.full([BLOCK_R, BLOCK_K], float("-inf"), tl.float32)
    o_best = tl.full([BLOCK_R, BLOCK_K], K, tl.int32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)[None, :]
        b_s = tl.load(p_s + o_s[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32)
        o_best = tl.where(b_s > b_best, o_k, o_best)
        b_best = tl.maximum(b_best, b_s)
    best = tl.max(b_best, axis=1)
    i_best = tl.min(tl.where(b_best == best[:, None], o_best, K), axis=1)  # the first of equal ones
    b_total, b_total_tau, b_label = tl.zeros_like(b_best), tl.zeros_like(b_best), tl.zeros_like(b_best)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)[None, :]
        b_s = tl.load(p_s + o_s[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32) - best[:, None]
        b_total += tl.exp(b_s)
        b_total_tau += tl.exp(b_s * inverse_tau)
        b_label += tl.where(o_k == label[:, None], b_s, 0.0)
    total, total_tau = tl.sum(b_total, axis=1), tl.sum(b_total_tau, axis=1)
    # a label outside the classes is an error that must be seen
    loss_ce = tl.where((label >= 0) & (label < K), tl.log(total) - tl.sum(b_label, axis=1), float("nan"))
    if TEACHERS > 0:
        loss_kd = tl.zeros_like(best)
        o_e = tl.arange(0, BLOCK_E)[None, :]
        tops, totals = tl.zeros([BLOCK_R, BLOCK_E], tl.float32), tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        for e in range(TEACHERS):
            o_t = (i_r + e * R) * K
            top_t, total_t = row_softmax(p_t + o_t, inverse_tau, K, BLOCK_R, BLOCK_K)
            b_cross = tl.zeros_like(b_best)
            for k in range(0, K, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)[None, :]
                b_s = tl.load(p_s + o_s[:, None] + o_k, mask=o_k < K, other=0).to(tl.float32) - best[:, None]
                b_t = tl.load(p_t + o_t[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32)
                b_cross += tl.exp((b_t - top_t[:, None]) * inverse_tau) * (b_s * inverse_tau)
            loss_kd += tl.log(total_tau) - tl.sum(b_cross, axis=1) / total_t
            tops = tl.where(o_e == e, top_t[:, None], tops)
            totals = tl.where(o_e == e, total_t[:, None], totals)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)[None, :]
        b_s = tl.load(p_s + o_s[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32) - best[:, None]
        b_ds = (1 - alpha) * (tl.exp(b_s) / total[:, None] - tl.where(o_k == label[:, None], 1.0, 0.0))
        if TEACHERS > 0:
            b_p = tl.zeros_like(b_s)
            for e in range(TEACHERS):
                o_t = (i_r + e * R) * K
                b_t = tl.load(p_t + o_t[:, None] + o_k, mask=o_k < K, other=float("-inf")).to(tl.float32)
                top_t = tl.sum(tl.where(o_e == e, tops, 0.0), axis=1)
                total_t = tl.sum(tl.where(o_e == e, totals, 0.0), axis=1)
                b_p += tl.exp((b_t - top_t[:, None]) * inverse_tau) / total_t[:, None]
            b_ds += alpha * tau * (tl.exp(b_s * inverse_tau) / total_tau[:, None] - b_p / TEACHERS)
        tl.store(p_ds + o_s[:, None] + o_k, (b_ds / R).to(p_ds.dtype.element_ty), mask=m_r[:, None] & (o_k < K))
    tl.store(p_rows + o_r, loss_ce, mask=m_r)
    tl.store(p_rows + R + o_r, tl.where(i_best == label, 1.0, 0.0), mask=m_r)
    if TEACHERS > 0:
        tl.store(p_rows + 2 * R + o_r, loss_kd * (tau * tau / TEACHERS), mask=m_r)


@triton.jit
def distil_sum_kernel(
    p_rows, p_loss, p_loss_kd, p_loss_ce, p_acc1, R, alpha, TEACHERS: tl.constexpr, BLOCK_R: tl.constexpr
):
    begin()
    ce, hits, kd = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for r in range(0, R, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        ce += tl.load(p_rows + o_r, mask=o_r < R, other=0)
        hits += tl.load(p_rows + R + o_r, mask=o_r < R, other=0)
        if TEACHERS > 0:
            kd += tl.load(p_rows + 2 * R + o_r, mask=o_r < R, other=0)
    loss_ce, loss_kd = tl.sum(ce) / R, tl.sum(kd) / R
    tl.store(p_loss, alpha * loss_kd + (1 - alpha) * loss_ce)
    tl.store(p_loss_kd, loss_kd)
    tl.store(p_loss_ce, loss_ce)
    tl.store(p_acc1, tl.sum(hits) / R)


def launch_distil(s_MBK: Tensor, t_EBK: Tensor | None, labels_B: Tensor, tau: float, alpha: float) -> DistilOutput:
    """Allocate and launch; the gradient is in the type of `s_MBK`."""
    (M, B, K), device = s_MBK.shape, s_MBK.device
    R, teachers = M * B, 0 if t_EBK is None else len(t_EBK) // M
    ds_MBK = torch.empty(s_MBK.shape, dtype=s_MBK.dtype, device=device)
    rows = torch.empty((3, R), dtype=torch.float32, device=device)
    loss, loss_kd, loss_ce, acc1 = (torch.empty((), dtype=torch.float32, device=device) for _ in range(4))
    programs, tile = row_tiles(R, K)
    launch.launch(
        distil_kernel,
        (programs,),
        s_MBK.contiguous(),
        None if t_EBK is None else t_EBK.contiguous(),
        labels_B.contiguous(),
        rows,
        ds_MBK,
        R,
        B,
        tau,
        alpha,
        K=K,
        TEACHERS=teachers,
        BLOCK_E=power_of_2(max(1, teachers)),
        **tile,
    )
    scalars = (loss, loss_kd, loss_ce, acc1)
    BLOCK_R = min(power_of_2(R), 1024)
    launch.launch(distil_sum_kernel, (1,), rows, *scalars, R, alpha, TEACHERS=teachers, BLOCK_R=BLOCK_R, num_warps=4)
    return DistilOutput(loss, None if t_EBK is None else loss_kd, loss_ce, acc1, ds_MBK)


def distil(
    s_MBK: Tensor, t_EBK: Tensor | None, labels_B: Tensor, tau: float, alpha: float, *, kernel: bool | None = None
) -> DistilOutput:
    """Compute loss and measures of the student's logits; see the module's docstring.

    Args:
        s_MBK: logits of the student's M members.
        t_EBK: the teachers' logits, E = M or M = 1; held constant. None: labels alone, α = 0.
        labels_B: int64 in [0, K).
        tau: temperature τ.
        alpha: weight α of the distillation, in [0, 1].
        kernel: see `use_kernel`.

    Raises:
        ValueError: shapes, types, τ or α do not fit.
    """
    check(s_MBK.is_floating_point() and s_MBK.ndim == 3 and s_MBK.numel() > 0, "s_MBK", "logits (M, B, K)", s_MBK)
    M, B, K = s_MBK.shape
    if t_EBK is not None:
        fits = t_EBK.ndim == 3 and t_EBK.shape[1:] == (B, K) and (M == 1 or len(t_EBK) == M) and len(t_EBK) > 0
        check(t_EBK.is_floating_point() and fits, "t_EBK", f"logits ({M if M > 1 else 'E'}, {B}, {K})", t_EBK)
    check(labels_B.dtype == torch.int64 and labels_B.shape == (B,), "labels_B", f"an int64 tensor ({B},)", labels_B)
    check(tau > 0, "tau", "a positive temperature", tau)
    check(0 <= alpha <= 1, "alpha", "0 ≤ alpha ≤ 1", alpha)
    check(t_EBK is not None or alpha == 0, "alpha", "0 without teachers", alpha)
    if not use_kernel(kernel, s_MBK, t_EBK):
        return distil_output_ref(s_MBK, t_EBK, labels_B, tau, alpha)
    t_EBK = None if t_EBK is None else t_EBK.detach()
    return launch_distil(s_MBK.detach(), t_EBK, labels_B, tau, alpha)

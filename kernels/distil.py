"""Distillation loss and the seeds of the perturbation's backward: everything between logits and gradients.

    loss_kd = τ² · mean over members and images of −Σ_k softmax(t_m / τ)_k · log softmax(s_m / τ)_k
    ∂L/∂t_a = p_a − p_b,   ∂L/∂s_a = −(q_a − q_b),   p, q = softmax of teacher and student logits at τ = 1

t (E, B, K) teachers, s (M, B, K) student: M = E (one member, one teacher) or M = 1 (`kd`: one student, every teacher).
L is the perturbation's objective, cross-entropy of a under b, teachers minus student, p_b and q_b held constant; the
1/B of its mean is left out, for the perturbation normalises the gradient. Softmax and differences in fp32: the
differences cancel. No logarithm is taken of a probability, which may be exactly 0. Source: Nam et al. 2022, equations 8
to 12.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distil_ref(s_MBK: Tensor, t_EBK: Tensor, tau: float) -> Tensor:
    """The definition of loss_kd: a scalar, differentiable in `s_MBK`."""
    s_MBK, t_EBK = s_MBK.to(_at_least_fp32(s_MBK)), t_EBK.to(_at_least_fp32(t_EBK))
    return -(tau**2) * ((t_EBK / tau).softmax(-1) * (s_MBK / tau).log_softmax(-1)).sum(-1).mean()


def divergence_seeds_ref(a_BK: Tensor, b_BK: Tensor) -> Tensor:
    """softmax(a) − softmax(b), the gradient of the cross-entropy of a under b with respect to a's logits (B, K)."""
    return a_BK.to(_at_least_fp32(a_BK)).softmax(-1) - b_BK.to(_at_least_fp32(b_BK)).softmax(-1)


def ods_seeds_ref(t_BK: Tensor, w_BK: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Gradient of Σ w · softmax(t / τ) with respect to t (B, K), and the confidence max softmax(t / τ) (B,).

    Source: output diversified sampling (Tashiro et al. 2020), at the temperature of Nam et al. 2021.
    """
    p_BK = (t_BK.to(_at_least_fp32(t_BK)) / tau).softmax(-1)
    return p_BK * (w_BK - (p_BK * w_BK).sum(-1, keepdim=True)) / tau, p_BK.amax(-1)


def cross_entropy_ref(s_MBK: Tensor, labels_B: Tensor) -> Tensor:
    """Plain cross-entropy on labels, the mean over all M·B rows."""
    M, B, K = s_MBK.shape
    return F.cross_entropy(s_MBK.to(_at_least_fp32(s_MBK)).reshape(M * B, K), labels_B.repeat(M))


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32

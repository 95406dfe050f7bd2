"""The data shown to the student: clean, gaussian, ods, confods, tdiv, tdiv-sdiv.

In F, one forward of one network over the batch (an input-only backward is 1 F): ods and confods cost 2 F, tdiv 3 F,
tdiv-sdiv 3 F for the teachers and 3 F for the student. Members a and b are run forward, only a backward, and the seeds
of the backward are written down (kernels/distil.py), so that no loss is differentiated.
Sources: Nam et al. 2022 (tdiv, sdiv); Nam et al. 2021 (gaussian, ods, confods). Everything runs in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ensdistill.kernels.distil import divergence_seeds_ref, ods_seeds_ref
from ensdistill.kernels.perturb import perturb
from ensdistill.kernels.philox import STREAM_NOISE, STREAM_ODS, STREAM_PAIR, below, draw_pair, normal, philox, uniform

if TYPE_CHECKING:
    from ensdistill.students import Student
    from ensdistill.teachers import Teachers


def divergence_gradient(x_BCHW: Tensor, teachers: Teachers, student: Student | None, pair: tuple[int, int]) -> Tensor:
    """∂L/∂x up to a factor an image: L = CE(teacher a under b) − CE(member a under b).

    Without a student the first term alone. `student` must be in evaluation mode. Returns: shape of `x_BCHW`, no graph.
    """
    a, b = pair
    x_BCHW = x_BCHW.detach().requires_grad_()
    outputs, seeds = [], []
    with torch.enable_grad():
        t_BK = teachers.member(a, x_BCHW)
    with torch.no_grad():
        seeds.append(divergence_seeds_ref(t_BK, teachers.member(b, x_BCHW)).to(t_BK.dtype))
    outputs.append(t_BK)
    if student is not None:
        with torch.enable_grad():
            s_BK = student(x_BCHW, members=(a,))[0]
        with torch.no_grad():
            seeds.append(-divergence_seeds_ref(s_BK, student(x_BCHW, members=(b,))[0]).to(s_BK.dtype))
        outputs.append(s_BK)
    return _input_gradient(outputs, x_BCHW, seeds)


def show(
    shown: str,
    x_BCHW: Tensor,
    *,
    teachers: Teachers | None,
    student: Student,
    seed: int,
    step: int,
    tau: float,
    first_row: int = 0,
) -> Tensor:
    """The images that the student trains on, x' (B, C, H, W) in [0, 1]; `shown` is one of `methods.SHOWN`.

    `student` is in evaluation mode. `first_row`: the global row of the batch's first image.
    """
    if shown == "clean":
        return x_BCHW
    rows = torch.arange(first_row, first_row + len(x_BCHW), device=x_BCHW.device)
    if shown == "gaussian":
        noise_BCHW = normal(seed, rows, step, STREAM_NOISE, x_BCHW[0].numel()).view(x_BCHW.shape)
        return (x_BCHW + noise_BCHW / 255).clamp(0, 1)
    assert teachers is not None, f"{shown} needs teachers"
    if shown in ("tdiv", "tdiv-sdiv"):
        pair = draw_pair(seed, step, teachers.E)
        g_BCHW = divergence_gradient(x_BCHW, teachers, student if shown == "tdiv-sdiv" else None, pair)
        return perturb(x_BCHW, g_BCHW)
    j = below(philox(seed, 0, step, STREAM_PAIR)[2], teachers.E)
    g_BCHW, confidence_B = _ods_gradient(x_BCHW, teachers, j, rows, seed=seed, step=step, tau=tau)
    return perturb(x_BCHW, g_BCHW, confidence_B if shown == "confods" else None)


def _ods_gradient(
    x_BCHW: Tensor, teachers: Teachers, j: int, rows: Tensor, *, seed: int, step: int, tau: float
) -> tuple[Tensor, Tensor]:
    x_BCHW = x_BCHW.detach().requires_grad_()
    with torch.enable_grad():
        t_BK = teachers.member(j, x_BCHW)
    K = t_BK.shape[1]
    blocks = torch.arange((K + 3) // 4, device=x_BCHW.device)
    words = philox(seed, rows[:, None], step, STREAM_ODS, blocks[None, :])
    w_BK = torch.stack([2 * uniform(word) - 1 for word in words], dim=-1).flatten(1)[:, :K]
    with torch.no_grad():
        seeds_BK, confidence_B = ods_seeds_ref(t_BK, w_BK, tau)
    return _input_gradient([t_BK], x_BCHW, [seeds_BK.to(t_BK.dtype)]), confidence_B


def _input_gradient(outputs: Sequence[Tensor], x: Tensor, seeds: Sequence[Tensor]) -> Tensor:
    # Asking for x alone makes autograd skip every weight gradient: an input-only backward.
    (gradient,) = torch.autograd.grad(outputs, x, seeds)
    return gradient

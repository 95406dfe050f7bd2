"""The data shown to the student: clean, gaussian, ods, confods, tdiv, tdiv-sdiv.

In F, one forward of one network over the batch (an input-only backward is 1 F): ods and confods cost 2 F, tdiv 3 F,
tdiv-sdiv 3 F for the teachers and 3 F for the student. Members a and b are run forward, only a backward, and the seeds
of the backward are written down (kernels/loss/seeds.py), so that no loss is differentiated.
Sources: Nam et al. 2022 (tdiv, sdiv); Nam et al. 2021 (gaussian, ods, confods). Everything runs in evaluation mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ensdistill.kernels.images.noise import add_noise
from ensdistill.kernels.images.ods_weights import ods_weights
from ensdistill.kernels.images.perturb import perturb
from ensdistill.kernels.philox import (
    counter_of,
    draw_pair,
    draw_pair_on_device,
    draw_teacher,
    draw_teacher_on_device,
)

if TYPE_CHECKING:
    from ensdistill.engine.networks import Networks


def show(
    shown: str,
    x_BCHW: Tensor,
    networks: Networks,
    *,
    seed: int,
    step: int,
    tau: float,
    first_row: int = 0,
    counter: Tensor | None = None,
    z_BHWC: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The images that the student trains on, x' (B, C, H, W) in [0, 1]; `shown` is one of `methods.SHOWN`.

    Args:
        first_row: the global row of the batch's first image.
        counter: (seed, step, first_row) on the device of the images (`philox.counter_of`), if it is there: what is
            drawn is read from it, but for members that the networks have to be told by the host.
        z_BHWC: the images normalised, if they are already.

    Returns:
        x', and x' normalised where that came with it.
    """
    if shown == "clean":
        return x_BCHW, z_BHWC
    if counter is None:
        counter = counter_of(seed, step, first_row, x_BCHW.device)
    if shown == "gaussian":
        return _add_noise(networks, x_BCHW, counter)
    assert networks.teachers is not None, f"{shown} needs teachers"
    E, K = networks.teachers.E, networks.teachers.num_classes
    on_device, kernel = networks.selects_on_device(shown), networks.kernel
    if shown in ("tdiv", "tdiv-sdiv"):
        beside = networks.beside(shown)
        pair = draw_pair_on_device(counter, E, beside=beside, kernel=kernel) if on_device else draw_pair(seed, step, E)
        g_BCHW = networks.divergence_gradient(x_BCHW, pair, with_student=shown == "tdiv-sdiv", z_BHWC=z_BHWC)
        return _perturb(networks, x_BCHW, g_BCHW, None)
    j = draw_teacher_on_device(counter, E, kernel=kernel) if on_device else draw_teacher(seed, step, E)
    w_BK = ods_weights(counter, len(x_BCHW), K, kernel=kernel)
    g_BCHW, confidence_B = networks.ods_gradient(x_BCHW, j, w_BK, tau, z_BHWC=z_BHWC)
    return _perturb(networks, x_BCHW, g_BCHW, confidence_B if shown == "confods" else None)


def _add_noise(networks: Networks, x_BCHW: Tensor, counter: Tensor) -> tuple[Tensor, Tensor | None]:
    if networks.normalise is None:
        return add_noise(x_BCHW, counter, kernel=networks.kernel), None
    x_BCHW, z_BCHW = add_noise(
        x_BCHW, counter, normalise=networks.normalise, dtype=networks.dtype, kernel=networks.kernel
    )
    return x_BCHW, z_BCHW.permute(0, 2, 3, 1)


def _perturb(
    networks: Networks, x_BCHW: Tensor, g_BCHW: Tensor, scale_B: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if networks.normalise is None:
        return perturb(x_BCHW, g_BCHW, scale_B, kernel=networks.kernel), None
    x_BCHW, z_BCHW = perturb(
        x_BCHW, g_BCHW, scale_B, normalise=networks.normalise, dtype=networks.dtype, kernel=networks.kernel
    )
    return x_BCHW, z_BCHW.permute(0, 2, 3, 1)

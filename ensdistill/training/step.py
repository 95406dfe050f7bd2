"""One training step: a function of (state, batch), for every method.

    x  = augment(images)                       kernels/images/augment.py; floats in [0, 1] are augmented already
    x' = show(x)                               evaluation mode, 0 to 6 F
    loss = (1 − α) · CE(student(x'), labels) + α · KD(student(x'), teachers(x')) + λ · loss_wd
    Nesterov SGD, momentum 0.9, or AdamW       training/optimizer.py

loss_wd = ½ Σ‖θ‖² + ½ Σ(‖1 − r‖² + ‖1 − s‖²) / E, and the gradient of r and s is multiplied by E. Storing ρ = r − 1
makes both a parameter group of the ordinary optimizer: learning rate E · lr, weight decay λ / E. Nothing here
synchronises with the device: measures leave as tensors; draws and learning rate are functions of the step, which the
host counts, or the device, where one captured graph serves every step.

In F, one forward of one network over the batch (an input-only backward is 1 F), ods and confods cost 2 F, tdiv 3 F,
tdiv-sdiv 3 F for the teachers and 3 F for the student. Members a and b are run forward, only a backward, and the seeds
of the backward are written down (kernels/loss/seeds.py), so that no loss is differentiated.
Sources: Nam et al. 2022, algorithm 1, as the official code runs it (tdiv, sdiv); Nam et al. 2021 (gaussian, ods,
confods).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensdistill.config.methods import Method
from ensdistill.engine.networks import Networks
from ensdistill.kernels.images.augment import augment, normalise_ref
from ensdistill.kernels.images.noise import add_noise
from ensdistill.kernels.images.ods_weights import ods_weights
from ensdistill.kernels.images.perturb import perturb
from ensdistill.kernels.launch import use_kernel
from ensdistill.kernels.loss.distil import distil
from ensdistill.kernels.loss.squares import HalfSquares, half_squares_ref
from ensdistill.kernels.philox import (
    counter_of,
    draw_pair,
    draw_pair_on_device,
    draw_teacher,
    draw_teacher_on_device,
)
from ensdistill.models.students import Student
from ensdistill.runtime.ranks import ALONE, Ranks
from ensdistill.training.averaging import Ema, Swa
from ensdistill.training.module_draws import seed_modules
from ensdistill.training.optimizer import remembered


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Configuration of a step; constant over a run."""

    method: Method
    """Student, and the data that it is shown."""
    seed: int
    """Key of every random draw."""
    tau: float = 4.0
    """Temperature τ of the distillation."""
    alpha: float = 1.0
    """Weight α of the distillation; 1 − α is that of the labels. Ignored by `ce`."""
    weight_decay: float = 5e-4
    """Weight λ of loss_wd in the loss; 0 where the decay is no part of a loss (AdamW)."""
    pad: int = 4
    """Zero pixels a side before the random crop."""
    flip: bool = True
    """Flip images with probability ½."""


@dataclass(kw_only=True)
class State:
    """Everything that a step changes."""

    networks: Networks
    """Student in training and its frozen teachers, by whatever computes them."""
    optimizer: torch.optim.Optimizer
    """Optimizer from `make_optimizer`."""
    step: int = 0
    """Number of updates done so far."""
    ranks: Ranks = ALONE
    """Processes that share a batch; each has its rows."""
    ema: Ema | None = None
    """Moving average of the student, if there is one."""
    swa: Swa | None = None
    """Mean of the student over the last epochs, if there is one; the loop updates it."""

    def __post_init__(self) -> None:
        # every group's rate is a view of one tensor, so that one launch sets them all
        groups = self.optimizer.param_groups
        self._lr_G = torch.stack([group["lr"] for group in groups])
        for group, lr in zip(groups, self._lr_G.unbind(), strict=True):
            group["lr"] = lr
        device = groups[0]["params"][0].device
        scales = [group["rate_scale"] for group in groups]
        self._scale_G = torch.tensor(scales, dtype=torch.float64).to(device)
        self._squares: HalfSquares | None = None

    def set_rate(self, lr: float | Tensor) -> None:
        """Give every group of parameters the schedule's rate times its own `rate_scale`."""
        if isinstance(lr, Tensor):
            torch.mul(lr, self._scale_G, out=self._lr_G)
        else:
            for group in self.optimizer.param_groups:
                group["lr"].fill_(lr * group["rate_scale"])

    @torch.no_grad()
    def weight_decay_loss(self) -> Tensor:
        """½ Σ‖θ‖² of every parameter, that of the factors over E: a scalar, at least fp32."""
        student = self.student
        shared, factors = student.shared(), student.factors()
        tensors, scales = [*shared, *factors], [1.0] * len(shared) + [1 / student.E] * len(factors)
        if not use_kernel(self.networks.kernel, *tensors):
            return half_squares_ref(tensors, scales)
        if self._squares is None or self._squares.has_moved():
            self._squares = HalfSquares(tensors, scales)
        return self._squares()

    def tensors(self) -> list[Tensor]:
        """List everything that a step changes."""
        student = self.student
        averages = [] if self.ema is None else self.ema.tensors()
        return [*student.parameters(), *student.buffers(), *remembered(self.optimizer), *averages]

    @property
    def student(self) -> Student:
        """Network that is trained."""
        return self.networks.student


def train_step(
    state: State,
    config: StepConfig,
    images_BHWC: Tensor,
    labels_B: Tensor,
    lr: float | Tensor,
    *,
    counter: Tensor | None = None,
) -> dict[str, Tensor]:
    """Augment, perturb, distil, update: `state` is advanced by one step.

    Args:
        images_BHWC: uint8, this process's rows of the batch, which are augmented; or float32 in [0, 1], as they are.
        labels_B: int64 in [0, K).
        lr: the schedule's learning rate of this step; or a tensor of no dimension on the device.
        counter: (seed, step, global row of the first image) on the device (`philox.counter_of`), to read what is drawn
            from; None makes it of `config` and `state`.

    Returns:
        The step's measures before its update, as scalar tensors on the device: see `update`.
    """
    networks = state.networks
    first_row = state.ranks.rank * len(images_BHWC)
    if counter is None:
        counter = counter_of(config.seed, state.step, first_row, images_BHWC.device)
    if networks.asks_modules(config.method.shown):  # what kernels express draws nothing
        seed_modules(config.seed, state.step, first_row, images_BHWC.device)
    if images_BHWC.dtype == torch.uint8:
        x_BHWC, z_BHWC = augment(images_BHWC, counter, pad=config.pad, flip=config.flip, **_how(networks))
    else:
        x_BHWC, normalise = images_BHWC, networks.normalise
        z_BHWC = None if normalise is None else normalise_ref(x_BHWC, *normalise, networks.dtype)
    x_BCHW = x_BHWC.permute(0, 3, 1, 2)  # channels_last
    draw: dict[str, Any] = {"seed": config.seed, "step": state.step, "counter": counter}
    x_BCHW, z_BHWC = show(config.method.shown, x_BCHW, networks, **draw, tau=config.tau, z_BHWC=z_BHWC)
    return update(state, config, x_BCHW, labels_B, lr, z_BHWC=z_BHWC)


def update(
    state: State,
    config: StepConfig,
    x_BCHW: Tensor,
    labels_B: Tensor,
    lr: float | Tensor,
    *,
    z_BHWC: Tensor | None = None,
) -> dict[str, Tensor]:
    """The update on images that are shown as they are, (B, C, H, W) in [0, 1]; `z_BHWC`: see `Networks`.

    Returns:
        Scalar tensors: `loss`, `loss_ce`, `loss_kd` (not for `ce`), `loss_wd`, and `acc1`, the share of the M·B rows
        that are classified right; of this process's rows.
    """
    networks = state.networks
    needs_teachers = config.method.needs_teachers
    t_EBK = None
    if needs_teachers:
        with nullcontext() if networks.side is None else networks.side.fork():
            t_EBK = networks.teacher_logits(x_BCHW, z_BHWC)
    s_MBK = networks.student_logits(x_BCHW, z_BHWC)
    if networks.side is not None:
        networks.side.join()
    alpha = config.alpha if needs_teachers else 0.0
    out = distil(s_MBK, t_EBK, labels_B, config.tau, alpha, kernel=networks.kernel)
    measures = {"loss_ce": out.loss_ce, "acc1": out.acc1, "loss_wd": state.weight_decay_loss()}
    if out.loss_kd is not None:
        measures["loss_kd"] = out.loss_kd
    measures["loss"] = torch.add(out.loss.detach(), measures["loss_wd"], alpha=config.weight_decay)
    # Weight decay is the optimizer's, so the backward is of the loss without it.
    if out.gradient_MBK is None:
        out.loss.backward()
    else:
        s_MBK.backward(out.gradient_MBK)
    apply_gradients(state, lr)
    return {name: value.detach() for name, value in measures.items()}


def apply_gradients(state: State, lr: float | Tensor) -> None:
    """The update of the parameters by their gradients' mean over the ranks; the gradients are gone after it."""
    groups = state.optimizer.param_groups
    state.ranks.average_([p.grad for group in groups for p in group["params"] if p.grad is not None])
    state.set_rate(lr)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.student)
    state.step += 1


def measure_names(method: Method) -> tuple[str, ...]:
    """Names of what `train_step` measures for `method`."""
    return ("loss", "loss_ce", *(("loss_kd",) if method.needs_teachers else ()), "loss_wd", "acc1")


def show(
    shown: str,
    x_BCHW: Tensor,
    networks: Networks,
    *,
    seed: int,
    step: int,
    counter: Tensor,
    tau: float,
    z_BHWC: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The images that the student trains on, x' (B, C, H, W) in [0, 1]; `shown` is one of `methods.SHOWN`.

    Args:
        seed, step: the host's, which draws members by them for networks that have to be told by the host.
        counter: (seed, step, global row of the first image) on the device of the images (`philox.counter_of`): all else
            is drawn from it.
        z_BHWC: the images normalised, if they are already.

    Returns:
        x', and x' normalised where that came with it.
    """
    if shown == "clean":
        return x_BCHW, z_BHWC
    if shown == "gaussian":
        return _shown(*add_noise(x_BCHW, counter, **_how(networks)))
    assert networks.teachers is not None, f"{shown} needs teachers"
    E, K = networks.teachers.E, networks.teachers.num_classes
    on_device, kernel = networks.selects_on_device(shown), networks.kernel
    if shown in ("tdiv", "tdiv-sdiv"):
        beside = networks.beside(shown)
        pair = draw_pair_on_device(counter, E, beside=beside, kernel=kernel) if on_device else draw_pair(seed, step, E)
        g_BCHW = networks.divergence_gradient(x_BCHW, pair, with_student=shown == "tdiv-sdiv", z_BHWC=z_BHWC)
        return _shown(*perturb(x_BCHW, g_BCHW, **_how(networks)))
    j = draw_teacher_on_device(counter, E, kernel=kernel) if on_device else draw_teacher(seed, step, E)
    w_BK = ods_weights(counter, len(x_BCHW), K, kernel=kernel)
    g_BCHW, confidence_B = networks.ods_gradient(x_BCHW, j, w_BK, tau, z_BHWC=z_BHWC)
    return _shown(*perturb(x_BCHW, g_BCHW, confidence_B if shown == "confods" else None, **_how(networks)))


def _how(networks: Networks) -> dict[str, Any]:
    return {"normalise": networks.normalise, "dtype": networks.dtype, "kernel": networks.kernel}


def _shown(x_BCHW: Tensor, z_BCHW: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return x_BCHW, None if z_BCHW is None else z_BCHW.permute(0, 2, 3, 1)

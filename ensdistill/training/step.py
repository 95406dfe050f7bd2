"""One training step: a function of (state, batch), for every method.

    x  = augment(images)                       kernels/images/augment.py
    x' = show(x)                               perturbation.py, evaluation mode, 0 to 6 F
    loss = (1 − α) · CE(student(x'), labels) + α · KD(student(x'), teachers(x')) + λ · loss_wd
    Nesterov SGD, momentum 0.9

loss_wd = ½ Σ‖θ‖² + ½ Σ(‖1 − r‖² + ‖1 − s‖²) / E, and the gradient of r and s is multiplied by E. Storing ρ = r − 1
makes both a parameter group of the ordinary optimizer: learning rate E · lr, weight decay λ / E. Nothing here
synchronises with the device: measures leave as tensors; draws and learning rate are functions of the step, which the
host counts, or the device, where one captured graph serves every step.
Source: Nam et al. 2022, algorithm 1, as the official code runs it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensdistill.config.methods import Method
from ensdistill.engine.networks import Networks
from ensdistill.kernels.choice import use_kernel
from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.loss.distil import distil
from ensdistill.kernels.loss.squares import HalfSquares, half_squares_ref
from ensdistill.kernels.philox import counter_of
from ensdistill.models.students import Student
from ensdistill.runtime.ranks import ALONE, Ranks
from ensdistill.training.perturbation import show

MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step computes; constant over a run."""

    method: Method
    """Student and data shown."""
    seed: int
    """Key of every random draw."""
    tau: float = 4.0
    """Temperature τ of the distillation."""
    alpha: float = 1.0
    """Weight α of the distillation; 1 − α is that of the labels. Ignored by `ce`."""
    weight_decay: float = 5e-4
    """λ."""
    pad: int = 4
    """Zero pixels a side before the random crop."""
    flip: bool = True
    """Whether images are flipped with probability ½."""


@dataclass(kw_only=True)
class State:
    """What a step changes."""

    networks: Networks
    """The student in training and its frozen teachers, and what computes them."""
    optimizer: torch.optim.SGD
    """From `make_optimizer`."""
    step: int = 0
    """Updates done so far."""
    ranks: Ranks = ALONE
    """The processes that share a batch; each has its rows."""

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

    @property
    def student(self) -> Student:
        """The network in training."""
        return self.networks.student


def make_optimizer(student: Student, weight_decay: float, factor_rate: float = 1.0) -> torch.optim.SGD:
    """Nesterov SGD; the factors' group has learning rate `factor_rate` · E · lr and weight decay λ / E.

    `rate_scale` of a group multiplies the schedule's rate (see `train_step`), which every group holds as a tensor of
    its own. Momentum is there from the start, as zeros, which makes the same first update: a captured graph would
    repeat the branch that a first step takes.
    """
    groups: list[dict[str, Any]] = [{"params": student.shared(), "rate_scale": 1.0, "weight_decay": weight_decay}]
    if factors := student.factors():
        groups.append(
            {"params": factors, "rate_scale": factor_rate * student.E, "weight_decay": weight_decay / student.E}
        )
    device = groups[0]["params"][0].device
    for group in groups:
        # the fused update reads a float32 on the GPU; elsewhere it takes the number, for which float64 rounds nothing
        cuda = device.type == "cuda"
        group["lr"] = torch.zeros((), dtype=torch.float32 if cuda else torch.float64, device=device if cuda else "cpu")
    fused = True if device.type in ("cpu", "cuda") else None
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=fused)
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.SGD, stored: dict[str, Any]) -> None:
    """Take the momentum from a `state_dict`, into the tensors that hold it: a graph and a fused update know no others.

    Raises:
        ValueError, KeyError: `stored` is of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    given = [stored["state"][i]["momentum_buffer"] for i in range(len(stored["state"]))]
    if [x.shape for x in momenta] != [x.shape for x in given]:
        raise ValueError(f"the optimizer has {len(momenta)} parameters, {len(given)} or other ones are stored")
    for momentum, value in zip(momenta, given, strict=True):
        momentum.copy_(value)


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
        images_BHWC: uint8, this process's rows of the batch.
        labels_B: int64 in [0, K).
        lr: the schedule's learning rate of this step; or a tensor of no dimension on the device.
        counter: (seed, step, global row of the first image) on the device (`philox.counter_of`), to read what is drawn
            from; None makes it of `config` and `state`.

    Returns:
        The step's measures before its update, as scalar tensors on the device: see `update`.
    """
    networks = state.networks
    if counter is None:
        first_row = state.ranks.rank * len(images_BHWC)
        counter = counter_of(config.seed, state.step, first_row, images_BHWC.device)
    crop: dict[str, Any] = {"pad": config.pad, "flip": config.flip, "kernel": networks.kernel}
    z_BHWC = None
    if networks.normalise is None:
        x_BHWC = augment(images_BHWC, counter=counter, **crop)
    else:
        given: dict[str, Any] = {"normalise": networks.normalise, "dtype": networks.dtype}
        x_BHWC, z_BHWC = augment(images_BHWC, counter=counter, **crop, **given)
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
    state.step += 1


def measure_names(method: Method) -> tuple[str, ...]:
    """What `train_step` measures for `method`."""
    return ("loss", "loss_ce", *(("loss_kd",) if method.needs_teachers else ()), "loss_wd", "acc1")

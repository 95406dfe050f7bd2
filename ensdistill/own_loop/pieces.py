"""The method's pieces for steps that are written by hand: the perturbation of a batch, and the distillation loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ensdistill.engine.networks import Networks
from ensdistill.kernels.images.perturb import perturb
from ensdistill.kernels.loss.distil import distil
from ensdistill.models import Classifier
from ensdistill.models.batch_ensemble import is_batch_ensemble, num_members
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import BatchEnsembleStudent, PlainStudent, Student
from ensdistill.runtime.errors import UserError


def classifier_of(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Classifier:
    """Put the normalisation by `mean` and `std` in front of `network`, unless it brings its own (`Classifier`)."""
    return network if isinstance(network, Classifier) else Classifier(network, mean, std)


def channel_values(name: str, values: Sequence[float] | None, channels: int, default: float) -> list[float]:
    """A value a channel: those given, or the default of a network that takes images as they are.

    Raises:
        UserError: they are not as many as images have channels.
    """
    found = [default] * channels if values is None else [float(value) for value in values]
    if len(found) != channels:
        raise UserError(f"{name}: got {len(found)} values, but images have {channels} channels; give one a channel")
    return found


def perturbed(
    images: Tensor,
    teachers: Sequence[nn.Module],
    student: nn.Module | None = None,
    *,
    pair: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Step from images to where two teachers disagree and the student's two members do not yet (TDiv − SDiv)::

        x' = clip(x + (√D / 255) · g / ‖g‖₂, 0, 1),    g = ∂/∂x [CE(teacher a under b) − CE(member a under b)]

    Networks are asked in evaluation mode, in the type of their weights, and left as they were. Use x' for all members
    of one step, and draw another pair for the next one.

    Args:
        images: (B, C, H, W), float32 in [0, 1], on the networks' device.
        teachers: E networks, each images (B, C, H, W) → logits (B, K).
        student: BatchEnsemble of E members, as `to_batch_ensemble` gives it; None: the teachers' term alone (TDiv).
        pair: two different numbers (a, b) of 0 … E − 1.
        mean, std: a value a channel, where networks take images that are normalised by them.

    Returns:
        x' (B, C, H, W), float32 in [0, 1]; an image whose gradient is zero as it was.

    Raises:
        UserError: images, pair or student do not fit.
    """
    _require_images(images)
    E, C = len(teachers), images.shape[1]
    a, b = pair
    if a == b or not (0 <= a < E and 0 <= b < E):
        raise UserError(
            f"pair: got {pair}, expected two different numbers of 0 … {E - 1}, one for each of two teachers"
        )
    means, stds = channel_values("mean", mean, C, 0.0), channel_values("std", std, C, 1.0)
    if student is not None and (not is_batch_ensemble(student) or num_members(student) != E):
        found = f"{num_members(student)} members" if is_batch_ensemble(student) else "a plain network"
        raise UserError(f"student: got {found}, expected {E} members, one a teacher, as to_batch_ensemble gives them")
    with _left_alone([*teachers, *([] if student is None else [student])]):
        frozen = Teachers([classifier_of(teacher, means, stds).to(images.device) for teacher in teachers], 0)
        members: Student = PlainStudent(frozen.classifiers[0])  # type: ignore[arg-type]  # TDiv asks no student
        if student is not None:
            classifier = classifier_of(student, means, stds).to(images.device)
            members = BatchEnsembleStudent(classifier, E, average=True, converted=True)
        networks = Networks(frozen, members, "fp32")
        gradient = networks.divergence_gradient(images, pair, with_student=student is not None)
    return perturb(images, gradient, kernel=False)[0]


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, tau: float = 4.0, alpha: float = 1.0
) -> Tensor:
    """Compute (1 − α) · CE + α · τ² · mean of −Σ softmax(t_m / τ) log softmax(s_m / τ), differentiable in the student.

    Args:
        student_logits: (M, B, K), M members; of a plain network (1, B, K).
        teacher_logits: (E, B, K), E = M: one teacher a member; or M = 1: the mean over all teachers. Held constant.
        labels: int64 (B,) in [0, K).
        tau: temperature τ of the distillation.
        alpha: weight α of the distillation; 1 − α is that of the labels.

    Returns:
        A scalar; weight decay is the optimizer's.

    Raises:
        ValueError: shapes, types, τ or α do not fit.
    """
    return distil(student_logits, teacher_logits.detach(), labels, tau, alpha, kernel=False).loss


def _require_images(images: Tensor) -> None:
    if images.ndim != 4 or images.dtype != torch.float32:
        raise UserError(f"images: got {images.dtype} {tuple(images.shape)}, expected float32 (B, C, H, W) in [0, 1]")
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise UserError(f"images: got values from {low:.4g} to {high:.4g}, {OUTSIDE}")


OUTSIDE = (
    "expected [0, 1]: perturbing and clipping happen there; leave Normalize out of the loader and give its mean and std"
)
"""End of the error that says that images have other values than the method takes."""


@contextmanager
def _left_alone(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Give every module its mode back, and every parameter its wish for gradients."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    wishes = [(parameter, parameter.requires_grad) for network in networks for parameter in network.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wish in wishes:
            parameter.requires_grad_(wish)

"""What a `Distiller` looks at before it computes: batches, logits, learning rates, weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensdistill.engine.networks import Networks
from ensdistill.own_loop.pieces import OUTSIDE
from ensdistill.runtime.errors import UserError
from ensdistill.training.optimizer import Schedule

_WARMUP_SHARE = 0.025  # the paper's: 5 epochs of 200


def require_batch(images: Tensor, labels: Tensor, first_BHWC: Tensor | None) -> None:
    """Check the type and shape of a batch; `first_BHWC`: images of the first batch, which all are like.

    Raises:
        UserError: they are others.
    """
    if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32) or not images.numel():
        raise UserError(
            f"images: got {images.dtype} {tuple(images.shape)}, expected (B, C, H, W): float32 in [0, 1], "
            "augmented and not normalised, or uint8, which is augmented here"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise UserError(f"labels: got {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(images)},)")
    if first_BHWC is None:
        return
    shape = tuple(first_BHWC.permute(0, 3, 1, 2).shape)
    if (tuple(images.shape), images.dtype) != (shape, first_BHWC.dtype):
        raise UserError(
            f"images: got {images.dtype} {tuple(images.shape)} after {first_BHWC.dtype} {shape}; all batches are of "
            "one shape and type: give the loader drop_last=True"
        )


def is_outside(images_BHWC: Tensor, labels_B: Tensor, num_classes: int) -> Tensor:
    """Say, on the device, whether images have values outside [0, 1], and whether labels are no classes: (2,)."""
    is_unit = torch.ones((), dtype=torch.bool, device=images_BHWC.device)
    if images_BHWC.dtype != torch.uint8:
        is_unit = ((images_BHWC >= 0) & (images_BHWC <= 1)).all()  # and what is no number is not
    return ~torch.stack([is_unit, ((labels_B >= 0) & (labels_B < num_classes)).all()])


def refuse_outside(found: Tensor, num_classes: int) -> None:
    """Raise a UserError where `is_outside` found something."""
    images, labels = found.tolist()
    if images:
        raise UserError(f"images: a batch has values outside [0, 1], {OUTSIDE}")
    if labels:
        raise UserError(f"labels: a batch has labels outside 0 … {num_classes - 1}, the classes of the logits")


@torch.no_grad()
def require_logits(images_BHWC: Tensor, networks: Networks) -> int:
    """Run every network on the batch once, in evaluation mode, and compare their logits: (B, K), of one K."""
    x_BCHW = images_BHWC.permute(0, 3, 1, 2)
    x_BCHW = x_BCHW / 255 if x_BCHW.dtype == torch.uint8 else x_BCHW
    found = {"student": networks.student.eval()(x_BCHW)[0]}
    for t, teacher in enumerate([] if networks.teachers is None else networks.teachers.classifiers):
        found[f"teacher {t}"] = teacher(x_BCHW)
    shape = found["student"].shape
    for name, logits in found.items():
        if logits.ndim != 2 or logits.shape != shape or len(logits) != len(x_BCHW):
            raise UserError(
                f"{name}: gave logits {tuple(logits.shape)} for a batch of {len(x_BCHW)}, the student "
                f"{tuple(shape)}; expected (B, K) of all networks, of one K"
            )
    return shape[1]


def content_of(network: nn.Module) -> int:
    """A number that other weights hardly share: the sum of their bytes, exact on every device."""
    tensors = [tensor.detach().contiguous() for tensor in network.state_dict().values()]
    return sum(int(tensor.flatten().view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors)


def rates_of(steps: int, lr: float | Callable[[int], float], warmup_steps: int | None) -> list[float]:
    """The learning rate of every step."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps: got {steps!r}, expected the whole number of updates in all, at least 1")
    if callable(lr):
        if warmup_steps is not None:
            raise UserError("warmup_steps: got one beside lr as a function, which is the whole schedule; leave it out")
        return [float(lr(step)) for step in range(steps)]
    warmup = round(_WARMUP_SHARE * steps) if warmup_steps is None else warmup_steps
    if not 0 <= warmup < steps:
        raise UserError(f"warmup_steps: got {warmup}, expected 0 to below steps = {steps}")
    if not lr > 0:
        raise UserError(f"lr: got {lr}, expected a positive number, or a function of the step")
    schedule = Schedule(peak=lr, warmup_steps=warmup, total_steps=steps)
    return [schedule(step) for step in range(steps)]

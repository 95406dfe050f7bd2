"""One step of E teachers that train together, each on its own images: what `step.train_step` is for one network.

    x_m = augment(images_m; seed + m)          loss = Σ_m CE(network_m(x_m), labels_m)          Nesterov SGD

Every draw of member m has the seed that it has alone, so each goes the way that it goes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ensdistill.engine.member_training import MemberTraining
from ensdistill.engine.networks import Networks, dtype_of
from ensdistill.engine.operations import Operations
from ensdistill.engine.structure import NotExpressible
from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.philox import counter_of
from ensdistill.models import Classifier
from ensdistill.runtime.precision import Precision
from ensdistill.training.step import State, StepConfig, apply_gradients
from ensdistill.training.teachers_together import TeachersInTraining, member_losses


class TeacherNetworks(Networks):
    """The teachers in training, by the member-batched `operations`, or by their modules where those are None.

    `student` holds them all; there are no other teachers.
    """

    def __init__(
        self,
        classifiers: Sequence[Classifier],
        precision: Precision,
        operations: Operations | None,
        device: torch.device,
    ) -> None:
        together = TeachersInTraining(classifiers, for_kernels=operations is not None).to(device)
        super().__init__(None, together, precision)
        self.together, self.operations = together, operations
        self.training: MemberTraining | None = None
        if operations is None:
            return
        self.kernel, self.dtype = operations.kernel, dtype_of(precision)
        try:
            self.training = together.passes(dtype=self.dtype, operations=operations)
        except NotExpressible as error:
            self.notes.append(f"the teachers in training: {error}")

    def can_be_captured(self, shown: str) -> bool:
        return self.training is not None

    def student_logits(self, x_EBCHW: Tensor, z_BHWC: Tensor | None = None) -> Tensor:
        """(E, B, K) of each member's own images, in training mode."""
        self.together.train()
        if self.training is not None:
            return self.training(self.together.normalised(x_EBCHW))
        with self._autocast(x_EBCHW):
            return self.together(x_EBCHW)


def teachers_step(
    state: State,
    config: StepConfig,
    images_EBHWC: Tensor,
    labels_EB: Tensor,
    lr: float | Tensor,
    *,
    counter: Tensor | None = None,
) -> dict[str, Tensor]:
    """Augment, forward, update: `state`, whose networks are `TeacherNetworks`, is advanced by one step.

    Args:
        images_EBHWC: uint8.
        labels_EB: int64 in [0, K).
        lr, counter: see `step.train_step`; the seed is member 0's, and member m's is m more.

    Returns:
        The measures of method `ce` before the update, (E,) each.
    """
    networks: Any = state.networks
    if counter is None:
        first_row = state.ranks.rank * images_EBHWC.shape[1]
        counter = counter_of(config.seed, state.step, first_row, images_EBHWC.device)
    crop: dict[str, Any] = {"pad": config.pad, "flip": config.flip, "kernel": networks.kernel}
    member_3 = torch.zeros_like(counter)
    shown = []
    for images_BHWC in images_EBHWC.unbind():
        shown.append(augment(images_BHWC, counter=counter + member_3, **crop))
        member_3[:1] += 1
    x_EBCHW = torch.stack(shown).permute(0, 1, 4, 2, 3)
    losses = member_losses(networks.student_logits(x_EBCHW), labels_EB, networks.together.parameters())
    losses.loss.backward()
    apply_gradients(state, lr)
    loss = losses.loss_ce + config.weight_decay * losses.loss_wd
    return {"loss": loss, "loss_ce": losses.loss_ce, "loss_wd": losses.loss_wd, "acc1": losses.acc1}

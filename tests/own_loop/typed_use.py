"""A user's file: `make lint` checks that its types are those that the package says, and that mistakes are seen."""

from typing import assert_type

from torch import Tensor, nn

import ensdistill


def use(teachers: list[nn.Module], student: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    distiller = ensdistill.Distiller(teachers, student, steps=10, lr=lambda step: 0.1 / (step + 1))
    assert_type(distiller.step(images, labels), dict[str, Tensor])
    assert_type(ensdistill.perturbed(images, teachers, pair=(0, 1)), Tensor)
    assert_type(ensdistill.average_members(ensdistill.to_batch_ensemble(student, 2)), nn.Module)
    ensdistill.Distiller(teachers, student)  # type: ignore[call-arg]  # without steps
    distiller.step(images, "labels")  # type: ignore[arg-type]
    return distiller.average()

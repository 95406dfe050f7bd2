"""What tests of a `Stepper` share: its batches, what it changes, what it measured."""

from __future__ import annotations

import torch
from networks import small_batch

from ensdistill.data.inputs import HostInputs
from ensdistill.kernels.philox import epoch_order

B, EPOCH = 5, 4
CPU = torch.device("cpu")


class StaticInputs(HostInputs):
    """Batches that lie where the first lay, as a graph wants them; in the order that the step picks."""

    def __init__(self):
        images, labels = small_batch(B * EPOCH)
        order = torch.from_numpy(epoch_order(len(images), 5, 0)).view(EPOCH, B)
        self.images, self.labels, self.order = images, labels, order

    def fill(self):
        pass

    def batch(self, step):
        order = self.order.index_select(0, (step % EPOCH).view(1))[0]
        return self.images.index_select(0, order), self.labels.index_select(0, order)


def everything(state):
    return state.tensors()


def measured(stepper, steps, marks_every):
    """The measures of so many steps."""
    rows = []
    for step in range(1, steps + 1):
        stepper()
        if step % marks_every == 0 or step == steps:
            rows += [row for (row,) in stepper.mark().read().rows]
    return rows

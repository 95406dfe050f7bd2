"""Averages over time in float64, by hand; statistics measured anew against those of the batches themselves."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from networks import move_, small_batch, small_classifier
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.philox import counter_of
from ensdistill.models import Classifier
from ensdistill.models.students import PlainStudent, build_student
from ensdistill.training.averaging import Ema, Swa, measure_statistics
from ensdistill.training.step import StepConfig

E = 3


def student_of(method="latentbe"):
    return build_student(Method(student=method), small_classifier, E=E, seed=0).double()


def moments_of(student, steps):
    """Move `student` from step to step, and give its tensors by name after each."""
    for step in range(steps):
        move_(student, 50 + step)
        for name, buffer in student.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.add_(step)
        yield {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


@pytest.mark.parametrize(("method", "decay"), [("latentbe", 0.6), ("hydra", 0.6), ("kd", 0.25)])
def test_ema_by_hand(method, decay):
    student = student_of(method)
    ema = Ema(student, decay)
    right = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for n, now in enumerate(moments_of(student, 15)):
        ema.update(student)
        kept = min(decay, (1 + n) / (10 + n))
        for name, value in now.items():
            is_averaged = value.is_floating_point() and "pixel" not in name
            right[name] = kept * right[name] + (1 - kept) * value if is_averaged else value
        for name, value in ema.student.state_dict().items():
            torch.testing.assert_close(value, right[name], rtol=1e-14, atol=1e-15)
    assert ema.updates.item() == 15 and not any(value.requires_grad for value in ema.student.parameters())


def test_ema_forgets_what_it_was_drawn_with():
    """The warm-up: of the first weights 1e-4 is left after 20 steps of a decay that alone would leave 98 %."""
    student = PlainStudent(Classifier(nn.Linear(1, 2, bias=False).double(), [0.5], [0.25]))
    with torch.no_grad():
        student.classifier.network.weight.fill_(1.0)
        ema = Ema(student, 0.999)
        student.classifier.network.weight.zero_()
    for _ in range(20):
        ema.update(student)
    assert 0 < ema.student.classifier.network.weight.max().item() < 1e-4


def test_swa_by_hand():
    student = student_of()
    swa = Swa(student, epochs=5)
    moments = []
    for now in moments_of(student, 5):
        moments.append(now)
        swa.update(student)
        for name, value in swa.student.named_parameters():
            mean = torch.stack([moment[name] for moment in moments]).mean(0)
            torch.testing.assert_close(value, mean, rtol=1e-14, atol=1e-15)
    assert swa.taken == 5 and not any(value.requires_grad for value in swa.student.parameters())


class MemoryFeed:
    """An epoch of batches that lie in memory."""

    def __init__(self, rows=6, batches=4):
        images, labels = small_batch(rows * batches)
        self.batches = list(zip(images.split(rows), labels.split(rows), strict=True))

    @contextmanager
    def epoch(self, epoch, first_step=0):
        assert (epoch, first_step) == (0, 0)
        yield iter(self.batches)


def test_statistics_are_the_means_over_augmented_batches_of_all_members():
    student, feed = student_of().float(), MemoryFeed()
    config = StepConfig(method=Method(student="latentbe"), seed=11, pad=1)
    weights = {name: value.detach().clone() for name, value in student.named_parameters()}
    first = next(module for module in student.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double()))
    measure_statistics(student.eval(), feed, config)
    handle.remove()
    assert len(seen) == 4 and seen[0].shape[0] == E * 6 and not student.training
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.var((0, 2, 3), correction=0) for x in seen]).mean(0)
    torch.testing.assert_close(first.running_mean.double(), means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.running_var.double(), variances, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, weights[name]) for name, value in student.named_parameters())

    x_BHWC, _ = augment(feed.batches[2][0], counter_of(11, 2, 0, torch.device("cpu")), pad=1, flip=True)
    again = []
    handle = first.register_forward_pre_hook(lambda module, args: again.append(args[0].detach().double()))
    student(x_BHWC.permute(0, 3, 1, 2))
    handle.remove()
    torch.testing.assert_close(again[0], seen[2])

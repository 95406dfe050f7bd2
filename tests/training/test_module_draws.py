"""What modules draw by themselves is a function of (seed, step, row): dropout, and whatever asks NumPy or Python."""

from __future__ import annotations

import random
from contextlib import nullcontext

import numpy as np
import torch
from networks import K, small_batch
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.engine.networks import Networks
from ensdistill.models import Classifier
from ensdistill.models.students import PlainStudent
from ensdistill.run.predict import predict
from ensdistill.runtime.ranks import ALONE, Ranks
from ensdistill.training.module_draws import seed_modules
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, train_step
from ensdistill.training.together import TeacherNetworks, TeachersInTraining, teachers_step

CPU = torch.device("cpu")


class Scaled(nn.Module):
    """Scales its input by what three generators give, in evaluation mode too."""

    def forward(self, x):
        return x * (torch.rand(()) + np.random.rand() + random.random())


def classifier(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.RReLU(), nn.FractionalMaxPool2d(2, output_size=3), nn.Dropout(0.3), Scaled(),
        nn.Flatten(), nn.AlphaDropout(0.1), nn.Linear(54, K),
    )  # fmt: skip
    return Classifier(network, [0.4] * 3, [0.3] * 3)


def trained(steps, *, network=0, seed=3, between=lambda: None):
    student = PlainStudent(classifier(network))
    state = State(networks=Networks(None, student, "fp32"), optimizer=make_optimizer(student, 5e-4))
    for _ in range(steps):
        between()
        train_step(state, StepConfig(method=Method.parse("ce"), seed=seed, pad=1), *small_batch(8), 0.05)
    return [parameter.detach() for parameter in student.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def disturb():
    return torch.rand(7), np.random.rand(3), random.random()


def test_whatever_else_was_drawn_one_seed_has_one_result_and_another_another():
    one = trained(3)
    assert same(one, trained(3, between=disturb))
    assert not same(one, trained(3, seed=4))


def draws(seed, step, first_row):
    seed_modules(seed, step, first_row, CPU)
    return torch.rand(2).tolist(), np.random.rand(), random.random()


def test_seeds_steps_and_rows_have_draws_of_their_own():
    assert draws(3, 1, 0) == draws(3, 1, 0)
    counters = [(3, 1, 0), (4, 1, 0), (3, 2, 0), (3, 1, 8), (2**64 - 1, 1, 0)]
    for kind in zip(*(draws(*counter) for counter in counters), strict=True):
        assert len(set(map(str, kind))) == len(counters)


def test_each_process_draws_for_its_own_rows(monkeypatch):
    seen = []
    monkeypatch.setattr("ensdistill.training.step.seed_modules", lambda *counter: seen.append(counter))
    student = PlainStudent(classifier(0))
    for ranks in (ALONE, Ranks(rank=1)):
        optimizer = make_optimizer(student, 5e-4)
        state = State(networks=Networks(None, student, "fp32"), optimizer=optimizer, step=7, ranks=ranks)
        train_step(state, StepConfig(method=Method.parse("ce"), seed=3, pad=1), *small_batch(8), 0.05)
    assert seen == [(3, 7, 0, CPU), (3, 7, 8, CPU)]


def test_teachers_together_draw_what_each_draws_alone():
    together = TeachersInTraining([classifier(0), classifier(1)])
    state = State(networks=TeacherNetworks(together, "fp32", None), optimizer=make_optimizer(together, 5e-4))
    images, labels = small_batch(8)
    for _ in range(3):
        both = torch.stack([images, images]), torch.stack([labels, labels])
        teachers_step(state, StepConfig(method=Method.parse("ce"), seed=3, pad=1), *both, 0.05)
    for member in range(2):
        alone = trained(3, network=member, seed=3 + member)
        for found, expected in zip(together.classifier(member).parameters(), alone, strict=True):
            torch.testing.assert_close(found, expected)


def test_a_network_that_draws_in_evaluation_mode_too_is_measured_alike():
    class OneBatch:
        num_steps = 1

        def epoch(self, epoch, first_step=0):
            return nullcontext(iter([small_batch(8)]))

    network, found = classifier(0).eval(), []
    for _ in range(2):
        disturb()
        found.append(predict(network, OneBatch(), device=CPU, precision="fp32")[0])
    assert torch.equal(*found)

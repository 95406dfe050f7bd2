"""Steps that ask modules, captured: the same as launched one by one, or not taken, which is said."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from networks import K, small_classifier
from recorded_graph import RecordedGraph
from stepping import CPU, StaticInputs, everything, measured
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.engine.networks import make_networks
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.runtime.ranks import Ranks
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig
from ensdistill.training.stepper import Stepper

E = 3


class Habit(nn.Module):
    """Does what `habit` says, beside dropping and scaling."""

    def __init__(self, habit):
        super().__init__()
        self.habit, self.calls, self.seen = habit, 0, []
        self.register_buffer("mean", torch.zeros(()))
        self.cache = None

    def forward(self, x):
        if self.cache is None:  # kept from the first call on, as relative positions are
            self.cache = torch.full((), 1.01)
        if not self.training:
            return x * self.cache
        match self.habit:
            case "counts":
                self.calls += 1
            case "remembers":
                self.seen.append(len(x))
            case "replaces":
                self.mean = 0.9 * self.mean + x.detach().mean()
            case "NumPy":
                x = x * np.random.rand()
            case "Python":
                x = x * random.random()
            case "asks":
                x = x * (1 + (x.mean().item() > 0))
            case "own generator":
                x = x * torch.rand((), generator=_OWN)
        return x * self.cache


_OWN = torch.Generator()


def classifier(seed, habit="none", width=6):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.GELU(), nn.Dropout(0.3), Habit(habit),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, K),
    )  # fmt: skip
    return Classifier(network, [0.4] * 3, [0.3] * 3)


def make_stepper(
    method,
    graph=None,
    *,
    habit="none",
    widths=(6, 6, 6),
    compiling="no",
    steps=40,
    state=None,
    backend="reference",
):
    parsed = Method.parse(method)
    teachers = Teachers([classifier(100 + t, width=width) for t, width in enumerate(widths)], K)
    of_ours = parsed.student == "hydra" or backend != "reference"
    make = small_classifier if of_ours else lambda seed: classifier(seed, habit)
    student = build_student(parsed, make, E=E, seed=0)
    networks = make_networks(backend, teachers if parsed.needs_teachers else None, student, "fp32", CPU)
    return Stepper(
        state or State(networks=networks, optimizer=make_optimizer(student, 5e-4)),
        StepConfig(method=parsed, seed=3, pad=1),
        inputs=StaticInputs(),
        rates=[0.02 * (1 + step % 7) / 7 for step in range(steps)],
        device=CPU,
        rows=50,
        graph=graph,
        compiling=compiling,
    )


def assert_same(one, other, *, exactly=True):
    for a, b in zip(everything(one.state), everything(other.state), strict=True):
        assert torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["latentbe+tdiv-sdiv", "hydra+tdiv-sdiv", "kd+tdiv", "be+ods", "kd+confods", "ce+gaussian", "hydra"]
)
def test_captured_modules_are_the_eager_ones_bit_for_bit(method):
    """Dropout, pairs of members and learning rates go on between replays, as they do without."""
    eager, captured = make_stepper(method), make_stepper(method, RecordedGraph())
    for stepper in (eager, captured):
        stepper.prepare(first_row=0)
    assert eager.note is None and not eager.is_captured
    assert captured.is_captured and captured.note.endswith("which is captured as one CUDA graph")
    assert measured(eager, 12, 12) == measured(captured, 12, 5)
    assert_same(eager, captured)


@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "be+ods"])
def test_teachers_by_modules_beside_a_student_by_member_batched_passes(method):
    eager, captured = (make_stepper(method, graph, backend="library") for graph in (None, RecordedGraph()))
    for stepper in (eager, captured):
        stepper.prepare(first_row=0)
        assert stepper.state.networks.training is not None and stepper.state.networks.frozen is None
    assert captured.is_captured, captured.note
    assert measured(eager, 6, 6) == measured(captured, 6, 4)
    assert_same(eager, captured)


def test_captured_modules_go_on_where_the_state_stands():
    unbroken, first = make_stepper("latentbe+tdiv-sdiv"), make_stepper("latentbe+tdiv-sdiv", RecordedGraph())
    for stepper in (unbroken, first):
        stepper.prepare(first_row=0)
    rows, before = measured(unbroken, 9, 9), measured(first, 4, 4)
    second = make_stepper("latentbe+tdiv-sdiv", RecordedGraph(), state=first.state)
    second.prepare(first_row=0)
    assert second.is_captured
    assert before + measured(second, 5, 5) == rows
    assert_same(unbroken, second)


def test_each_process_replays_draws_of_its_own_rows():
    rows = []
    for rank, graph in ((0, None), (1, None), (1, RecordedGraph())):
        stepper = make_stepper("ce", graph)
        stepper.state.ranks = Ranks(rank=rank)
        stepper.prepare(first_row=5 * rank)
        rows.append(measured(stepper, 2, 2))
    assert rows[1] == rows[2] and rows[0] != rows[1]


@pytest.mark.parametrize(
    ("habit", "why"),
    [
        ("counts", "network.4.calls changes from step to step"),
        ("remembers", "network.4.seen changes from step to step"),
        ("replaces", "network.4.mean changes from step to step"),
        ("NumPy", "draw from NumPy's, Python's or the host's generator"),
        ("Python", "draw from NumPy's, Python's or the host's generator"),
        ("own generator", "done twice, differ by"),
        ("asks", "cannot be captured"),
    ],
)
def test_what_a_graph_would_not_repeat_is_not_captured_and_named(habit, why):
    _OWN.manual_seed(0)
    tried = make_stepper("ce", RecordedGraph(), habit=habit)
    tried.prepare(first_row=0)
    assert not tried.is_captured and why in tried.note and tried.trial.facts["not_captured"] in tried.note
    _OWN.manual_seed(0)
    rows = measured(tried, 3, 3)
    _OWN.manual_seed(0)
    never = make_stepper("ce", habit=habit)
    never.prepare(first_row=0)
    assert rows == measured(never, 3, 3)
    assert_same(tried, never)
    habits = [stepper.state.student.classifier.network[4] for stepper in (tried, never)]
    assert habits[0].calls == habits[1].calls and habits[0].seen == habits[1].seen


def test_teachers_of_several_kinds_are_captured_where_none_is_chosen():
    for method, is_captured in (("kd", True), ("kd+gaussian", True), ("kd+tdiv", False), ("latentbe+ods", False)):
        stepper = make_stepper(method, RecordedGraph(), widths=(6, 6, 8))
        stepper.prepare(first_row=0)
        assert stepper.is_captured == is_captured, method
        assert is_captured or "for teacher 3 differs from teacher 1 in network.0" in stepper.note


@pytest.mark.parametrize("wrong", ["stuck", "far", "nothing"])
def test_a_graph_that_gives_other_numbers_is_not_taken(wrong):
    class Wrong(RecordedGraph):
        def replay(self):
            if wrong == "stuck":  # one seed for every replay
                torch.manual_seed(1)
            if wrong != "nothing":
                super().replay()
            if wrong == "far":
                tensors[0].mul_(1.01)

    eager, tried = make_stepper("latentbe+tdiv-sdiv"), make_stepper("latentbe+tdiv-sdiv", Wrong())
    tensors = [slot["momentum_buffer"] for slot in tried.state.optimizer.state.values()]
    for stepper in (eager, tried):
        stepper.prepare(first_row=0)
    assert not tried.is_captured and "captured steps differ from the step itself by" in tried.note
    assert measured(eager, 4, 4) == measured(tried, 4, 4)
    assert_same(eager, tried)


def test_without_the_memory_for_a_trial_the_step_runs_as_it_is():
    class Full(RecordedGraph):
        def capture(self, work):
            work()
            raise torch.OutOfMemoryError("out of memory")

    eager, tried = make_stepper("latentbe+tdiv-sdiv"), make_stepper("latentbe+tdiv-sdiv", Full())
    for stepper in (eager, tried):
        stepper.prepare(first_row=0)
    assert not tried.is_captured and "has no room on the device" in tried.note
    assert measured(eager, 3, 3) == measured(tried, 3, 3)


def test_the_trial_leaves_no_trace():
    stepper = make_stepper("latentbe+tdiv-sdiv", RecordedGraph())
    for _ in range(3):
        stepper()
    stepper.mark()
    before, step = [tensor.clone() for tensor in everything(stepper.state)], stepper.state.step
    stepper.prepare(first_row=0)
    assert stepper.is_captured and stepper.state.step == step
    assert all(torch.equal(a, b) for a, b in zip(before, everything(stepper.state), strict=True))
    assert all(p.grad is None for p in stepper.state.student.parameters())


def test_at_the_end_of_a_run_the_trial_stays_within_its_rates():
    stepper = make_stepper("ce", RecordedGraph(warm_ups=3), steps=3)
    stepper.state.step = 3
    stepper.prepare(first_row=0)
    assert stepper.is_captured and stepper.state.step == 3

"""Steps one after another: captured and launch by launch they are the same, and capturing leaves no trace."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from networks import small_state
from recorded_graph import RecordedGraph
from stepping import CPU, StaticInputs, everything, measured

from ensdistill.config.updates import SGD, Updates
from ensdistill.engine.networks import make_networks
from ensdistill.kernels import launch
from ensdistill.training.from_config import make_state
from ensdistill.training.step import train_step
from ensdistill.training.stepper import Stepper

OTHER = Updates(optimizer="adamw", ema=0.9)


def make_stepper(method, graph=None, *, backend="library", steps=200, rows=50, state=None, updates=SGD):
    reference, config = small_state(method, moved=False)
    networks = make_networks(backend, reference.networks.teachers, reference.student, "fp32", CPU)
    state = state or make_state(networks, updates, weight_decay=5e-4)
    rates = [0.02 * (1 + step % 7) / 7 for step in range(steps)]
    return Stepper(state, config, inputs=StaticInputs(), rates=rates, device=CPU, rows=rows, graph=graph)


@pytest.mark.parametrize(
    ("method", "steps", "updates"),
    [
        ("latentbe+tdiv-sdiv", 200, SGD),
        ("ce", 20, SGD),
        ("kd+tdiv", 20, SGD),
        ("be+ods", 20, SGD),
        ("kd+confods", 20, SGD),
        ("ce+gaussian", 20, SGD),
        ("latentbe", 20, OTHER),
        ("kd", 20, OTHER),
        ("hydra+tdiv-sdiv", 50, SGD),
        ("hydra+ods", 10, SGD),
    ],
)
def test_captured_steps_are_the_eager_ones_bit_for_bit(method, steps, updates):
    eager, captured = make_stepper(method, updates=updates), make_stepper(method, RecordedGraph(), updates=updates)
    for stepper in (eager, captured):
        stepper.prepare(first_row=0)
    assert captured.is_captured and not eager.is_captured
    assert measured(eager, steps, 50) == measured(captured, steps, 7)
    assert captured.state.step == eager.state.step == steps
    for a, b in zip(everything(eager.state), everything(captured.state), strict=True):
        assert torch.equal(a, b)
    if updates.ema is not None:
        assert captured.state.ema.updates.item() == steps


@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "hydra+tdiv-sdiv"])
def test_the_steps_are_those_of_the_plain_loop(method):
    stepper = make_stepper(method, RecordedGraph())
    state, config = copy.deepcopy(stepper.state), stepper.config
    stepper.prepare(first_row=0)
    rows = measured(stepper, 6, 3)
    inputs, rates = StaticInputs(), [row["lr"] for row in rows]
    for step, row in enumerate(rows):
        assert row["step"] == step
        measures = train_step(state, config, *inputs.batch(torch.tensor(step)), rates[step])
        assert {name: float(value) for name, value in measures.items()} == {name: row[name] for name in measures}
    for a, b in zip(everything(state), everything(stepper.state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("method", "updates"),
    [("latentbe+tdiv-sdiv", SGD), ("latentbe+tdiv-sdiv", OTHER), ("hydra+tdiv-sdiv", SGD)],
)
def test_warm_up_and_capture_leave_no_trace(method, updates):
    stepper = make_stepper(method, RecordedGraph(), updates=updates)
    for _ in range(3):  # from the middle of a run, with momentum and statistics
        stepper()
    stepper.mark()
    before, step = [tensor.clone() for tensor in everything(stepper.state)], stepper.state.step
    stepper.prepare(first_row=0)
    assert stepper.is_captured and stepper.state.step == step
    assert all(torch.equal(a, b) for a, b in zip(before, everything(stepper.state), strict=True))
    assert all(p.grad is None for p in stepper.state.student.parameters())
    assert stepper._counter.tolist() == [stepper.config.seed, step, 0]


def test_momentum_accumulates_over_replays():
    stepper = make_stepper("ce", RecordedGraph())
    stepper.prepare(first_row=0)
    momenta = []
    for _ in range(3):
        stepper()
        momenta.append(next(iter(stepper.state.optimizer.state.values()))["momentum_buffer"].clone())
    gradients = [now - 0.9 * before for before, now in itertools.pairwise(momenta)]
    assert all(gradient.abs().max() > 0 for gradient in gradients) and not torch.equal(momenta[0], momenta[1])


@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "hydra+tdiv-sdiv"])
def test_captured_steps_go_on_where_the_state_stands(method):
    unbroken = make_stepper(method, RecordedGraph())
    unbroken.prepare(first_row=0)
    rows = measured(unbroken, 9, 9)
    first = make_stepper(method, RecordedGraph())
    first.prepare(first_row=0)
    before = measured(first, 4, 4)
    second = make_stepper(method, RecordedGraph(), state=first.state)
    second.prepare(first_row=0)
    assert before + measured(second, 5, 5) == rows
    assert all(torch.equal(a, b) for a, b in zip(everything(unbroken.state), everything(second.state), strict=True))


@pytest.mark.parametrize("done", [2, 3])
def test_a_capture_at_the_end_of_a_run_stays_within_its_rates(done):
    unbroken, first = make_stepper("ce", steps=3), make_stepper("ce", steps=3)
    for stepper in (unbroken, first):
        stepper.prepare(first_row=0)
        measured(stepper, done, done)
    resumed = make_stepper("ce", RecordedGraph(warm_ups=3), steps=3, state=first.state)
    resumed.prepare(first_row=0)
    assert resumed.is_captured and resumed.state.step == done
    if done < 3:
        assert measured(unbroken, 1, 1) == measured(resumed, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(everything(unbroken.state), everything(resumed.state), strict=True))


def test_a_stepper_that_is_closed_lets_go_of_its_graph_and_goes_on():
    eager, closed = make_stepper("ce"), make_stepper("ce", RecordedGraph())
    for stepper in (eager, closed):
        stepper.prepare(first_row=0)
    graph = weakref.ref(closed._graph)
    rows = measured(closed, 2, 2)
    closed.close()
    gc.collect()
    assert graph() is None and not closed.is_captured
    assert rows + measured(closed, 2, 2) == measured(eager, 4, 4)


def test_a_capture_that_only_dependent_launches_break_is_made_without_them(monkeypatch):
    class Early(RecordedGraph):
        def capture(self, work):
            if launch.dependent:
                work()
                raise RuntimeError("operation not supported")
            super().capture(work)

    monkeypatch.setattr(launch, "dependent", True)
    eager, captured = make_stepper("ce"), make_stepper("ce", Early())
    for stepper in (eager, captured):
        stepper.prepare(first_row=0)
    assert captured.is_captured and not launch.dependent
    assert captured.note == "the step could be captured without dependent launches only (operation not supported)"
    assert measured(eager, 3, 3) == measured(captured, 3, 3)


def test_a_capture_that_fails_is_said_and_the_steps_are_the_same(monkeypatch):
    monkeypatch.setattr(launch, "dependent", True)

    class Refusing(RecordedGraph):
        def capture(self, work):
            work()
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    eager, refused = make_stepper("ce"), make_stepper("ce", Refusing())
    for stepper in (eager, refused):
        stepper.prepare(first_row=0)
    assert "operation not permitted when stream is capturing): it runs launch by launch" in refused.note
    assert launch.dependent  # the same without them: they are not to blame
    assert measured(eager, 3, 3) == measured(refused, 3, 3)


def test_the_recorded_graph_tells_a_step_that_reads_the_host():
    """The stand-in itself: numbers of the host stay as they were recorded."""
    value, out, host = torch.ones(3), torch.zeros(3), {"factor": 2.0}
    graph = RecordedGraph()

    def work():
        out.copy_(value * host["factor"])

    graph.capture(work)
    value.fill_(5.0)
    host["factor"] = 100.0
    graph.replay()
    assert out.tolist() == [10.0] * 3
    with pytest.raises(RuntimeError, match="cannot be captured"):
        RecordedGraph().capture(lambda: value.sum().item())

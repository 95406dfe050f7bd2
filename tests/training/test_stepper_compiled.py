"""Steps whose modules torch.compile computes: when that is chosen, what it must give, what is said where it cannot."""

from __future__ import annotations

import time

import pytest
import torch
from recorded_graph import RecordedGraph
from stepping import everything, measured
from torch._dynamo.utils import counters

from ensdistill.engine import module_passes, rehearsal
from ensdistill.runtime.errors import UserError
from tests.training.test_stepper_modules import assert_same, make_stepper

METHOD = "latentbe+tdiv-sdiv"


@pytest.fixture
def compilers(monkeypatch):
    """Gives a compiler of the test's own, which counts what it was given."""
    monkeypatch.setattr(rehearsal, "_START_SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "_LAYER_SECONDS", 0.0)

    def use(make):
        functions = []

        def compiled(function):
            functions.append(function)
            return make(function)

        monkeypatch.setattr(module_passes, "compiled", compiled)
        return functions

    return use


def slower(function):
    def run(*args):
        time.sleep(0.01)
        return function(*args)

    return run


def seconds_are(monkeypatch, plain, compiled):
    monkeypatch.setattr(
        rehearsal.Trial, "_seconds", lambda trial: compiled if trial.networks.passes.compiled else plain
    )


def prepared(method=METHOD, graph=None, **options):
    stepper = make_stepper(method, graph, **options)
    stepper.prepare(first_row=0)
    return stepper


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("method", [METHOD, "hydra+tdiv-sdiv", "kd+ods", "be", "ce"])
def test_a_compiler_is_given_every_pass_and_the_steps_stay_the_same(method, captures, compilers):
    functions = compilers(lambda function: function)
    stepper = prepared(method, RecordedGraph() if captures else None, compiling="yes")
    passes = {"ce": 1, "be": 2, "kd+ods": 2}  # the student's; the teachers'; the student's in evaluation mode
    assert len(functions) == passes.get(method, 3)
    assert stepper.trial.compiled and stepper.is_captured == captures
    eager = prepared(method)
    assert measured(stepper, 4, 4) == measured(eager, 4, 4)
    assert_same(stepper, eager)


def test_auto_takes_the_faster_way(compilers, monkeypatch):
    compilers(lambda function: function)
    for graph in (None, RecordedGraph()):
        seconds_are(monkeypatch, 2.0, 1.0)
        stepper = prepared(graph=graph, compiling="auto")
        assert stepper.trial.compiled and stepper.note.endswith("compiled by torch.compile")
        seconds_are(monkeypatch, 1.0, 0.99)
        stepper = prepared(graph=graph, compiling="auto")
        assert not stepper.trial.compiled and not stepper.state.networks.passes.compiled
        assert "not compiled by torch.compile, for 990 ms a step are not less than 1e+03 ms" in stepper.note
        assert stepper.is_captured == (graph is not None)
        assert measured(stepper, 3, 3) == measured(prepared(), 3, 3)


def test_auto_compiles_nothing_for_a_run_that_ends_sooner(compilers, monkeypatch):
    functions = compilers(lambda function: function)
    monkeypatch.setattr(rehearsal, "_START_SECONDS", 60.0)
    stepper = prepared(compiling="auto")
    assert not functions and "40 steps of" in stepper.note and "are too few for the" in stepper.note
    monkeypatch.setattr(rehearsal.Trial, "_seconds", lambda trial: 100.0 - 99 * trial.networks.passes.compiled)
    assert prepared(compiling="auto").trial.compiled


def failing(function):
    raise RuntimeError("no working C++ compiler\nmore")


def wrong(function):
    return lambda *args: 1.1 * function(*args)


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (failing, "torch.compile failed (RuntimeError: no working C++ compiler)"),
        (wrong, "compiled steps differ from the step itself by"),
    ],
)
def test_a_compiler_that_fails_is_left_under_auto_and_an_error_under_yes(make, why, captures, compilers):
    compilers(make)
    stepper = prepared(graph=RecordedGraph() if captures else None, compiling="auto")
    assert stepper.is_captured == stepper.trial.captured == captures
    assert not stepper.trial.compiled and f"not compiled by torch.compile, for {why}" in stepper.note
    eager = prepared()
    assert measured(stepper, 3, 3) == measured(eager, 3, 3)
    assert_same(stepper, eager)
    with pytest.raises(UserError, match="compile: yes, but the step cannot be compiled: ") as error:
        prepared(compiling="yes")
    assert why in str(error.value) and "give --compile no" in str(error.value)


def test_what_keeps_a_state_of_python_s_is_not_compiled(compilers):
    functions = compilers(lambda function: function)
    stepper = prepared("ce", habit="counts", compiling="auto")
    assert "not compiled by torch.compile, for" in stepper.note and "calls changes" in stepper.note
    with pytest.raises(UserError, match="calls changes from step to step; give --compile no"):
        prepared("ce", habit="counts", compiling="yes")
    assert not functions


def test_the_choice_leaves_no_trace(compilers):
    compilers(slower)
    stepper = make_stepper(METHOD, compiling="auto")
    before = [tensor.clone() for tensor in everything(stepper.state)]
    stepper.prepare(first_row=0)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(stepper.state), strict=True))
    assert stepper.state.step == 0 and all(p.grad is None for p in stepper.state.student.parameters())


@pytest.mark.parametrize(("method", "captures"), [(METHOD, True), ("hydra+tdiv-sdiv", False)])
def test_every_pass_can_be_traced_and_its_gradients_too(method, captures, compilers):
    """All of a compiler but the code that it makes; in a graph, members are chosen by tensors."""
    compilers(lambda function: torch.compile(function, backend="aot_eager", dynamic=False))
    stepper, eager = compiled_and_eager(method, RecordedGraph() if captures else None)
    assert_same(stepper, eager, exactly=False)
    made = counters["stats"]["unique_graphs"]
    measured(stepper, 6, 6)  # other teachers, other members: nothing is compiled for them
    assert counters["stats"]["unique_graphs"] == made


def test_inductor_draws_what_the_modules_draw():
    """A mask of dropout's that differs changes everything by far more than the sums' order, some 1e-4 here."""
    compiled_and_eager("ce")


def compiled_and_eager(method, graph=None):
    """Steppers whose three steps had the same losses."""
    stepper, eager = prepared(method, graph, compiling="yes"), prepared(method)
    assert stepper.trial.compiled and stepper.is_captured == (graph is not None), stepper.note
    assert stepper.trial.facts["compiled_within"] < 1e-3
    for compiled, right in zip(measured(stepper, 3, 3), measured(eager, 3, 3), strict=True):
        assert compiled == pytest.approx(right, rel=1e-3)
    return stepper, eager

"""Teachers in one go: each goes the way that it goes alone, captured or not, through the command as well."""

from __future__ import annotations

import json
import signal
import sys
from unittest import mock

import pytest
import safetensors.torch
import torch
from networks import small_batch, small_classifier
from recorded_graph import RecordedGraph

from ensdistill import fast_train
from ensdistill.config.methods import Method
from ensdistill.config.updates import SGD, Updates
from ensdistill.data.inputs import HostInputs, StackedInputs
from ensdistill.engine.networks import Networks
from ensdistill.engine.operations import make_operations
from ensdistill.models.students import PlainStudent
from ensdistill.runtime.errors import run_main
from ensdistill.training.from_config import make_state
from ensdistill.training.step import StepConfig, measure_names, train_step
from ensdistill.training.stepper import Stepper
from ensdistill.training.together import TeacherNetworks, TeachersInTraining, teachers_step

E, B, BATCHES = 3, 5, 4
CPU = torch.device("cpu")
CE = Method(student="ce")
OTHER = Updates(optimizer="adamw", ema=0.9, swa=1)
# of a tensor's largest value after ten steps in fp32; measured 7e-7 by the modules, 4e-6 by the library's convolutions
TOLERANCE = 5e-5


class Fixed(HostInputs):
    """The same few batches over and over, where a graph finds them."""

    def __init__(self, seed: int):
        images, labels = small_batch(B * BATCHES)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).view(BATCHES, B)
        self.images, self.labels = images[order], labels[order]

    def batch(self, step):
        at = (step % BATCHES).view(1)
        return self.images.index_select(0, at)[0], self.labels.index_select(0, at)[0]


def rates(steps):
    return [0.01 * (1 + step % 3) for step in range(steps)]


def together(backend, steps, graph=None, updates=SGD):
    operations = make_operations(backend, CPU)
    teachers = TeachersInTraining([small_classifier(t) for t in range(E)], for_kernels=operations is not None)
    networks = TeacherNetworks(teachers, "fp32", operations)
    state = make_state(networks, updates, weight_decay=5e-4)
    stepper = Stepper(
        state,
        StepConfig(method=CE, seed=7, pad=1),
        inputs=StackedInputs([Fixed(t) for t in range(E)]),
        rates=rates(steps),
        device=CPU,
        rows=steps,
        graph=graph,
        function=teachers_step,
        networks=E,
    )
    stepper.prepare(first_row=0)
    for _ in range(steps):
        stepper()
    return stepper, stepper.mark().read().rows


@pytest.mark.parametrize(("backend", "updates"), [("reference", SGD), ("library", SGD), ("reference", OTHER)])
def test_each_goes_the_way_that_it_goes_alone(backend, updates):
    steps = 10
    stepper, rows = together(backend, steps, updates=updates)
    if updates.swa is not None:
        stepper.state.swa.update(stepper.state.student)
    for t in range(E):
        student, inputs = PlainStudent(small_classifier(t)), Fixed(t)
        state = make_state(Networks(None, student, "fp32"), updates, weight_decay=5e-4)
        for step, lr in enumerate(rates(steps)):
            batch = inputs.batch(torch.tensor(step))
            measures = train_step(state, StepConfig(method=CE, seed=7 + t, pad=1), *batch, lr)
            for name in measure_names(CE):
                assert rows[step][t][name] == pytest.approx(float(measures[name]), rel=1e-4), (t, step, name)
        pairs = [(stepper.state.student, state.student)]
        if updates.swa is not None:
            state.swa.update(state.student)
            pairs += [(stepper.state.ema.student, state.ema.student), (stepper.state.swa.student, state.swa.student)]
        for stacked, alone in pairs:
            expected = alone.classifier.state_dict()
            for name, tensor in stacked.classifier(t).state_dict().items():
                worst = (tensor - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12)
                assert worst <= TOLERANCE, (name, worst)


def test_captured_steps_are_the_eager_ones_bit_for_bit():
    eager, rows = together("library", 20)
    captured, same = together("library", 20, RecordedGraph())
    assert captured.is_captured and not eager.is_captured and rows == same
    for a, b in zip(
        eager.state.student.state_dict().values(), captured.state.student.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_modules_are_not_captured():
    stepper, rows = together("reference", 2, RecordedGraph())
    assert not stepper.is_captured and len(rows) == 2 and len(rows[0]) == E


def run(folder, *options):
    few = [
        "--train-images",
        "64",
        "--teacher.epochs",
        "3",
        "--teacher.warmup-epochs",
        "1",
        "--teacher.batch-size",
        "16",
    ]
    arguments = ["--out", str(folder), "--stage", "teachers", "--members", "2", "--precision", "fp32", "--threads", "1"]
    with mock.patch.object(sys, "argv", ["fast_train", *arguments, *few, *options]):
        return run_main(fast_train.main)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    assert run(folder / "alone", "--teachers-together", "no") == 0
    assert run(folder / "together", "--teachers-together", "yes") == 0
    return folder / "alone", folder / "together"


def test_the_command_gives_the_same_teachers_either_way(folders):
    _, both = folders
    for t in range(2):
        one, other = (folder / "teachers" / str(t) for folder in folders)
        for name in ("best.safetensors", "last.safetensors"):
            expected = safetensors.torch.load_file(one / name)
            found = safetensors.torch.load_file(other / name)
            assert expected.keys() == found.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()) + 1e-6)
        lines = [
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (one, other)
        ]
        valid = [[line for line in some if line["kind"] == "valid"] for some in lines]
        assert [line["step"] for line in valid[0]] == [line["step"] for line in valid[1]]
        for a, b in zip(*valid, strict=True):
            assert a["nll"] == pytest.approx(b["nll"], rel=1e-3)
        outcomes = [json.loads((folder / "outcome.json").read_text()) for folder in (one, other)]
        assert outcomes[0]["images"] == outcomes[1]["images"] == 3 * 64
        assert outcomes[0]["best_epoch"] == outcomes[1]["best_epoch"]
    assert not (both / "teachers" / "together" / "checkpoint.pt").exists()


def test_an_interrupted_training_goes_on_together_and_ends_the_same(folders, tmp_path, monkeypatch, capsys):
    _, both = folders
    original = Stepper.__call__

    def dying(self, ready=None):
        original(self, ready)
        if self.state.step == 6:  # in the middle of the second epoch
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Stepper, "__call__", dying)
    assert run(tmp_path / "x", "--teachers-together", "yes") == 128 + 15
    assert (tmp_path / "x" / "teachers" / "together" / "checkpoint.pt").exists()
    monkeypatch.undo()
    assert run(tmp_path / "x", "--teachers-together", "yes") == 2
    assert "add --resume" in capsys.readouterr().err
    assert run(tmp_path / "x", "--resume") == 0  # as it was begun, whatever the default is
    assert "teachers 1 to 2: going on at step 6 of 12" in capsys.readouterr().out
    for t in range(2):
        expected = safetensors.torch.load_file(both / "teachers" / str(t) / "last.safetensors")
        found = safetensors.torch.load_file(tmp_path / "x" / "teachers" / str(t) / "last.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())

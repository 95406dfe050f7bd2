"""Steps on tensors without values: the layers that are recorded, and those that nobody has measured."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from networks import K, small_classifier, small_state
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.costs import dry_run
from ensdistill.costs.dry_run import (
    operations_of,
    precision_of_gradients,
    record_step,
    unmeasured_layers,
    unwritten_gradient,
)
from ensdistill.engine.networks import KernelNetworks, Networks
from ensdistill.engine.operations import LibraryOperations, TunedOperations
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.table import Choice, Measured, TuningTable
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.runtime.errors import UserError
from ensdistill.training.together import TeacherNetworks, TeachersInTraining

METHOD = Method.parse("latentbe+tdiv-sdiv")


def networks_of(method: str, operations) -> KernelNetworks:
    state, _ = small_state(method)
    return KernelNetworks(state.networks.teachers, state.student, "fp32", operations)


def test_a_step_is_recorded_and_nothing_is_touched():
    state, _ = small_state("latentbe+tdiv-sdiv")
    before = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
    teachers = state.networks.teachers
    recorded = record_step(teachers, state.student, METHOD, B=4, image_shape=(9, 9, 3), precision="fp32")
    # WRN-10-1 has 9 convolutions and a linear layer, forward three times: members that are compared, teachers, student
    counts = {op: sum(n for key, n in recorded.keys.items() if key.op == op) for op in ("forward", "weight gradient")}
    assert counts == {"forward": 30, "weight gradient": 10}
    assert {key.B for key in recorded.keys} == {4} and recorded.notes == []
    for name, tensor in state.student.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(parameter.is_meta for parameter in (*teachers.parameters(), *state.student.parameters()))


def test_only_what_the_table_lacks_is_measured():
    table = TuningTable(None, {})
    networks = networks_of("latentbe+tdiv-sdiv", TunedOperations(table))
    operations, keys = unmeasured_layers(networks, METHOD, B=4, image_shape=(9, 9, 3))
    assert operations is networks.operations and len(keys) == len(set(keys)) > 20
    one = Measured(candidate=Candidate(provider="library"), microseconds=1.0, spread=0.0)
    for key in keys[1:]:
        table.put(key, Choice(candidate=one.candidate, measured=(one,), floor_share=None))
    assert unmeasured_layers(networks, METHOD, B=4, image_shape=(9, 9, 3))[1] == keys[:1]
    table.put(keys[0], Choice(candidate=one.candidate, measured=(one,), floor_share=None))
    assert unmeasured_layers(networks, METHOD, B=4, image_shape=(9, 9, 3)) is None
    assert unmeasured_layers(networks, METHOD, B=8, image_shape=(9, 9, 3)) is not None


def test_other_backends_measure_nothing():
    state, _ = small_state("latentbe")
    modules = Networks(state.networks.teachers, state.student, "fp32")
    assert unmeasured_layers(modules, Method.parse("latentbe"), B=4, image_shape=(9, 9, 3)) is None
    by_library = networks_of("latentbe", LibraryOperations())
    assert unmeasured_layers(by_library, Method.parse("latentbe"), B=4, image_shape=(9, 9, 3)) is None


def test_what_has_no_kernels_is_said():
    teachers = Teachers([small_classifier(0), small_classifier(1, "resnet20")], K)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K))
    student = build_student(Method.parse("kd"), lambda seed: Classifier(network, [0.5] * 3, [0.5] * 3), E=2, seed=0)
    recorded = record_step(teachers, student, Method.parse("kd"), B=4, image_shape=(9, 9, 3), precision="fp32")
    assert not recorded.keys and len(recorded.notes) == 2


def test_a_network_no_pass_of_which_has_kernels_is_refused(monkeypatch):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, K))
    monkeypatch.setattr(dry_run, "build", lambda name, **options: network)
    with pytest.raises(UserError, match="network 'flat': no pass has kernels"):
        operations_of("flat", method=METHOD, E=2, B=4, image_size=2, num_classes=K)


def test_what_has_kernels_is_recorded_beside_what_has_none():
    teachers = Teachers([small_classifier(0), small_classifier(1, "resnet20")], K)
    student = build_student(METHOD, small_classifier, E=2, seed=0)
    recorded = record_step(teachers, student, METHOD, B=4, image_shape=(9, 9, 3), precision="fp32")
    (note,) = recorded.notes
    assert note.startswith("the teachers: ")
    # the members that are compared, and the training; the teachers run by their modules
    assert sum(n for key, n in recorded.keys.items() if key.op == "forward") == 20


def test_teachers_that_train_together_are_recorded_as_one_network():
    teachers = TeachersInTraining([small_classifier(t) for t in range(3)], for_kernels=True)
    before = {name: tensor.clone() for name, tensor in teachers.state_dict().items()}
    ce = Method(student="ce")
    recorded = record_step(None, teachers, ce, B=4, image_shape=(9, 9, 3), precision="fp32")
    counts = {op: sum(n for key, n in recorded.keys.items() if key.op == op) for op in ("forward", "weight gradient")}
    assert counts == {"forward": 10, "weight gradient": 10} and {key.M for key in recorded.keys} == {3}
    assert all(torch.equal(tensor, before[name]) for name, tensor in teachers.state_dict().items())
    table = TuningTable(None, {})
    networks = TeacherNetworks(teachers, "fp32", TunedOperations(table))
    _, keys = unmeasured_layers(networks, ce, B=4, image_shape=(9, 9, 3))
    assert keys == list(recorded.keys)


@pytest.mark.parametrize(
    "make, size, found",
    [
        (lambda: build("wrn10x1", num_classes=3, in_channels=3, image_size=8), 8, None),
        (lambda: build("wrn10x1", num_classes=3, in_channels=3, image_size=4), 4, "3x3 with stride 2x2 on maps of 2x2"),
        (lambda: nn.Conv2d(3, 8, 3, padding=1), 1, None),
        (lambda: nn.Conv2d(3, 8, (3, 1), stride=2, padding=(1, 0)), 1, None),  # rows are written
        (lambda: nn.Conv2d(3, 8, 1, stride=2), 1, None),
        (lambda: nn.ConvTranspose2d(3, 8, 3, stride=2, padding=1), 1, "3x3 with stride 2x2 on maps of 1x1"),
    ],
    ids=["wrn", "small wrn", "stride 1", "rows", "1x1", "transposed"],
)
def test_convolutions_whose_gradient_a_cpu_leaves_unwritten_in_bf16_are_found(make, size, found):
    assert unwritten_gradient(make(), (size, size, 3)) == found


def test_bf16_becomes_fp32_where_its_gradients_are_unwritten(capsys):
    cpu, small = torch.device("cpu"), build("wrn10x1", num_classes=3, in_channels=3, image_size=4)
    choose = partial(precision_of_gradients, "bf16", small, device=cpu, say=print)
    assert choose((8, 8, 3), asked="auto") == "bf16" and capsys.readouterr().out == ""
    assert choose((4, 4, 3), asked="auto") == "fp32" and "precision: fp32, since on a CPU" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--precision bf16: .* 2x2 pixels; give --precision fp32"):
        choose((4, 4, 3), asked="bf16")

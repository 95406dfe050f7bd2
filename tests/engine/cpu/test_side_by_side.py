"""Networks and members side by side on a CPU against the modules as they are, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import K, move_, small_batch, small_classifier
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.engine.cpu.crew import Crew
from ensdistill.engine.cpu.side_by_side import SideBySideNetworks, crew_for
from ensdistill.engine.modules import passes as module_passes
from ensdistill.engine.networks import Networks
from ensdistill.models import Classifier
from ensdistill.models.batch_ensemble import folded_members, select_members, to_batch_ensemble
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, train_step

E, B, SIZE = 4, 6, 9
THREADS = (1, 2, 3, 8)


def images(rows: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, 3, SIZE, SIZE, generator=generator).to(memory_format=torch.channels_last)


def student_of(method: str, make=small_classifier):
    student = build_student(Method.parse(method), make, E=E, seed=0)
    move_(student, 1)
    return student


def both(method: str, threads: int, make=small_classifier) -> tuple[Networks, SideBySideNetworks]:
    """The modules as they are, and side by side, in float64."""
    teachers = Teachers([small_classifier(100 + t) for t in range(E)], K).double()
    student = student_of(method, make).double()
    truth = Networks(teachers, copy.deepcopy(student), "fp32")
    return truth, SideBySideNetworks(teachers, student, "fp32", Crew(threads), images().double())


def assert_same(ours: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("method", ["latentbe", "kd", "hydra"])
def test_training_passes_are_those_of_the_modules(method: str, threads: int):
    truth, ours = both(method, threads)
    assert ours.notes == []
    x = images().double()
    weights = torch.rand(1 if method == "kd" else E, B, K, dtype=torch.float64)
    for networks in (truth, ours):
        for _ in range(2):  # running statistics advance twice
            (networks.student_logits(x) * weights).sum().backward()
    assert_same(ours.student_logits(x).detach(), truth.student_logits(x).detach())
    for (name, own), right in zip(ours.student.named_parameters(), truth.student.parameters(), strict=True):
        assert own.grad is not None and right.grad is not None, name
        assert_same(own.grad, right.grad)
    for own, right in zip(ours.student.buffers(), truth.student.buffers(), strict=True):
        assert_same(own, right)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("method", ["latentbe", "hydra"])
def test_frozen_passes_are_those_of_the_modules(method: str, threads: int):
    truth, ours = both(method, threads)
    x = images(7).double()  # cut unevenly
    assert_same(ours.teacher_logits(x), truth.teacher_logits(x))
    for with_student in (False, True):
        gradients = [n.divergence_gradient(x, (2, 0), with_student=with_student) for n in (ours, truth)]
        assert_same(*gradients)
        assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    w_BK = torch.rand(7, K, dtype=torch.float64)
    for own, right in zip(ours.ods_gradient(x, 1, w_BK, 4.0), truth.ods_gradient(x, 1, w_BK, 4.0), strict=True):
        assert_same(own, right)


@pytest.mark.parametrize("method", ["latentbe", "hydra"])
def test_one_thread_is_compiled_as_the_modules_are(method: str, monkeypatch: pytest.MonkeyPatch):
    compiled: list[object] = []
    monkeypatch.setattr(module_passes, "compiled", lambda function: compiled.append(function) or function)
    truth, ours = both(method, 1)
    assert ours.why_not_compiled() is None
    ours.passes.choose(on_device=False, compiled=True)
    x = images().double()
    assert_same(ours.teacher_logits(x), truth.teacher_logits(x))
    assert_same(*(n.divergence_gradient(x, (2, 0), with_student=True) for n in (ours, truth)))
    assert_same(ours.student_logits(x), truth.student_logits(x))
    assert len(compiled) == 3  # the teachers', which are alike, a member's, the student's
    reason = both(method, 2)[1].why_not_compiled()
    assert reason is not None and "--compile yes" in reason


@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "be+ods", "kd+tdiv", "ce"])
def test_steps_are_alike_whichever_thread_is_faster(method: str):
    parsed = Method.parse(method)

    def trained() -> list[Tensor]:
        teachers = Teachers([small_classifier(100 + t) for t in range(E)], K) if parsed.needs_teachers else None
        networks = SideBySideNetworks(teachers, student_of(method), "fp32", Crew(3), images())
        state = State(networks=networks, optimizer=make_optimizer(networks.student, 5e-4))
        for _ in range(3):
            train_step(state, StepConfig(method=parsed, seed=3, pad=1), *small_batch(B), 0.05)
        return list(networks.student.state_dict().values())

    first = trained()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, trained(), strict=True))


def foreign(*layers: nn.Module):
    def make(seed: int) -> Classifier:
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), *layers,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K),
        )  # fmt: skip
        return Classifier(network, [0.5] * 3, [0.3] * 3)

    return make


def test_norms_of_other_people_keep_their_unbiased_variance():
    truth, ours = both("latentbe", 2, foreign(nn.BatchNorm2d(8)))
    assert ours.notes == []
    for networks in (truth, ours):
        networks.student_logits(images().double())
    for own, right in zip(ours.student.buffers(), truth.student.buffers(), strict=True):
        assert_same(own, right)


class Noise(nn.Module):
    """Draws while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if self.training else x


class Mixing(nn.Module):
    """Lets images see each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0, keepdim=True)


class Hooked(nn.Identity):
    """Has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Dropout(0.3), "draws numbers"),
        (Noise(), "draws numbers"),
        (Mixing(), "mixes the rows"),
        (nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(8), nn.Unflatten(2, (5, 5))), "not known here"),
        (Hooked(), "has hooks"),
    ],
    ids=["dropout", "noise", "mixing", "norm", "hook"],
)
def test_a_student_that_cannot_be_cut_runs_whole_and_says_why(layer: nn.Module, why: str):
    state = torch.get_rng_state()
    student = student_of("kd", foreign(layer))
    before = copy.deepcopy(student.state_dict())
    torch.set_rng_state(state)
    ours = SideBySideNetworks(None, student, "fp32", Crew(2), images())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert len(ours.notes) == 1 and why in ours.notes[0]
    torch.manual_seed(3)
    own = ours.student_logits(images())
    torch.manual_seed(3)
    student.load_state_dict(before)
    torch.testing.assert_close(own, student.train()(images()))


def test_the_sums_of_a_step_are_one_processes_where_every_process_normalises_alone():
    """A copy whose statistics are measured anew, outside of a pass, normalises its own rows."""
    truth, ours = both("kd", 2)
    copied = copy.deepcopy(ours.student).train()
    assert_same(copied(images().double()), truth.student.train()(images().double()))


@pytest.mark.parametrize(
    ("backend", "threads", "tiny", "crew"),
    [("auto", 2, True, True), ("auto", 1, False, True), ("auto", 1, True, False), ("reference", 2, False, False)],
)
def test_who_computes_on_a_cpu(backend: str, threads: int, tiny: bool, crew: bool):
    assert (crew_for(backend, torch.device("cpu"), threads, tiny=tiny) is not None) == crew
    assert crew_for(backend, torch.device("cuda"), threads, tiny=tiny) is None


class Scaled(nn.Conv2d):
    """A convolution of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def test_factors_on_the_weights_give_what_factors_on_activations_give():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), Scaled(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Flatten(2), nn.Linear(9, 5),
        nn.Flatten(), nn.Linear(40, K),
    ).double()  # fmt: skip
    student = to_batch_ensemble(network, E)
    move_(student, 2)
    x = torch.rand(2 * B, 3, SIZE, SIZE, dtype=torch.float64)
    found = []
    for select in (select_members, folded_members):
        student.zero_grad()
        with select(student, (3, 1)):
            y = student(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in student.parameters())])
    for own, right in zip(*found, strict=True):
        assert_same(own, right)

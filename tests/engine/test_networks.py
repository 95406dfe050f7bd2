"""Teachers and student through member-batched passes against their modules."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from networks import K, move_, small_batch, small_classifier, small_state
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.engine.networks import KernelNetworks, Networks, make_networks
from ensdistill.engine.operations import LibraryOperations, Reader, TritonOperations, TunedOperations
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.table import Choice, Measured, TuningTable
from ensdistill.kernels.philox import draw_pair
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, train_step

E, B, SIZE = 3, 4, 9


def student_of(method: str, network: str = "wrn10x1"):
    student = build_student(Method.parse(method), lambda seed: small_classifier(seed, network), E=E, seed=0)
    move_(student, 1)
    return student


def teachers_of(*networks: str) -> Teachers:
    return Teachers([small_classifier(100 + t, network) for t, network in enumerate(networks)], K)


def images() -> Tensor:
    return torch.rand(B, 3, SIZE, SIZE).to(memory_format=torch.channels_last)


def both(teachers, student, operations=None) -> tuple[Networks, KernelNetworks]:
    """The modules in float64, the passes in float32."""
    truth = Networks(copy.deepcopy(teachers).double(), copy.deepcopy(student).double(), "fp32")
    return truth, KernelNetworks(teachers, student, "fp32", operations or LibraryOperations())


def assert_same(ours: Tensor, right: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == right.shape
    ours, right = ours.detach(), right.detach()
    assert float((ours.double() - right).norm() / right.norm()) < tolerance


# "cross": the teachers have another shape than the student
@pytest.mark.parametrize("teachers", [["wrn10x1"] * 3, ["wrn16x1"] * 3], ids=["joint", "cross"])
@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "kd+tdiv", "hydra+tdiv-sdiv"])
def test_passes_agree_with_the_modules(method, teachers):
    student = student_of(method)
    truth, ours = both(teachers_of(*teachers), student)
    assert ours.notes == []
    assert (ours.frozen_student is ours.frozen) == (teachers[0] == "wrn10x1" and method.startswith("latentbe"))
    x = images()
    assert_same(ours.teacher_logits(x), truth.teacher_logits(x.double()))
    for pair in ((2, 0), (0, 1)):
        for with_student in (False, True) if "sdiv" in method else (False,):
            gradient = ours.divergence_gradient(x, pair, with_student=with_student)
            assert_same(
                gradient, truth.divergence_gradient(x.double(), pair, with_student=with_student), 1e-2
            )  # saturated softmax: differences of logits cancel
    w, tau = torch.rand(B, K), 1e3  # no saturated softmax, whose gradient is rounding alone
    for mine, right in zip(
        ours.ods_gradient(x, 1, w, tau), truth.ods_gradient(x.double(), 1, w.double(), tau), strict=True
    ):
        assert_same(mine, right, 1e-3)
    logits = ours.student_logits(x)
    right = truth.student_logits(x.double())
    assert_same(logits, right)
    seeds = torch.randn_like(right)
    (logits * seeds).sum().backward()
    (right * seeds).sum().backward()
    for parameter, other in zip(student.parameters(), truth.student.parameters(), strict=True):
        assert_same(parameter.grad, other.grad, 1e-3)


def test_the_perturbation_sees_the_student_s_newest_weights():
    student = student_of("latentbe")
    truth, ours = both(teachers_of(*["wrn10x1"] * 3), student)
    x = images()
    before = ours.divergence_gradient(x, (0, 1), with_student=True)
    for trained in (student, truth.student):
        move_(trained, 9)
    after = ours.divergence_gradient(x, (0, 1), with_student=True)
    assert not torch.equal(before, after)
    assert_same(after, truth.divergence_gradient(x.double(), (0, 1), with_student=True), 1e-3)


def test_networks_that_normalise_differently():
    classifiers = [
        Classifier(small_classifier(t).network, mean, std)
        for t, (mean, std) in enumerate(
            [([0.4] * 3, [0.3] * 3), ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), ([0.1] * 3, [0.5] * 3)]
        )
    ]
    truth, ours = both(Teachers(classifiers, K), student_of("latentbe"))
    assert ours.normalise is None
    x = images()
    assert_same(ours.teacher_logits(x), truth.teacher_logits(x.double()))
    gradient = ours.divergence_gradient(x, (1, 2), with_student=True)
    assert_same(gradient, truth.divergence_gradient(x.double(), (1, 2), with_student=True), 1e-3)


def test_images_that_come_normalised_are_used():
    _, ours = both(teachers_of(*["wrn10x1"] * 3), student_of("latentbe"))
    x = images()
    mean, std = ours.normalise
    z = ((x - mean[:, None, None]) / std[:, None, None]).permute(0, 2, 3, 1)
    nothing = torch.full_like(x, torch.nan)
    torch.testing.assert_close(ours.teacher_logits(nothing, z), ours.teacher_logits(x))
    torch.testing.assert_close(ours.student_logits(nothing, z), ours.student_logits(x))
    torch.testing.assert_close(
        ours.divergence_gradient(nothing, (0, 1), with_student=True, z_BHWC=z),
        ours.divergence_gradient(x, (0, 1), with_student=True),
    )


@pytest.mark.parametrize(
    "method, teachers, notes",
    [
        ("latentbe", ["wrn10x1", "resnet20", "wrn10x1"], ["the teachers: their layers differ"]),
        ("latentbe", ["wrn10x1", "wrn10x2", "wrn10x1"], ["the teachers: their layers differ"]),
    ],
)
def test_what_has_no_kernels_runs_through_the_modules(method, teachers, notes):
    truth, ours = both(teachers_of(*teachers), student_of(method))
    assert ours.notes == notes
    x = images()
    assert_same(ours.teacher_logits(x), truth.teacher_logits(x.double()))
    assert_same(ours.student_logits(x), truth.student_logits(x.double()))
    gradient = ours.divergence_gradient(x, (1, 2), with_student=True)
    assert_same(gradient, truth.divergence_gradient(x.double(), (1, 2), with_student=True), 1e-3)


def renamed(classifier: Classifier) -> Classifier:
    return classifier.around(nn.Sequential(classifier.network))


def with_eps(classifier: Classifier) -> Classifier:
    for module in classifier.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    return classifier


@pytest.mark.parametrize("change", [renamed, with_eps])
def test_teachers_that_differ_by_names_or_eps_do_not_share_slots(change):
    teachers = Teachers([small_classifier(1), change(small_classifier(2))], K)
    truth, ours = both(teachers, student_of("kd"))
    assert ours.notes == ["the teachers: their layers differ"]
    assert_same(ours.teacher_logits(images := torch.rand(B, 3, SIZE, SIZE)), truth.teacher_logits(images.double()))


class NormBehindSum(nn.Module):
    """Trains by kernels; in evaluation its last norm, which has no ReLU, folds into nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.norm2, self.linear = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, K)

    def forward(self, x):
        y = self.conv(x)
        return self.linear(self.norm2(self.conv2(self.norm(y).relu()) + y).mean((2, 3)))


def test_a_student_that_has_kernels_in_training_alone():
    student = build_student(
        Method.parse("latentbe"), lambda seed: Classifier(NormBehindSum(), [0.4] * 3, [0.3] * 3), E=E, seed=0
    )
    move_(student, 1)
    truth, ours = both(teachers_of(*["wrn10x1"] * 3), student)
    assert ours.training is not None and ours.frozen is not None and ours.frozen_student is None
    (note,) = ours.notes
    assert note.startswith("the student in evaluation mode: norm 'norm2'")
    x = images()
    gradient = ours.divergence_gradient(x, (1, 2), with_student=True)
    assert_same(gradient, truth.divergence_gradient(x.double(), (1, 2), with_student=True), 1e-3)
    assert_same(ours.student_logits(x), truth.student_logits(x.double()))


def max_pooled(side: int, seed: int) -> Classifier:
    stem = nn.Sequential(nn.Conv2d(3, 6, 7, 2, padding=3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(side, 2, 1))
    network = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K))
    move_(network, seed)
    return Classifier(network, [0.5] * 3, [0.25] * 3)


def test_another_max_pool_runs_through_the_modules():
    student = build_student(Method.parse("latentbe"), functools.partial(max_pooled, 2), E=2, seed=0)
    networks = KernelNetworks(Teachers([max_pooled(2, 1), max_pooled(2, 3)], K), student, "fp32", LibraryOperations())
    assert [note.split(":")[0] for note in networks.notes] == ["the student", "the teachers"]
    assert all("max-pool '0.3' (kernel_size 2, stride 2" in note for note in networks.notes)


@pytest.mark.parametrize("shown", ["clean", "confods", "tdiv", "tdiv-sdiv"])
def test_imagenet_s_stem_and_max_pool_run_through_the_kernels(shown):
    """All that `shown` asks of the networks, and so that a graph can hold its step."""
    student = build_student(Method.parse("latentbe"), functools.partial(max_pooled, 3), E=E, seed=0)
    move_(student, 7)
    truth, ours = both(Teachers([max_pooled(3, seed) for seed in range(E)], K), student)
    assert not ours.notes and not ours.asks_modules(shown)
    x = images()
    if shown == "clean":
        assert_same(ours.student_logits(x), truth.student_logits(x.double()))
        assert_same(ours.teacher_logits(x), truth.teacher_logits(x.double()))
    elif shown == "confods":
        w_BK, tau = torch.rand(B, K), 1e3
        mine, right = ours.ods_gradient(x, 1, w_BK, tau), truth.ods_gradient(x.double(), 1, w_BK.double(), tau)
        for one, other in zip(mine, right, strict=True):
            assert_same(one, other, 1e-3)
    else:
        gradient = ours.divergence_gradient(x, (1, 0), with_student=shown == "tdiv-sdiv")
        assert_same(gradient, truth.divergence_gradient(x.double(), (1, 0), with_student=shown == "tdiv-sdiv"), 1e-3)


@pytest.mark.parametrize("method", ["ce", "kd+gaussian", "be+confods", "latentbe+tdiv-sdiv", "hydra+tdiv-sdiv"])
def test_steps_by_the_library_are_the_steps(method):
    state, config = small_state(method)
    start = copy.deepcopy(state.student)
    ours = KernelNetworks(state.networks.teachers, copy.deepcopy(start), "fp32", LibraryOperations())
    other = State(networks=ours, optimizer=make_optimizer(ours.student, 5e-4))
    for _ in range(3):
        batch = small_batch()
        a, b = (train_step(s, config, *batch, lr=0.02) for s in (state, other))
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)
    moved = torch.cat([(p - q).flatten() for p, q in zip(state.student.parameters(), start.parameters(), strict=True)])
    for parameter, right in zip(other.student.parameters(), state.student.parameters(), strict=True):
        assert float((parameter - right).detach().abs().max()) < 0.02 * float(moved.detach().abs().max())
    for buffer, right in zip(other.student.buffers(), state.student.buffers(), strict=True):
        torch.testing.assert_close(buffer, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "hydra+tdiv-sdiv"])
def test_a_step_by_kernels_is_the_step(method, device):
    """The whole step, augmentation to update, on the smallest images; the interpreter takes a minute."""
    state, config = small_state(method, E=2)
    student = copy.deepcopy(state.student).to(device)
    teachers = copy.deepcopy(state.networks.teachers).to(device)
    ours = KernelNetworks(teachers, student, "fp32", TritonOperations())
    other = State(networks=ours, optimizer=make_optimizer(student, 5e-4))
    images_BHWC, labels_B = small_batch(2, 8)
    right = train_step(state, config, images_BHWC, labels_B, lr=0.02)
    measures = train_step(other, config, images_BHWC.to(device), labels_B.to(device), lr=0.02)
    for name, value in right.items():
        torch.testing.assert_close(measures[name].cpu(), value, rtol=1e-4, atol=1e-5)
    for parameter, wanted in zip(student.parameters(), state.student.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach().cpu(), wanted.detach(), rtol=1e-3, atol=1e-4)


def test_make_networks_by_backend():
    teachers, student, cpu = teachers_of("wrn10x1"), student_of("kd"), torch.device("cpu")
    assert type(make_networks("reference", teachers, student, "fp32", cpu)) is Networks
    assert type(make_networks("auto", teachers, student, "fp32", cpu)) is Networks
    made = make_networks("library", teachers, student, "bf16", cpu)
    assert isinstance(made, KernelNetworks) and made.dtype == torch.bfloat16 and made.kernel is False


class _Times(TuningTable):
    """A convolution takes 10 µs, one with a prologue `folded` µs more; the pass over a norm takes 5 µs."""

    def __init__(self, folded: float) -> None:
        super().__init__(None, {})
        self.folded = folded

    def get(self, key):
        microseconds = 5.0 if str(key).startswith("norm") else 10.0
        if "prologue" in str(key):
            microseconds += self.folded
        one = Measured(candidate=Candidate(provider="library"), microseconds=microseconds, spread=0.0)
        return Choice(candidate=one.candidate, measured=(one,), floor_share=None)


@pytest.mark.parametrize("folded, expected", [(2.0, True), (3.0, False)])
def test_a_norm_is_folded_where_that_was_measured_faster(folded, expected):
    y, w = torch.empty(2, 4, 8, 8, 16, device="meta"), torch.empty(2, 3, 3, 16, 16, device="meta")
    reader = Reader(w, y, {"stride": 1, "bias": None, "residual": None, "sums": True})
    operations = TunedOperations(_Times(folded))  # forward and weight gradient both pay for the prologue
    assert operations.folds_norm(y, [reader], torch.device("cuda")) is expected
    assert not operations.folds_norm(y, [reader], torch.device("cpu"))


def test_every_norm_that_can_be_folded_is_asked_about():
    asked = []

    class Asking(LibraryOperations):
        def folds_norm(self, y_MBHWC, readers, device):
            asked.append((tuple(y_MBHWC.shape), [tuple(reader.w_EKKIO.shape) for reader in readers]))
            return True

    student = student_of("latentbe")
    truth, ours = both(teachers_of(*["wrn10x1"] * 3), student, Asking())
    x = images()
    assert_same(ours.student_logits(x), truth.student_logits(x.double()))
    # norm1 and norm2 of three blocks; the last norm is the pool's
    assert len(asked) == 6
    assert asked[0] == ((E, B, 9, 9, 16), [(E, 3, 3, 16, 16)])
    assert asked[3] == ((E, B, 5, 5, 32), [(E, 3, 3, 32, 32)])
    ours.student_logits(x)
    assert len(asked) == 6


def test_the_pair_of_a_step_is_the_same_for_every_backend():
    state, config = small_state("latentbe+tdiv-sdiv")
    pairs = []

    class Watching(KernelNetworks):
        def divergence_gradient(self, x_BCHW, pair, *, with_student, z_BHWC=None):
            pairs.append(pair)
            return super().divergence_gradient(x_BCHW, pair, with_student=with_student, z_BHWC=z_BHWC)

    state.networks = Watching(state.networks.teachers, state.student, "fp32", LibraryOperations())
    state.step = 5
    train_step(state, config, *small_batch(), lr=0.01)
    a, b = draw_pair(config.seed, 5, 3)
    assert [pair.tolist() for pair in pairs] == [
        [a, a + 3, b, b + 3]
    ]  # of the teachers, and of the student behind them

"""Teachers that train together against each of them trained alone: by modules, by the library, by the kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import TwoNorms, foreign_network, move_, network_of
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.config.methods import Method
from ensdistill.engine.networks import Networks
from ensdistill.engine.operations import LibraryOperations, TritonOperations
from ensdistill.engine.structure import NotExpressible
from ensdistill.kernels.images.augment import augment
from ensdistill.kernels.philox import counter_of
from ensdistill.models import Classifier
from ensdistill.models.students import PlainStudent
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, train_step
from ensdistill.training.together import MemberLosses, TeachersInTraining, member_losses

E, B, SIZE, K = 3, 5, 9, 10
SEED, PAD, DECAY = 3, 1, 1e-2
RATES = (0.05, 0.1, 0.02)


class FoldingLibrary(LibraryOperations):
    """Has every norm that can be applied by the convolutions that read it."""

    def folds_norm(self, *args) -> bool:
        return True


class PassingKernels(TritonOperations):
    """Has a pass of its own for every norm."""

    def folds_norm(self, *args) -> bool:
        return False


def classifiers_of(name: str, members: int = E) -> list[Classifier]:
    """Networks of one architecture whose every parameter and statistic differ, with a normalisation of their own."""
    networks: list[nn.Module] = [TwoNorms() if name == "two-norms" else network_of(name, t) for t in range(members)]
    for t, network in enumerate(networks):
        move_(network, 20 + t)
    return [Classifier(network, [0.4 + 0.1 * t] * 3, [0.3] * 3) for t, network in enumerate(networks)]


def batches_of(steps: int, members: int = E, size: int = SIZE, rows: int = B) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of each member's own, a step."""
    return [
        (
            torch.randint(0, 256, (members, rows, size, size, 3), dtype=torch.uint8),
            torch.randint(0, K, (members, rows)),
        )
        for _ in range(steps)
    ]


def train_alone(classifier: Classifier, member: int, batches: list[tuple[Tensor, Tensor]]):
    """The trained network, its momentum by name, and the measures of the steps."""
    student = PlainStudent(copy.deepcopy(classifier))
    state = State(networks=Networks(None, student, "fp32"), optimizer=make_optimizer(student, DECAY))
    config = StepConfig(method=Method.parse("ce"), seed=SEED + member, pad=PAD)
    measures = [
        train_step(state, config, images[member], labels[member], lr)
        for (images, labels), lr in zip(batches, RATES, strict=False)
    ]
    momentum = {n: state.optimizer.state[p]["momentum_buffer"] for n, p in student.classifier.named_parameters()}
    return student.classifier, momentum, measures


def train_together(teachers: TeachersInTraining, batches: list[tuple[Tensor, Tensor]], operations=None):
    """The same of the stacks: by modules, or by what `operations` computes."""
    device = teachers.stacked.pixel_mean.device
    dtype = next(teachers.parameters()).dtype
    passes = None if operations is None else teachers.passes(dtype=dtype, operations=operations)
    optimizer = make_optimizer(teachers.train(), DECAY)
    measures: list[MemberLosses] = []
    for step, ((images, labels), lr) in enumerate(zip(batches, RATES, strict=False)):
        counters = [counter_of(SEED + t, step, 0, images.device) for t in range(teachers.E)]
        rows = [augment(images[t], counters[t], pad=PAD, kernel=False)[0] for t in range(teachers.E)]
        x = torch.stack(rows).to(device).permute(0, 1, 4, 2, 3)
        logits = teachers(x) if passes is None else passes(teachers.normalised(x))
        losses = member_losses(logits, labels.to(device), teachers.parameters())
        losses.loss.backward()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        measures.append(losses)
    momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in teachers.stacked.named_parameters()}
    return momentum, measures


def assert_same(teachers, together, alone, tolerance: float) -> None:
    """Every member's parameters, statistics, momentum and measures, to `tolerance` of a tensor's largest value."""
    momentum, measures = together
    for t, (classifier, momentum_alone, measures_alone) in enumerate(alone):
        pairs = {
            name: (mine, classifier.state_dict()[name]) for name, mine in teachers.classifier(t).state_dict().items()
        }
        pairs |= {f"momentum of {name}": (momentum[name][t], right) for name, right in momentum_alone.items()}
        for step, (mine, right) in enumerate(zip(measures, measures_alone, strict=True)):
            pairs |= {
                f"{name} {step}": (getattr(mine, name)[t], right[name]) for name in ("loss_ce", "acc1", "loss_wd")
            }
        assert len(pairs) > 9
        for name, (mine, right) in pairs.items():
            assert mine.dtype == right.dtype, name
            scale = max(right.abs().max().item(), 1e-3)
            torch.testing.assert_close(
                mine.cpu(), right, rtol=0, atol=tolerance * scale, msg=lambda m, t=t, n=name: f"{t}, {n}: {m}"
            )


# Measured, three steps: at most 3e-13, by modules 2e-16.
@pytest.mark.parametrize("operations", [None, LibraryOperations(), FoldingLibrary()])
@pytest.mark.parametrize("name", ["wrn10x1", "resnet8", "two-norms", "preresnet20_cifar10", "narrow"])
def test_each_becomes_what_it_becomes_alone(name, operations):
    classifiers = [classifier.double() for classifier in classifiers_of(name)]
    teachers, batches = TeachersInTraining(classifiers), batches_of(3)
    alone = [train_alone(classifier, t, batches) for t, classifier in enumerate(classifiers)]
    assert_same(teachers, train_together(teachers, batches, operations), alone, 1e-11)


# Measured, three steps: at most 2.4e-6, by modules 4.9e-7, and 1.4e-6 where the weights lie as kernels read them.
@pytest.mark.parametrize("for_kernels", [False, True])
@pytest.mark.parametrize("operations", [None, LibraryOperations(), LibraryOperations(grouped=True), FoldingLibrary()])
@pytest.mark.parametrize("name", ["wrn10x1", "resnet8"])
def test_each_becomes_what_it_becomes_alone_in_fp32(name, operations, for_kernels):
    classifiers = classifiers_of(name)
    teachers, batches = TeachersInTraining(classifiers, for_kernels=for_kernels), batches_of(3)
    alone = [train_alone(classifier, t, batches) for t, classifier in enumerate(classifiers)]
    assert_same(teachers, train_together(teachers, batches, operations), alone, 2e-5)


def test_each_becomes_what_it_becomes_alone_by_the_kernels(device):
    classifiers = classifiers_of("wrn10x1", 2)
    teachers, batches = TeachersInTraining(classifiers, for_kernels=True), batches_of(2, 2, 6, 3)
    alone = [train_alone(classifier, t, batches) for t, classifier in enumerate(classifiers)]
    together = train_together(teachers.to(device), batches, TritonOperations())
    assert_same(teachers, together, alone, 1e-4)


def gradients_of(logits: Tensor, seeds: Tensor, parameters) -> list[Tensor]:
    return list(torch.autograd.grad((logits * seeds).sum(), list(parameters)))


@pytest.mark.parametrize("name", ["wrn10x1", "resnet8"])
def test_by_modules_it_is_the_same_arithmetic(name):
    classifiers = classifiers_of(name)
    teachers = TeachersInTraining(classifiers).train()
    x, seeds = torch.rand(E, B, SIZE, SIZE, 3).permute(0, 1, 4, 2, 3), torch.randn(E, B, K)
    logits = teachers(x)
    gradients = gradients_of(logits, seeds, teachers.parameters())
    for t, classifier in enumerate(classifiers):
        expected = classifier.train()(x[t])
        assert torch.equal(logits[t], expected)
        for mine, right in zip(gradients, gradients_of(expected, seeds[t], classifier.parameters()), strict=True):
            assert torch.equal(mine[t], right)
        for mine, right in zip(teachers.buffers(), classifier.buffers(), strict=True):
            assert torch.equal(mine[t], right)


# The library in the same type makes at most 1e-6 in fp32 and 2e-1 in bf16: tiny batches make the norms sensitive.
@pytest.mark.parametrize(
    ("operations", "dtype"),
    [(TritonOperations, torch.bfloat16), (PassingKernels, torch.float32), (PassingKernels, torch.bfloat16)],
)
def test_kernels_agree_with_the_modules(operations, dtype, device):
    classifiers = classifiers_of("resnet8" if operations is PassingKernels else "wrn10x1", 2)
    x, seeds = torch.rand(2, 3, 6, 7, 3).permute(0, 1, 4, 2, 3), torch.randn(2, 3, K)
    teachers = TeachersInTraining(classifiers, for_kernels=True).train()
    truth = copy.deepcopy(teachers).double()
    logits = truth(x.double())
    expected = [logits.detach(), *gradients_of(logits, seeds.double(), truth.parameters()), *truth.buffers()]

    def error(operations) -> float:
        trial = copy.deepcopy(teachers).to(device)
        logits = trial.passes(dtype=dtype, operations=operations)(trial.normalised(x.to(device)))
        found = [logits.detach(), *gradients_of(logits, seeds.to(device), trial.parameters()), *trial.buffers()]
        flat, right = (torch.cat([v.flatten().double().cpu() for v in group]) for group in (found, expected))
        return float((flat - right).norm() / right.norm())

    assert error(operations()) <= 2 * error(LibraryOperations()) + (1e-6 if dtype == torch.float32 else 1e-3)


class Shared(nn.Module):
    """A module in two places, and a weight that two modules have."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, K)
        self.again, self.other.weight = self.first, self.first.weight

    def forward(self, x):
        return self.last(self.other(self.again(self.first(x.mean((2, 3))).relu()).relu()))


def test_modules_and_weights_in_two_places_stay_the_members_own():
    torch.manual_seed(0)
    classifiers = [Classifier(Shared(), [0.4] * 3, [0.3] * 3) for _ in range(E)]
    teachers, x = TeachersInTraining(classifiers), torch.rand(E, B, 3, SIZE, SIZE)
    expected = torch.stack([classifier(own) for classifier, own in zip(classifiers, x, strict=True)])
    for _ in range(2):  # and again, from what the first call left
        torch.testing.assert_close(teachers(x), expected)
    teachers(x).sum().backward()
    expected.sum().backward()
    for m, classifier in enumerate(classifiers):
        for name, parameter in classifier.named_parameters():
            torch.testing.assert_close(teachers.stacked.get_parameter(name).grad[m], parameter.grad)


@pytest.mark.parametrize("by", ["modules", "library"])
def test_members_have_nothing_to_do_with_each_other(by):
    teachers = TeachersInTraining(classifiers_of("wrn10x1")).train()
    x = torch.rand(E, B, 3, SIZE, SIZE)
    passes = teachers.passes(dtype=torch.float32, operations=LibraryOperations())
    run = teachers if by == "modules" else lambda x: passes(teachers.normalised(x))
    before = run(x)
    gradients = gradients_of(before[1], torch.ones(B, K), teachers.parameters())
    for gradient in gradients:
        assert gradient[1].any() and not gradient[0].any() and not gradient[2].any()
    x[0], x[2] = x[0].flip(-1) * 0.5, float("nan")
    after = run(x)
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0]) and after[2].isnan().all()


def test_images_of_all_members_and_chosen_members():
    classifiers = classifiers_of("wrn10x1")
    teachers = TeachersInTraining(classifiers).eval()
    x = torch.rand(B, 3, SIZE, SIZE)
    expected = torch.stack([classifier.eval()(x) for classifier in classifiers])
    torch.testing.assert_close(teachers(x), expected)
    torch.testing.assert_close(teachers(x, members=(2, 0)), expected[[2, 0]])
    torch.testing.assert_close(teachers(torch.stack([x, x]), members=[1, 2]), expected[1:])
    torch.testing.assert_close(teachers.shipped().eval()(x), expected.softmax(-1).mean(0).log())


def test_passes_take_images_of_all_members():
    classifiers = [classifiers_of("resnet8", 1)[0].around(network_of("resnet8", t)).double() for t in range(E)]
    teachers = TeachersInTraining(classifiers).train()
    passes = teachers.passes(dtype=torch.float64, operations=LibraryOperations())
    z_EBHWC = teachers.normalised(torch.rand(B, 3, SIZE, SIZE, dtype=torch.float64))
    assert z_EBHWC.shape == (E, B, SIZE, SIZE, 3) and torch.equal(z_EBHWC[0], z_EBHWC[2])
    seeds = torch.randn(E, B, K, dtype=torch.float64)
    expected, logits = passes(z_EBHWC), passes(z_EBHWC[0])
    torch.testing.assert_close(logits, expected)
    for mine, right in zip(*(gradients_of(y, seeds, teachers.parameters()) for y in (logits, expected)), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("for_kernels", [False, True])
def test_a_member_is_the_network_it_was(for_kernels):
    classifiers = classifiers_of("wrn10x1")
    teachers = TeachersInTraining(classifiers, for_kernels=for_kernels)
    tensors = len(list(classifiers[0].parameters()))
    assert len(list(teachers.parameters())) == len(teachers.shared()) == tensors and not teachers.factors()
    for t, classifier in enumerate(classifiers):
        member = teachers.classifier(t)
        assert type(member.network) is type(classifier.network)
        named = dict([*member.named_parameters(), *member.named_buffers()])
        for name, right in [*classifier.named_parameters(), *classifier.named_buffers()]:
            assert torch.equal(named[name], right) and named[name].stride() == right.stride(), name
            assert named[name].requires_grad == right.requires_grad
        with torch.no_grad():
            next(member.parameters()).zero_()
        assert next(teachers.classifier(t).parameters()).any(), "a copy shares nothing"
    teachers.load(1, classifiers[2])
    for stack in (*teachers.parameters(), *teachers.buffers()):
        assert torch.equal(stack[1], stack[2])
    assert torch.equal(teachers.classifier(0).state_dict()["network.stem.weight"], classifiers[0].network.stem.weight)


def test_its_state_is_a_state_dict():
    teachers, other = (TeachersInTraining(classifiers_of("wrn10x1")[i : i + 2], for_kernels=i > 0) for i in (0, 1))
    other.load_state_dict(teachers.state_dict())
    for mine, right in zip(other.stacked.state_dict().values(), teachers.stacked.state_dict().values(), strict=True):
        assert torch.equal(mine, right)


def test_networks_that_differ_are_refused():
    wide, classifier = classifiers_of("resnet18", 1)[0], classifiers_of("wrn10x1", 1)[0]
    with pytest.raises(ValueError, match="member 1: expected the modules of member 0, got ResNet"):
        TeachersInTraining([classifier, wide])
    with pytest.raises(ValueError, match=r"member 0's network.conv1.weight: expected .* got none"):
        TeachersInTraining([wide]).load(0, classifier)
    with pytest.raises(ValueError, match=r"member 0's network.stem.weight: expected .*float32.* got .*float64"):
        TeachersInTraining([classifier]).load(0, copy.deepcopy(classifier).double())
    with pytest.raises(ValueError, match="classifiers: expected at least one"):
        TeachersInTraining([])


def test_what_kernels_cannot_express_trains_by_modules():
    classifiers = [Classifier(foreign_network(4), [0.5], [0.25]) for _ in range(2)]
    teachers = TeachersInTraining(classifiers).train()
    with pytest.raises(NotExpressible, match="SiLU"):
        teachers.passes(dtype=torch.float32, operations=LibraryOperations())
    x, seeds = torch.rand(2, B, 1, 8, 8), torch.randn(2, B, K)
    gradients = gradients_of(teachers(x), seeds, teachers.parameters())
    for t, classifier in enumerate(classifiers):
        expected = gradients_of(classifier.train()(x[t]), seeds[t], classifier.parameters())
        for mine, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine[t], right)


def test_losses():
    logits = torch.randn(E, B, K, requires_grad=True)
    labels = torch.randint(0, K, (E, B))
    stacks = [torch.randn(E, 4, 3), torch.randn(E, 7, requires_grad=True)]
    losses = member_losses(logits, labels, stacks)
    expected = torch.stack([F.cross_entropy(member, own) for member, own in zip(logits, labels, strict=True)])
    torch.testing.assert_close(losses.loss_ce, expected.detach())
    torch.testing.assert_close(losses.loss, expected.sum())
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (losses.loss, expected.sum())))
    right = (logits.argmax(-1) == labels).float().mean(1)
    torch.testing.assert_close(losses.acc1, right)
    torch.testing.assert_close(losses.loss_wd, sum(v.detach().flatten(1).square().sum(1) for v in stacks) / 2)
    assert not any(v.requires_grad for v in losses[1:]) and all(v.shape == (E,) for v in losses[1:])
    half = member_losses(logits.detach().bfloat16(), labels, stacks)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss_ce, expected.detach(), rtol=0, atol=0.05)


def test_losses_refuse_what_does_not_fit():
    logits, labels = torch.randn(E, B, K), torch.zeros(E, B, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits_EBK: expected logits \(E, B, K\)"):
        member_losses(logits[0], labels, [])
    with pytest.raises(ValueError, match=rf"labels_EB: expected int64 \({E}, {B}\)"):
        member_losses(logits, labels[0], [])
    with pytest.raises(ValueError, match="parameters: expected stacks of 3"):
        member_losses(logits, labels, [torch.ones(2, 4)])

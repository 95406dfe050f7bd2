"""Hydra's trunk and heads through member-batched passes against the student itself: a trunk once, heads as members."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from networks import K, move_, small_classifier
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.engine import networks as networks_module
from ensdistill.engine.member_training import trunk_and_heads
from ensdistill.engine.networks import KernelNetworks, Networks
from ensdistill.engine.operations import LibraryOperations, Operations, TritonOperations
from ensdistill.engine.structure import NotExpressible, cut, frozen_layers, structure_of
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.models import Classifier
from ensdistill.models.ensembles import Teachers
from ensdistill.models.layers import BatchNorm2d
from ensdistill.models.resnet import CifarResNet
from ensdistill.models.students import HydraStudent
from ensdistill.models.wide_resnet import WideResNet
from ensdistill.runtime.environment import Precision

SIZE = 9


class Small(nn.Module):
    """A residual network of two blocks; `head` says where its head begins."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), BatchNorm2d(8)
        self.blocks = nn.ModuleList(_Block(8) for _ in range(2))
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        trunk, head = self.split_head()
        return head(trunk(x))

    def split_head(self) -> tuple[nn.Module, nn.Module]:
        stem = [self.stem, self.norm, nn.ReLU()]
        if "max-pool" in self.head:
            stem.append(MaxPool() if "function" in self.head else nn.MaxPool2d(3, 2, 1))
        body = [*stem, *self.blocks]
        end = [self.pool, nn.Flatten(), self.linear]
        first = {"stem": 0, "norm": 1, "relu": 2, "last block": len(body) - 1, "pool": len(body), "max-pool": 3}
        first |= {"function max-pool": 3, "block": 3, "block behind max-pool": 4}
        return nn.Sequential(*body[: first[self.head]]), nn.Sequential(*body[first[self.head] :], *end)


class MaxPool(nn.Module):
    """A max-pool that is no module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)


class LateHead(WideResNet):
    """Pre-activation blocks and their last norm in the trunk: the classifier alone is the head."""

    def split_head(self) -> tuple[nn.Module, nn.Module]:
        return nn.Sequential(self.stem, self.blocks, self.norm, nn.ReLU()), nn.Sequential(self.pool, self.linear)


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 1, bias=False), BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + x).relu()


def classifier_of(network: str, seed: int) -> Classifier:
    """A network by name; `small NAME` is `Small(NAME)`."""
    own = {"resnet8": lambda: CifarResNet(8, 1, K), "late head": lambda: LateHead(10, 1, K)}
    if network.startswith("small "):
        own[network] = lambda: Small(network.removeprefix("small "))
    if network not in own:
        return small_classifier(seed, network)
    classifier = Classifier(own[network](), [0.4] * 3, [0.3] * 3)
    move_(classifier, seed)
    return classifier


def student_of(network: str, E: int) -> HydraStudent:
    return HydraStudent([classifier_of(network, 10 + m) for m in range(E)])


def networks_of(student: HydraStudent) -> list[nn.Module]:
    return [nn.Sequential(student.trunk.network, head) for head in student.heads]


def teachers_of(E: int) -> Teachers:
    return Teachers([small_classifier(100 + t) for t in range(E)], K)


def passes(networks: Networks, x: Tensor, seeds: Tensor, *, on_device: bool = False) -> dict[str, Tensor]:
    """All that a step asks of a student. Its statistics advance."""
    pair = (1, 0)
    members = torch.tensor(pair, device=x.device) if on_device else pair
    image_gradient = networks._student_divergence(x, members, None)
    logits = networks.student_logits(x)
    parameters = list(networks.student.parameters())
    gradients = torch.autograd.grad((logits * seeds).sum(), parameters)
    return {
        "image gradient": image_gradient,
        "logits": logits.detach(),
        **{f"gradient {name}": g for (name, _), g in zip(networks.student.named_parameters(), gradients, strict=True)},
        **{f"buffer {name}": b.clone() for name, b in networks.student.named_buffers()},
    }


NOTES = {
    "small norm": [
        "the student in evaluation mode: norm '1.0' does not end in a ReLU alone that convolutions alone read"
    ]
}
"""What is said of networks of which a part runs through the modules."""


class Folding(LibraryOperations):
    """Applies every norm that it can where the next convolution loads."""

    def folds_norm(self, *_: object) -> bool:
        return True

    def folds_second(self, *_: object) -> bool:
        return True


@pytest.mark.parametrize("operations", [LibraryOperations(), Folding()], ids=["apart", "folded"])
@pytest.mark.parametrize(
    "network",
    [
        "wrn10x1",
        "resnet8",
        "late head",
        "small norm",
        "small relu",
        "small block",
        "small last block",
        "small pool",
        "small max-pool",
        "small function max-pool",
        "small block behind max-pool",
    ],
)
def test_float64_is_exact(network: str, operations: Operations, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks_module, "dtype_of", lambda precision: torch.float64)
    E, B = 3, 4
    student, teachers = student_of(network, E).double(), teachers_of(E).double()
    truth = Networks(copy.deepcopy(teachers), copy.deepcopy(student), "fp32")
    ours = KernelNetworks(teachers, student, "fp32", operations)
    assert ours.notes == NOTES.get(network, []) and ours.asks_modules("tdiv-sdiv") == bool(ours.notes)
    x, seeds = torch.rand(B, 3, SIZE, SIZE, dtype=torch.float64), torch.randn(E, B, K, dtype=torch.float64)
    expected = passes(truth, x, seeds)
    for name, value in passes(ours, x, seeds, on_device=not ours.notes).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            value, expected[name], rtol=1e-8, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("network", "precision"),
    [("wrn10x1", "fp32"), ("wrn10x1", "bf16"), ("resnet8", "fp32"), ("resnet8", "bf16"), ("late head", "fp32")],
)
def test_kernels_are_as_good_as_the_library(network: str, precision: Precision, device: torch.device) -> None:
    E, B = 2, 2
    student, teachers = student_of(network, E), teachers_of(E)
    x, seeds = torch.rand(B, 3, SIZE, SIZE), torch.randn(E, B, K)
    exact = Networks(None, copy.deepcopy(student).double(), "fp32")
    truth = passes(exact, x.double(), seeds.double())

    def errors(operations: Operations) -> dict[str, float]:
        copies = (copy.deepcopy(module).to(device) for module in (teachers, student))
        networks = KernelNetworks(*copies, precision, operations)  # type: ignore[arg-type, misc]
        ours = passes(networks, x.to(device), seeds.to(device), on_device=True)
        kinds = {name.partition(" ")[0] for name in ours}
        return {kind: difference([(ours[n], truth[n]) for n in ours if n.startswith(kind)]) for kind in kinds}

    kernels, library = (errors(kind()) for kind in (TritonOperations, LibraryOperations))
    for kind in kernels:
        assert kernels[kind] <= 2 * library[kind] + (1e-6 if precision == "fp32" else 1e-3), (kind, kernels, library)


def test_the_trunk_runs_once_for_all_heads() -> None:
    seen: Counter[tuple[int, int]] = Counter()

    class Counting(LibraryOperations):
        def __call__(self, operation, /):  # type: ignore[no-untyped-def]
            def counted(x, w, /, **options):  # type: ignore[no-untyped-def]
                out = operation.library(x, w, **options)
                seen[w.shape[-1], len(w if (members := options.get("members")) is None else members)] += 1
                return out

            return counted if operation is member_conv else super().__call__(operation)

    networks = KernelNetworks(teachers_of(3), student_of("wrn10x1", 3), "fp32", Counting())
    x = torch.rand(2, 3, SIZE, SIZE)
    trunk = {(16, 1): 3, (32, 1): 3}  # the stem and a block; a block and its shortcut
    networks._student_divergence(x, (2, 0), None)
    assert seen == trunk | {(64, 2): 3, (K, 2): 1}
    seen.clear()
    networks.student_logits(x)
    assert seen == trunk | {(64, 3): 3, (K, 3): 1}


def test_heads_are_cut_behind_the_one_value_that_they_read() -> None:
    whole = structure_of(networks_of(student_of("wrn10x1", 1))[0])
    trunk, head = cut(whole, "0.", "1.")
    assert trunk.layers + head.layers == tuple(sorted(whole.layers, key=lambda layer: layer.name.startswith("1.")))
    assert trunk.features == head.given == trunk.layers[-1].target and trunk.linear is None
    assert [norm.name for norm in head.entries] == ["1.0.norm1"] and trunk.entries == ()
    assert "1.0.norm1" not in {layer.norm or layer.second for layer in frozen_layers(head)}  # its readers apply it


class TwoValues(Small):
    """Its trunk gives the block's value and the block's input."""

    def split_head(self) -> tuple[nn.Module, nn.Module]:
        return _Both(self), _OfBoth(self)


class _Both(nn.Module):
    def __init__(self, network: Small) -> None:
        super().__init__()
        self.stem, self.norm, self.block = network.stem, network.norm, network.blocks[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.stem(x)).relu()
        return self.block(y), y


class _OfBoth(nn.Module):
    def __init__(self, network: Small) -> None:
        super().__init__()
        self.block, self.linear = network.blocks[1], network.linear

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        y, x = both
        return self.linear((self.block.conv2(y) + x).mean((2, 3)))


def with_eps(classifier: Classifier) -> Classifier:
    """With a last norm that is not what it was."""
    classifier.network.norm.eps = 0.1
    return classifier


def reordered(classifier: Classifier) -> Classifier:
    """With weights that lie otherwise in memory."""
    return classifier.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("classifiers", "why"),
    [
        ([Classifier(TwoValues("block"), [0.5], [0.5])], "its heads read something else than one image of the trunk's"),
        ([classifier_of("small stem", 0)], "its heads read something else than one image of the trunk's"),
        ([small_classifier(0), with_eps(small_classifier(1))], "its heads differ"),
        ([small_classifier(0), reordered(small_classifier(1))], "its heads differ"),
    ],
    ids=["two values", "the images", "another head", "another order in memory"],
)
def test_what_cannot_be_cut_is_refused(classifiers: list[Classifier], why: str) -> None:
    with pytest.raises(NotExpressible, match=why):
        trunk_and_heads(networks_of(HydraStudent(classifiers)), dtype=torch.float32, operations=LibraryOperations())


def difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Relative error of all in one, in its norm."""
    ours, right = (torch.cat([pair[i].flatten().double().cpu() for pair in pairs]) for i in (0, 1))
    return float((ours - right).norm() / right.norm())

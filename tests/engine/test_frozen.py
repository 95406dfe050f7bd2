"""Frozen networks against their modules: in float64 through the library, in fp32 and bf16 through the kernels."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from networks import ResidualFirst, move_, network_of, small_classifier
from torch import nn

from ensdistill.engine.frozen import FrozenNetworks
from ensdistill.engine.operations import LibraryOperations, TritonOperations
from ensdistill.engine.structure import NotExpressible, structure_of
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.models.batch_ensemble import member_network, to_batch_ensemble

K, SIZE = 10, 9


def slots_of(network: nn.Module, slots: int, dtype: torch.dtype, operations) -> FrozenNetworks:
    return FrozenNetworks(network, slots, structure=structure_of(network), dtype=dtype, operations=operations)


def frozen_of(networks: list[nn.Module], dtype: torch.dtype, operations) -> FrozenNetworks:
    frozen = slots_of(networks[0], len(networks), dtype, operations)
    for slot, network in enumerate(networks):
        assert frozen.load(network, slot) == slot + 1
    return frozen


def truth(networks, x_BHWC, members, seeds_MBK):
    """Logits of the members and the image gradient of Σ seeds · logits of the first of them, by autograd."""
    x = x_BHWC.clone().requires_grad_()
    logits = torch.stack([networks[m](x.permute(0, 3, 1, 2)) for m in members])
    (gradient,) = torch.autograd.grad((logits[: len(seeds_MBK)] * seeds_MBK).sum(), x)
    return logits.detach(), gradient


class Folding(LibraryOperations):
    """Stores no second output that its readers can apply."""

    def folds_second(self, kept, folded, device) -> bool:
        return True


@pytest.mark.parametrize("operations", [LibraryOperations(), Folding()], ids=["stored", "folded"])
@pytest.mark.parametrize(
    "name",
    [
        "wrn10x1",
        "wrn16x1",
        "resnet8",
        "resnet18",
        "resnet50",
        "preresnet20_cifar10",
        "resnet20_cifar10",
        "resnet18_of_pytorchcv",
        "pooled",
    ],
)
def test_float64_is_exact(name, operations):
    check_float64(name, operations)


@pytest.mark.parametrize("name", ["imagenet18", "imagenet50"])
def test_float64_is_exact_of_imagenet_s_resnets(name):
    check_float64(name, LibraryOperations())


def check_float64(name, operations):
    networks = [network_of(name, seed).double() for seed in range(3)]
    frozen = frozen_of(networks, torch.float64, operations)
    x = torch.randn(2, SIZE, SIZE, 3, dtype=torch.float64)
    members, seeds = torch.tensor([2, 0, 1, 2]), torch.randn(2, 2, K, dtype=torch.float64)
    expected, expected_gradient = truth(networks, x, members, seeds)
    logits, kept = frozen.forward(x, members, bits=2)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    gradient = frozen.input_gradient(kept, seeds, members[:2])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-9 * expected_gradient.abs().max().item())
    torch.testing.assert_close(frozen.forward(x)[0], truth(networks, x, range(3), seeds)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["wrn10x1", "resnet8", "narrow"])
def test_kernels_agree_with_the_modules(name, dtype, device):
    networks = [network_of(name, seed).double() for seed in range(2)]
    x = torch.randn(2, SIZE, SIZE, 3, dtype=torch.float64)
    members, seeds = torch.tensor([1, 0]), torch.randn(1, 2, K, dtype=torch.float64)
    expected, expected_gradient = truth(networks, x, members, seeds)

    def errors(operations):
        frozen = frozen_of([network.float().to(device) for network in networks], dtype, operations)
        logits, kept = frozen.forward(x.float().to(device), members.to(device), bits=1)
        gradient = frozen.input_gradient(kept, seeds.float().to(device), members[:1].to(device))
        assert logits.dtype == gradient.dtype == torch.float32
        pairs = ((logits, expected), (gradient, expected_gradient))
        return [float((ours.cpu() - right).norm() / right.norm()) for ours, right in pairs]

    # the library in the same type makes 1e-7 and 5e-7 in fp32, 5e-3 and 2e-2 in bf16
    for ours, library in zip(errors(TritonOperations()), errors(LibraryOperations()), strict=True):
        assert ours <= 2 * library + (1e-6 if dtype == torch.float32 else 1e-3)


def test_members_of_a_student_fold_into_slots():
    network = network_of("wrn10x1", 0)
    student = to_batch_ensemble(network, 3).double()
    move_(student, 5)
    student.eval()
    frozen = slots_of(network.double(), 5, torch.float64, LibraryOperations())
    teachers = [network_of("wrn10x1", seed).double() for seed in (7, 8)]
    for slot, teacher in enumerate(teachers):
        frozen.load(teacher, slot)
    assert frozen.load(student, 2) == 5
    x = torch.randn(2, SIZE, SIZE, 3, dtype=torch.float64)
    expected = [net(x.permute(0, 3, 1, 2)) for net in (*teachers, *(member_network(student, m) for m in range(3)))]
    torch.testing.assert_close(frozen.forward(x)[0], torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_convolutions_that_all_have_biases():
    def plain(seed: int) -> nn.Module:
        first, second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 1, stride=2)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K))
        network = nn.Sequential(first, nn.BatchNorm2d(5), nn.ReLU(), second, nn.BatchNorm2d(4), nn.ReLU(), *head)
        move_(network, seed)
        return network.double().eval()

    networks = [plain(0), plain(1)]
    frozen = frozen_of(networks, torch.float64, LibraryOperations())
    x, seeds = torch.randn(2, SIZE, 4, 3, dtype=torch.float64), torch.randn(2, 2, K, dtype=torch.float64)
    expected, expected_gradient = truth(networks, x, [0, 1], seeds)
    logits, kept = frozen.forward(x, bits=2)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(frozen.input_gradient(kept, seeds), expected_gradient)


@pytest.mark.parametrize("operations", [LibraryOperations(), Folding()], ids=["stored", "folded"])
def test_sums_may_read_a_value_first(operations):
    networks = [ResidualFirst().double().eval() for _ in range(2)]
    for seed, network in enumerate(networks):
        move_(network, seed)
    frozen = frozen_of(networks, torch.float64, operations)
    x, members = torch.randn(2, SIZE, 4, 3, dtype=torch.float64), torch.tensor([1, 0, 1])
    seeds = torch.randn(2, 2, K, dtype=torch.float64)
    expected, expected_gradient = truth(networks, x, members, seeds)
    logits, kept = frozen.forward(x, members, bits=2)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(frozen.input_gradient(kept, seeds, members[:2]), expected_gradient)


@pytest.mark.parametrize("name", ["wrn10x1", "resnet8"])
def test_layers_that_members_share_fold_into_every_slot(name):
    network = network_of(name, 0)
    shared = ["blocks.0.conv1", "stem"] if name == "wrn10x1" else ["layer1.*", "fc"]
    student = to_batch_ensemble(network, 3, keep_shared=shared).double()
    move_(student, 5)
    student.eval()
    frozen = slots_of(network.double(), 3, torch.float64, LibraryOperations())
    assert frozen.load(student, 0) == 3
    x = torch.randn(2, SIZE, SIZE, 3, dtype=torch.float64)
    expected = [member_network(student, m)(x.permute(0, 3, 1, 2)) for m in range(3)]
    torch.testing.assert_close(frozen.forward(x)[0], torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_images_of_their_own_have_gradients_of_their_own():
    networks = [network_of("wrn10x1", seed).double() for seed in range(2)]
    frozen = frozen_of(networks, torch.float64, LibraryOperations())
    x = torch.randn(2, 3, SIZE, SIZE, 3, dtype=torch.float64)
    seeds = torch.randn(2, 3, K, dtype=torch.float64)
    logits, kept = frozen.forward(x, bits=2)
    gradient = frozen.input_gradient(kept, seeds)
    for m in range(2):
        expected, expected_gradient = truth([networks[m]], x[m], [0], seeds[m : m + 1])
        torch.testing.assert_close(logits[m], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient[m], expected_gradient, rtol=1e-7, atol=1e-9)


def test_only_bits_are_kept():
    frozen = frozen_of([network_of("wrn10x1", 0)], torch.float32, LibraryOperations())
    _, kept = frozen.forward(torch.randn(4, SIZE, SIZE, 3), bits=1)
    assert {tensor.dtype for tensor in kept.bits.values()} == {torch.uint8}
    relus = sum(isinstance(module, nn.BatchNorm2d) for module in network_of("wrn10x1", 0).modules())
    assert len(kept.bits) == relus


@pytest.mark.parametrize("name", ["wrn10x1", "resnet8"])
def test_nothing_outlives_a_pass(name):
    frozen = frozen_of([network_of(name, 0)], torch.float32, LibraryOperations())
    gc.collect()
    gc.disable()  # a cycle would hold the device's memory until it is collected
    try:
        _, kept = frozen.forward(torch.randn(2, SIZE, SIZE, 3), bits=1)
        bits = [weakref.ref(tensor) for tensor in kept.bits.values()]
        frozen.input_gradient(kept, torch.randn(1, 2, K))
        del kept
        assert bits and not any(tensor() is not None for tensor in bits)
    finally:
        gc.enable()


def test_second_outputs_beside_a_residual_are_not_stored():
    """wrn16x1's shortcuts read y: the first convolution of its six blocks can read y too. The pool alone needs a z."""
    seen = []

    class Watching(Folding):
        def __call__(self, operation, /):
            def watched(x, w, /, **options):
                out = operation.library(x, w, **options)
                seen.append((options.get("prologue") is not None, options.get("second") is not None, out.z is not None))
                return out

            return watched if operation is member_conv else super().__call__(operation)

    frozen = frozen_of([network_of("wrn16x1", 0)], torch.float32, Watching())
    x = torch.randn(2, SIZE, SIZE, 3)
    for bits in (0, 1):
        seen.clear()
        frozen.forward(x, bits=bits)
        kinds = Counter(seen[:-1])  # without the linear layer
        assert kinds[True, False, False] == 6
        assert kinds[False, True, True] == 1
        assert kinds[False, True, False] == (6 if bits else 0)  # bits of z, without z


class NormBehindSum(nn.Module):
    """Its last norm, which has no ReLU, folds into nothing; training has a form for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1)
        self.norm, self.other, self.linear = nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.Linear(5, K)

    def forward(self, x):
        y = self.conv(x)
        return self.linear(self.other(self.last(self.norm(y).relu()) + y).mean((2, 3)))


def test_networks_without_a_form_are_refused():
    network = NormBehindSum()
    with pytest.raises(NotExpressible, match="norm 'other' neither folds into"):
        slots_of(network, 1, torch.float32, LibraryOperations())


def test_a_classifier_is_not_normalised_twice():
    classifier = small_classifier(3, size=SIZE).eval()
    frozen = frozen_of([classifier.network], torch.float32, LibraryOperations())
    x = torch.rand(2, SIZE, SIZE, 3)
    logits, _ = frozen.forward((x - 0.4) / 0.3)
    torch.testing.assert_close(logits[0], classifier(x.permute(0, 3, 1, 2)), rtol=1e-4, atol=1e-4)

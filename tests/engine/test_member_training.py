"""The student's training passes against its modules and autograd: float64 by the library, fp32 and bf16 by kernels."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from networks import Pooled, ResidualFirst, TwoNorms, folding, move_, network_of
from torch import nn

from ensdistill.engine.member_training import MemberTraining
from ensdistill.engine.operations import LibraryOperations, TritonOperations
from ensdistill.engine.structure import NotExpressible
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.models.batch_ensemble import to_batch_ensemble

K, SIZE, B = 10, 9, 3


def student_of(name: str, E: int, seed: int = 0) -> nn.Module:
    """A student whose members differ; E 0 means the plain network."""
    network = network_of(name, seed)
    student = to_batch_ensemble(network, E) if E else network
    move_(student, seed + 1)
    return student.train()


def by_modules(student: nn.Module, E: int, x_BHWC, seeds_MBK):
    """Logits, gradients and statistics of one training forward and backward by autograd; `student` advances."""
    x = x_BHWC.permute(0, 3, 1, 2).repeat(max(E, 1), 1, 1, 1)
    logits = student(x).unflatten(0, (max(E, 1), -1))
    gradients = torch.autograd.grad((logits * seeds_MBK).sum(), list(student.parameters()))
    return logits.detach(), gradients, [buffer.clone() for buffer in student.buffers()]


def by_kernels(student: nn.Module, E: int, x_BHWC, seeds_MBK, operations, dtype):
    training = MemberTraining(student, max(E, 1), dtype=dtype, operations=operations)
    logits = training(x_BHWC)
    (logits * seeds_MBK).sum().backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    return logits.detach(), gradients, [buffer.clone() for buffer in student.buffers()]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("E", [0, 2])
@pytest.mark.parametrize("name", ["wrn10x1", "resnet8", "resnet18", "preresnet20_cifar10", "narrow"])
def test_float64_is_exact(name, E, folded):
    check_float64(name, E, folded)


# two members' rows: statistics of three values alone would magnify what float64 rounds
@pytest.mark.parametrize("name", ["imagenet18", "imagenet50"])
def test_float64_is_exact_of_imagenet_s_resnets(name):
    check_float64(name, 2, False)


def check_float64(name, E, folded):
    student = student_of(name, E).double()
    x = torch.randn(B, SIZE, SIZE, 3, dtype=torch.float64)
    seeds = torch.randn(max(E, 1), B, K, dtype=torch.float64)
    expected = by_modules(copy.deepcopy(student), E, x, seeds)
    ours = by_kernels(student, E, x, seeds, folding(LibraryOperations, folded), torch.float64)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-9, atol=1e-9)
    for (parameter, _), gradient, right in zip(student.named_parameters(), ours[1], expected[1], strict=True):
        assert gradient is not None, parameter
        scale = right.abs().max().item()
        torch.testing.assert_close(
            gradient, right, rtol=1e-7, atol=1e-8 * scale, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    for buffer, right in zip(ours[2], expected[2], strict=True):
        torch.testing.assert_close(buffer, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, folded", [("wrn10x1", False), ("wrn10x1", True), ("resnet8", True), ("narrow", True)])
def test_kernels_agree_with_the_modules(name, folded, dtype, device):
    E = 2
    student = student_of(name, E)
    x, seeds = torch.randn(B, SIZE, SIZE, 3), torch.randn(E, B, K)
    logits, gradients, buffers = by_modules(copy.deepcopy(student).double(), E, x.double(), seeds.double())

    def errors(operations):
        trial = copy.deepcopy(student).to(device)
        ours = by_kernels(trial, E, x.to(device), seeds.to(device), operations, dtype)
        flat = [torch.cat([g.flatten().double().cpu() for g in group]) for group in (ours[0], ours[1], ours[2])]
        right = [torch.cat([g.flatten().double() for g in group]) for group in (logits, gradients, buffers)]
        return [float((a - b).norm() / b.norm()) for a, b in zip(flat, right, strict=True)]

    # the library in the same type makes at most 1e-6 in fp32, 1e-1 in bf16 (tiny batches make the norms sensitive)
    for ours, library in zip(
        *(errors(folding(kind, folded)) for kind in (TritonOperations, LibraryOperations)), strict=True
    ):
        assert ours <= 2 * library + (1e-6 if dtype == torch.float32 else 1e-3)


def test_a_second_backward_is_refused():
    training = MemberTraining(student_of("wrn10x1", 2), 2, dtype=torch.float32, operations=LibraryOperations())
    loss = training(torch.randn(B, SIZE, SIZE, 3)).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        loss.backward()


@pytest.mark.parametrize("name", ["wrn10x1", "resnet8", "narrow"])
def test_nothing_outlives_a_backward(name):
    class Watching(LibraryOperations):
        def __call__(self, operation, /):
            def watched(x, w, /, **options):
                seen.append(weakref.ref(x))
                return operation.library(x, w, **options)

            return watched if operation is member_conv else super().__call__(operation)

    seen = []
    training = MemberTraining(student_of(name, 2), 2, dtype=torch.float32, operations=Watching())
    gc.collect()
    gc.disable()  # a cycle would hold the device's memory until it is collected
    try:
        training(torch.randn(B, SIZE, SIZE, 3)).sum().backward()
        assert seen and not any(x() is not None for x in seen)
    finally:
        gc.enable()


def test_kept_shared_layers_are_one_for_all_members():
    student = to_batch_ensemble(network_of("wrn10x1", 0), 2, keep_shared=["blocks.0.conv1", "linear"]).double().train()
    move_(student, 3)
    x, seeds = torch.randn(B, SIZE, SIZE, 3, dtype=torch.float64), torch.randn(2, B, K, dtype=torch.float64)
    expected = by_modules(copy.deepcopy(student), 2, x, seeds)
    ours = by_kernels(student, 2, x, seeds, LibraryOperations(), torch.float64)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-9, atol=1e-9)
    for gradient, right in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("network", [TwoNorms, ResidualFirst, Pooled])
def test_values_may_have_two_norms_and_sums_that_read_first(network, folded):
    student = network().double()
    move_(student, 2)
    x, seeds = torch.randn(B, SIZE, 4, 3, dtype=torch.float64), torch.randn(1, B, K, dtype=torch.float64)
    expected = by_modules(copy.deepcopy(student), 0, x, seeds)
    ours = by_kernels(student, 0, x, seeds, folding(LibraryOperations, folded), torch.float64)
    torch.testing.assert_close(ours[0], expected[0])
    for mine, right in zip([*ours[1], *ours[2]], [*expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(mine, right)


def test_layers_that_have_one_parameter_are_refused():
    student = TwoNorms()
    student.side.weight = student.main.weight
    with pytest.raises(NotExpressible, match="two layers have one parameter"):
        MemberTraining(student, 1, dtype=torch.float32, operations=LibraryOperations())


def test_kernels_take_a_bias_that_members_share(device):
    student = to_batch_ensemble(TwoNorms(), 2, keep_shared=["main", "linear"])
    move_(student, 3)
    x, seeds = torch.randn(2, 4, 5, 3), torch.randn(2, 2, K)
    expected = by_modules(copy.deepcopy(student).double(), 2, x.double(), seeds.double())
    operations = folding(TritonOperations, False)
    ours = by_kernels(student.to(device), 2, x.to(device), seeds.to(device), operations, torch.float32)
    torch.testing.assert_close(ours[0].cpu().double(), expected[0], rtol=1e-4, atol=1e-4)
    for gradient, right in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(gradient.cpu().double(), right, rtol=1e-3, atol=1e-4 * right.abs().max().item())

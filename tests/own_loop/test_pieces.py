"""The pieces: the perturbation by its formula, the loss by its formula, and networks that stay as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensdistill import UserError, distillation_loss, perturbed, to_batch_ensemble
from ensdistill.models.batch_ensemble import factor_parameters, member_network

K, E, PAIR = 5, 3, (2, 0)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, K))


def moved_student() -> nn.Module:
    student = to_batch_ensemble(network(9), E)
    for rho in factor_parameters(student):
        nn.init.normal_(rho, std=0.3)
    return student


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    return -(targets.softmax(1).detach() * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("with_student", [False, True])
@pytest.mark.parametrize("mean", [None, [0.5, 0.4, 0.3]])
def test_perturbed_is_the_formula(with_student: bool, mean: list[float] | None) -> None:
    teachers, student = [network(t) for t in range(E)], moved_student()
    images = torch.rand(4, 3, 6, 6)
    std = None if mean is None else [0.2, 0.3, 0.4]
    shown = perturbed(images, teachers, student if with_student else None, pair=PAIR, mean=mean, std=std)

    x = images.double().requires_grad_()
    z = x if mean is None else (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    a, b = PAIR
    loss = cross_entropy(teachers[b].double().eval()(z), teachers[a].double().eval()(z))
    if with_student:
        p, q = (member_network(student.double().eval(), m)(z) for m in (a, b))
        loss = loss - cross_entropy(q, p)
    (g,) = torch.autograd.grad(loss, x)
    D = images[0].numel()
    expected = (x + D**0.5 / 255 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    assert shown.dtype == torch.float32 and not shown.requires_grad
    torch.testing.assert_close(shown.double(), expected.detach(), rtol=0, atol=1e-6)
    assert (shown - images).abs().max() > 1e-3


def test_perturbed_leaves_networks_as_they_were() -> None:
    teachers, student = [network(t) for t in range(E)], moved_student()
    teachers[1].eval()
    teachers[2].requires_grad_(False)
    perturbed(torch.rand(2, 3, 6, 6), teachers, student, pair=PAIR)
    assert [t.training for t in teachers] == [True, False, True] and student.training
    assert [all(p.requires_grad for p in t.parameters()) for t in teachers] == [True, True, False]
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("M", [1, 3])
def test_the_loss_is_the_formula(alpha: float, M: int) -> None:
    tau = 4.0
    s, t = torch.randn(M, 6, K, requires_grad=True), torch.randn(3, 6, K, requires_grad=True)
    labels = torch.randint(0, K, (6,))
    loss = distillation_loss(s, t, labels, tau=tau, alpha=alpha)
    kd = tau**2 * -((t / tau).softmax(2) * (s / tau).log_softmax(2)).sum(2).mean()
    ce = torch.stack([nn.functional.cross_entropy(own, labels) for own in s]).mean()
    torch.testing.assert_close(loss, (1 - alpha) * ce + alpha * kd.detach() * 1.0)
    ours = torch.autograd.grad(loss, [s, t], allow_unused=True)
    torch.testing.assert_close(ours[0], torch.autograd.grad((1 - alpha) * ce + alpha * kd, s)[0])
    assert ours[1] is None


def test_what_does_not_fit_is_refused() -> None:
    teachers, images = [network(t) for t in range(E)], torch.rand(2, 3, 6, 6)
    with pytest.raises(UserError, match=r"images: got values from .* expected \[0, 1\]"):
        perturbed(images - 1, teachers, pair=PAIR)
    with pytest.raises(UserError, match=r"images: got torch.uint8"):
        perturbed(images.to(torch.uint8), teachers, pair=PAIR)
    for pair in ((1, 1), (0, 3), (-1, 0)):
        with pytest.raises(UserError, match=r"pair: got .* two different numbers of 0 … 2"):
            perturbed(images, teachers, pair=pair)
    with pytest.raises(UserError, match="student: got a plain network, expected 3 members"):
        perturbed(images, teachers, network(5), pair=PAIR)
    with pytest.raises(UserError, match="student: got 2 members, expected 3"):
        perturbed(images, teachers, to_batch_ensemble(network(5), 2), pair=PAIR)
    with pytest.raises(ValueError, match="t_EBK"):
        distillation_loss(torch.zeros(2, 6, K), torch.zeros(3, 6, K), torch.zeros(6, dtype=torch.int64))

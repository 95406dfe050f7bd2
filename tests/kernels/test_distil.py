"""The distillation loss and the hand-written seeds, against autograd in float64."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ensdistill.kernels.distil import cross_entropy_ref, distil_ref, divergence_seeds_ref, ods_seeds_ref


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_loss_is_the_mean_softened_cross_entropy_of_member_and_teacher():
    s, t, tau = randn(3, 5, 7), randn(3, 5, 7) * 4, 2.5
    expected = (
        sum(F.cross_entropy(s[m] / tau, (t[m] / tau).softmax(-1), reduction="mean") * tau**2 for m in range(3)) / 3
    )
    torch.testing.assert_close(distil_ref(s, t, tau), expected)


def test_one_student_learns_from_every_teacher():
    s, t = randn(1, 5, 7), randn(3, 5, 7)
    expected = sum(distil_ref(s, t[m : m + 1], 4.0) for m in range(3)) / 3
    torch.testing.assert_close(distil_ref(s, t, 4.0), expected)


def test_divergence_seed_is_the_gradient_of_the_cross_entropy():
    a, b = randn(5, 7).requires_grad_(), randn(5, 7) * 2
    loss = -(b.softmax(-1) * a.log_softmax(-1)).sum()
    torch.testing.assert_close(divergence_seeds_ref(a.detach(), b), torch.autograd.grad(loss, a)[0])


def test_divergence_seed_is_finite_where_a_probability_is_zero():
    a, b = torch.tensor([[200.0, -200.0, 0.0]]), torch.tensor([[-200.0, 200.0, 0.0]])
    torch.testing.assert_close(divergence_seeds_ref(a, b), torch.tensor([[1.0, -1.0, 0.0]]))


def test_ods_seed_is_the_gradient_of_the_weighted_softmax():
    t, w, tau = randn(5, 7).requires_grad_(), randn(5, 7), 4.0
    probabilities = (t / tau).softmax(-1)
    seeds, confidence = ods_seeds_ref(t.detach(), w, tau)
    torch.testing.assert_close(seeds, torch.autograd.grad((w * probabilities).sum(), t)[0])
    torch.testing.assert_close(confidence, probabilities.detach().amax(-1))


def test_cross_entropy_runs_over_all_rows():
    s, labels = randn(3, 5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = sum(F.cross_entropy(s[m], labels) for m in range(3)) / 3
    torch.testing.assert_close(cross_entropy_ref(s, labels), expected)


def test_bf16_logits_are_computed_in_fp32():
    s, t = randn(2, 3, 5).bfloat16(), randn(2, 3, 5).bfloat16()
    assert distil_ref(s, t, 4.0).dtype == torch.float32
    torch.testing.assert_close(distil_ref(s, t, 4.0), distil_ref(s.float(), t.float(), 4.0))

"""The distillation loss, against autograd in float64; the kernel against both.

Measured in the interpreter, largest error of kernel and of reference in fp32: losses 1.6e-7 and 1.9e-7 of the loss,
the student's gradient 1.1e-6 and 1.4e-6 of its largest value. A GPU's exp and log are good to some units of the last
place, NumPy's to one: the floors leave room for that.
"""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import assert_accurate, assert_launches_alike_on_meta, fresh_memory_is_nan
from torch.nn import functional as F

from ensdistill.kernels.loss.distil import cross_entropy_ref, distil, distil_ref


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


def test_cross_entropy_runs_over_all_rows():
    s, labels = randn(3, 5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = sum(F.cross_entropy(s[m], labels) for m in range(3)) / 3
    torch.testing.assert_close(cross_entropy_ref(s, labels), expected)


def test_bf16_logits_are_computed_in_fp32():
    s, t = randn(2, 3, 5).bfloat16(), randn(2, 3, 5).bfloat16()
    assert distil_ref(s, t, 4.0).dtype == torch.float32
    torch.testing.assert_close(distil_ref(s, t, 4.0), distil_ref(s.float(), t.float(), 4.0))


FLOOR = 1e-6
"""Floor of the errors of losses and probabilities."""
GRADIENT_FLOOR = 2e-6
"""Floor of the gradient's error, a share of its largest value: the probabilities' differences cancel."""


def to(x, *how):
    return None if x is None else x.to(*how)


def logits(*shape, spread=4.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_gradient(s, *args, **kwargs):
    """Compute the measures, and the gradient of 3 · loss."""
    s = s.detach().clone().requires_grad_()
    out = distil(s, *args, **kwargs)
    if out.gradient_MBK is not None:
        assert not out.loss.requires_grad
        return out, 3 * out.gradient_MBK
    (3 * out.loss).backward()
    return out, s.grad


LOGITS = [
    (1, 1, 1, 3, 0.5, 4.0),
    (3, 3, 5, 10, 1.0, 2.5),
    (1, 4, 5, 101, 0.7, 4.0),
    (2, 0, 5, 10, 0.0, 1.0),
    (4, 4, 9, 101, 0.9, 1.0),
    (2, 2, 2, 33_001, 0.3, 4.0),  # past one block of the interpreter's tiles
    (1, 3, 1, 33_001, 1.0, 4.0),
    pytest.param(4, 4, 128, 100, 1.0, 4.0, marks=pytest.mark.gpu),
    pytest.param(1, 4, 128, 1000, 0.9, 4.0, marks=pytest.mark.gpu),
    pytest.param(4, 4, 33, 21_841, 0.9, 4.0, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "E", "B", "K", "alpha", "tau"), LOGITS)
def test_kernel_is_as_accurate_as_the_reference(M, E, B, K, alpha, tau, dtype, device):
    s, t = logits(M, B, K).to(dtype), logits(E, B, K, spread=6.0).to(dtype) if E else None
    labels = torch.randint(0, K, (B,), generator=torch.Generator().manual_seed(1))
    truth, dtruth = with_gradient(s.double(), to(t, torch.float64), labels, tau, alpha)
    reference, dreference = with_gradient(s, t, labels, tau, alpha)
    with fresh_memory_is_nan():
        got, dgot = with_gradient(s.to(device), to(t, device), labels.to(device), tau, alpha, kernel=True)
    for name in ("loss", "loss_ce", "loss_kd"):
        if getattr(truth, name) is None:
            assert getattr(got, name) is None
        else:
            assert_accurate(*(getattr(out, name).detach() for out in (got, reference, truth)), FLOOR)
    assert got.acc1.item() == pytest.approx(truth.acc1.item(), abs=1e-7)
    assert not got.acc1.requires_grad and not got.loss_ce.requires_grad
    scale = dtruth.abs().max()
    assert_accurate(dgot.cpu().double() / scale, dreference.double() / scale, dtruth / scale, GRADIENT_FLOOR)


@pytest.mark.parametrize("M", [1, 3])
def test_logits_of_any_size_give_finite_losses(M, device):
    s, t = logits(M, 5, 10, spread=1e4), -logits(3, 5, 10, spread=1e4)
    s[0, 1], t[0, 1] = 1e4, -1e4  # equal rows
    s[0, 2], t[-1, 2] = torch.linspace(-1e4, 1e4, 10), torch.linspace(1e4, -1e4, 10)
    labels = torch.tensor([0, 1, 2, 9, 4])
    truth, dtruth = with_gradient(s.double(), t.double(), labels, 4.0, 0.5)
    reference, dreference = with_gradient(s, t, labels, 4.0, 0.5)
    got, dgot = with_gradient(s.to(device), t.to(device), labels.to(device), 4.0, 0.5, kernel=True)
    for name in ("loss", "loss_ce", "loss_kd"):
        assert_accurate(*(getattr(out, name).detach() for out in (got, reference, truth)), FLOOR)
    assert_accurate(dgot, dreference, dtruth, FLOOR)


@pytest.mark.parametrize("K", [10, 33_001])
def test_the_first_of_equal_logits_is_the_answer(K, device):
    s = torch.zeros(1, 4, K)
    s[0, 1, [3, K - 1]], s[0, 2, K - 1], s[0, 3] = 1.0, 2.0, -math.pi
    labels = torch.tensor([0, 3, K - 1, 1])
    assert s.argmax(-1).tolist() == [[0, 3, K - 1, 0]]
    assert distil(s.to(device), None, labels.to(device), 1.0, 0.0, kernel=True).acc1.item() == 0.75


def test_a_label_that_is_no_class_shows(device):
    s = logits(1, 3, 5).to(device)
    assert distil(s, None, torch.tensor([0, 5, 1], device=device), 1.0, 0.0, kernel=True).loss.isnan()


def test_strided_logits_are_taken(device):
    s, t, labels = logits(5, 2, 7).transpose(0, 1), logits(2, 7, 5).transpose(1, 2), torch.tensor([0, 6, 3, 3, 1])
    got, dgot = with_gradient(s.to(device), t.to(device), labels.to(device), 4.0, 0.5, kernel=True)
    expected, dexpected = with_gradient(s, t, labels, 4.0, 0.5)
    torch.testing.assert_close(got.loss.cpu(), expected.loss)
    torch.testing.assert_close(dgot.cpu(), dexpected)


def test_on_meta(device):
    s, t = logits(2, 3, 5).to(device).requires_grad_(), logits(2, 3, 5).to(device)
    labels = torch.tensor([1, 2, 3], device=device)
    assert_launches_alike_on_meta(distil, s, t, labels, 3.0, 0.5, kernel=True)
    assert_launches_alike_on_meta(distil, s, None, labels, 3.0, 0.0, kernel=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s_MBK": torch.zeros(3, 5)}, "s_MBK: expected logits"),
        ({"t_EBK": torch.zeros(3, 3, 5)}, r"t_EBK: expected logits \(2, 3, 5\)"),
        ({"labels_B": torch.zeros(3)}, r"labels_B: expected an int64 tensor \(3,\)"),
        ({"tau": 0.0}, "tau: expected a positive temperature, got 0.0"),
        ({"alpha": 1.5}, "alpha: expected 0 ≤ alpha ≤ 1, got 1.5"),
        ({"t_EBK": None}, "alpha: expected 0 without teachers, got 0.5"),
    ],
)
def test_bad_arguments(change, message):
    good = {"s_MBK": logits(2, 3, 5), "t_EBK": logits(2, 3, 5), "labels_B": torch.tensor([1, 2, 3])}
    with pytest.raises(ValueError, match=message):
        distil(**(good | {"tau": 4.0, "alpha": 0.5} | change))

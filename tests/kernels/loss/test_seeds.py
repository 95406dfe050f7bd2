"""The hand-written seeds, against autograd in float64; the kernels against both.

Measured in the interpreter, largest error of kernel and of reference in fp32: 2.3e-7 and 2.9e-7. A GPU's exp is good to
some units of the last place, NumPy's to one: the floor leaves room for that.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate, assert_launches_alike_on_meta, fresh_memory_is_nan

from ensdistill.kernels.loss.seeds import divergence_seeds, divergence_seeds_ref, ods_seeds, ods_seeds_ref

FLOOR = 1e-6
"""Floor of the errors of probabilities."""


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def logits(*shape, spread=4.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "K"), [(1, 3), (5, 10), (37, 101), (2, 33_001), pytest.param(129, 21_841, marks=pytest.mark.gpu)]
)
def test_seeds_are_as_accurate_as_the_reference(B, K, dtype, device):
    a, b = logits(2, B, K).to(dtype), logits(4, B, K)[2:].to(dtype)
    for first, signs in ((0, (1.0, -1.0)), (0, (1.0,)), (1, (-1.0,))):  # teachers and student, or one of them
        ab = a[first : first + len(signs)], b[first : first + len(signs)]
        with fresh_memory_is_nan():
            got = divergence_seeds(*(x.to(device) for x in ab), signs, dtype=dtype, kernel=True)
        truth = torch.tensor(signs, dtype=torch.float64)[:, None, None] * divergence_seeds_ref(
            *(x.double() for x in ab)
        )
        assert_accurate(got, divergence_seeds(*ab, signs, dtype=dtype), truth, FLOOR)

    a = a[0]
    w = torch.rand(B, K, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with fresh_memory_is_nan():
        got = ods_seeds(a.to(device), w.to(device), 4.0, dtype=dtype, kernel=True)
    both = zip(ods_seeds(a, w, 4.0, dtype=dtype), ods_seeds(a.double(), w.double(), 4.0), strict=True)
    for x, (reference, truth) in zip(got, both, strict=True):
        assert_accurate(x, reference, truth, FLOOR)


def test_seeds_of_extreme_logits_are_exact(device):
    a, b = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4]]), torch.tensor([[-1e4, 1e4, 0.0], [-7.0, -7.0, -7.0]])
    expected = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(divergence_seeds(a[None].to(device), b[None].to(device), kernel=True)[0].cpu(), expected)
    _, confidence = ods_seeds(a.to(device), torch.ones(2, 3, device=device), 4.0, kernel=True)
    torch.testing.assert_close(confidence.cpu(), torch.tensor([1.0, 1 / 3]))


def test_on_meta(device):
    t = logits(2, 3, 5).to(device)
    assert_launches_alike_on_meta(divergence_seeds, t, t.flip(0), (1.0, -1.0), dtype=torch.bfloat16, kernel=True)
    assert_launches_alike_on_meta(ods_seeds, t[0], t[1], 4.0, kernel=True)


def test_bad_arguments():
    with pytest.raises(ValueError, match="b_GBK: expected the shape of a_GBK"):
        divergence_seeds(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"a_GBK: expected floating-point logits \(G, B, K\)"):
        divergence_seeds(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="signs: expected 3, one for each of at most two networks"):
        divergence_seeds(torch.zeros(3, 2, 3), torch.zeros(3, 2, 3), (1.0, -1.0, 1.0))
    with pytest.raises(ValueError, match="w_BK: expected the shape of t_BK"):
        ods_seeds(torch.zeros(2, 3), torch.zeros(2, 4), 4.0)
    with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16"):
        divergence_seeds(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), dtype=torch.float16, kernel=True)

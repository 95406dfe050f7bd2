"""BatchNorm's statistics against their reference in float64, and against the values they are of."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, assert_launches_alike_on_meta, doubled, error
from norm_inputs import activations, sums_of, vectors

from ensdistill.kernels.norm.channels import num_counters
from ensdistill.kernels.norm.statistics import BatchStatistics, batch_norm_statistics, batch_norm_statistics_ref

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


# Measured: at most 5.2e-8, equal to the reference, which rounds once to fp32.
@pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
@pytest.mark.parametrize(("M", "T", "C"), [(1, 1, 3), (3, 5, 20), (2, 70, 64), (1, 4099, 256)])
def test_statistics(M, T, C, groups, device):
    per_member = groups != "shared"
    G = M if per_member else 1
    x = activations((M, 4 * T, C), torch.float32, device)
    sums = sums_of(x, x, T)
    gamma, beta = vectors(*((M, C) if groups == "own_gamma" else (C,)), device=device)
    running = [v.view((M, C) if per_member else (C,)) for v in vectors(G, C, device=device, seed=2)]
    old = [v.clone() for v in running]
    arguments = {"count": 4 * T, "per_member": per_member, "eps": 1e-3}
    result = batch_norm_statistics(
        sums, gamma, beta, running_mean=running[0], running_var=running[1], momentum=0.3, **arguments
    )
    ref = batch_norm_statistics_ref(sums, gamma, beta, **arguments)
    truth_running = [v.double() for v in old]
    truth = batch_norm_statistics_ref(
        *doubled(sums, gamma, beta),
        running_mean=truth_running[0],
        running_var=truth_running[1],
        momentum=0.3,
        **arguments,
    )
    for name in BatchStatistics._fields:
        assert getattr(result, name).shape == (G, C)
        agrees(getattr(result, name), getattr(ref, name), getattr(truth, name), 1e-7)
    for new, wanted in zip(running, truth_running, strict=True):
        assert error(new, wanted) < 2e-7
    without = batch_norm_statistics(sums, gamma, beta, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(result, without, strict=True))
    # the definition itself, from the values: the variance is the biased one
    x_GNC = x.double().reshape(G, -1, C)
    assert error(result.mean, x_GNC.mean(1)) < 2e-6
    assert error(result.rstd, (x_GNC.var(1, correction=0) + 1e-3).rsqrt()) < 2e-6
    wanted = old[1].double() + 0.3 * (x_GNC.var(1, correction=0).view_as(old[1]) - old[1])
    assert error(running[1], wanted) < 2e-6
    batch_norm_statistics(
        sums, gamma, beta, running_mean=running[0].zero_(), running_var=running[1].zero_(), unbiased=True, **arguments
    )
    assert error(running[1], 0.1 * x_GNC.var(1, correction=1).view_as(running[1])) < 2e-6


def test_variance_where_the_mean_is_a_hundred_standard_deviations(device):
    """E[x²] − mean² loses what the fp32 parts lost: measured 1.5e-3 of the variance with one part, 1.8e-4 with 64.

    With the second stage in fp32 it was 2.2e-3 and 2.8e-3.
    """
    x = activations((2, 8192, 20), torch.float32, device, mean=150.0)
    gamma, beta = vectors(20, device=device)
    truth = x.double().flatten(0, 1).var(0, correction=0)

    def lost(parts: int) -> float:
        rstd = batch_norm_statistics(sums_of(x, x, parts), gamma, beta, count=8192, eps=1e-12).rstd
        return error(rstd[0].double() ** -2, truth)

    assert lost(64) < 5e-4
    assert lost(1) < 4e-3


def test_variance_is_never_negative(device):
    x = torch.full((1, 333, 8), 1234.567, device=device)
    statistics = batch_norm_statistics(sums_of(x, x), *vectors(8, device=device), count=333)
    assert (statistics.rstd <= 1e-5**-0.5 * 1.0001).all() and statistics.rstd.isfinite().all()
    sums = torch.tensor([3.0, 8.9]).view(1, 1, 2, 1).to(device)  # 8.9 / 1 − 3² < 0
    assert batch_norm_statistics(sums, *vectors(1, device=device), count=1).rstd.item() == pytest.approx(1e-5**-0.5)


@pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
def test_on_meta(groups, device):
    per_member = groups != "shared"
    x = activations((2, 36, 20), torch.float32, device)
    gamma, beta = vectors(*((2, 20) if groups == "own_gamma" else (20,)), device=device)
    given = (sums_of(x, x, 2), gamma, beta)
    assert_launches_alike_on_meta(batch_norm_statistics, *given, count=36, per_member=per_member)
    running = [v.view((2, 20) if per_member else (20,)) for v in vectors(2 if per_member else 1, 20, device=device)]
    counters = torch.zeros(num_counters(20, 2), dtype=torch.int32, device=device)
    options = {"count": 36, "per_member": per_member, "running_mean": running[0], "running_var": running[1]}
    assert_launches_alike_on_meta(batch_norm_statistics, *given, **options, writes=running)
    many = (activations((2, 300, 2, 20), torch.float32, device), gamma, beta)  # rows in shares
    writes = (*running, counters)
    assert_launches_alike_on_meta(batch_norm_statistics, *many, **options, counters=counters, writes=writes)


def test_bad_arguments():
    sums, gamma, beta = torch.rand(2, 1, 2, 5), torch.rand(5), torch.rand(5)

    def bad(message, call, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            call(*args, **kwargs)

    bad(
        "sums_MT2C: expected contiguous float32 partial sums",
        batch_norm_statistics,
        sums[:, :, :1],
        gamma,
        beta,
        count=3,
    )
    bad(
        "sums_MT2C: expected contiguous float32 partial sums",
        batch_norm_statistics,
        sums.double(),
        gamma,
        beta,
        count=3,
    )
    bad("sums_MT2C: expected at least one partial sum", batch_norm_statistics, sums[:, :0], gamma, beta, count=3)
    bad("count: expected a positive number", batch_norm_statistics, sums, gamma, beta, count=0)
    bad(r"gamma: expected contiguous float32 \(5,\), got", batch_norm_statistics, sums, torch.rand(2, 5), beta, count=3)
    bad("beta: expected contiguous float32", batch_norm_statistics, sums, gamma, beta.bfloat16(), count=3)
    bad(
        "beta: expected the shape of gamma",
        *(batch_norm_statistics, sums, torch.rand(2, 5), beta),
        count=3,
        per_member=True,
    )
    bad("both or neither", batch_norm_statistics, sums, gamma, beta, count=3, running_mean=beta)
    running = {"running_mean": torch.rand(2, 5), "running_var": beta}
    bad(
        r"running_mean: expected contiguous float32 \(5,\)",
        batch_norm_statistics,
        sums,
        gamma,
        beta,
        count=3,
        **running,
    )

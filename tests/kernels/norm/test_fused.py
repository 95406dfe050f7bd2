"""BatchNorm in one launch each way: against float64, the two launches it stands for, and itself many times over."""

from __future__ import annotations

import pytest
import torch
from accuracy import agrees, assert_launches_alike_on_meta, doubled
from norm_inputs import activations, sums_of, vectors

from ensdistill.kernels.launch import recording
from ensdistill.kernels.norm import fused
from ensdistill.kernels.norm.channels import num_counters
from ensdistill.kernels.norm.fused import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_ref,
    batch_norm_ref,
)
from ensdistill.kernels.norm.statistics import BatchStatistics, batch_norm_statistics

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")
GROUPS = pytest.mark.parametrize("groups", ["shared", "per_member", "own_gamma"])
CASES = [  # shape of x, parts of the sums
    ((1, 1, 3, 5, 3), 1),
    ((2, 3, 4, 4, 64), 140),  # rows in shares
    ((3, 2, 7, 9, 20), 5),  # three blocks of channels that are no whole one
    ((2, 1, 3, 2, 160), 2),  # more blocks than programs of one member
    pytest.param((4, 128, 32, 32, 64), 1024, marks=pytest.mark.gpu),
    pytest.param((4, 127, 8, 8, 256), 63, marks=pytest.mark.gpu),
]


def arguments(shape, T, groups, dtype, device):
    """x, du, residual; sums of x and of du; γ, β and running statistics; options of both ways."""
    M, C, per_member = shape[0], shape[-1], groups != "shared"
    x, du, residual = (activations(shape, dtype, device, seed) for seed in (0, 1, 2))
    sums, dsums = (sums_of(v.float().flatten(1, -2), x.float().flatten(1, -2), T) for v in (x, du))
    gamma, beta = vectors(*((M, C) if groups == "own_gamma" else (C,)), device=device)
    running = [
        v.view((M, C) if per_member else (C,)) for v in vectors(M if per_member else 1, C, device=device, seed=2)
    ]
    options = {"count": x[0, ..., 0].numel(), "per_member": per_member}
    return x, du, residual, sums, dsums, gamma, beta, running, options


def both(x, du, residual, sums, dsums, gamma, beta, running, options, counters=None):
    """All that forward and backward give, by the kernels with `counters` (two rows), or by one launch a step."""
    rows = (None, None) if counters is None else counters
    running = [v.clone() for v in running]
    named = {"running_mean": running[0], "running_var": running[1], "momentum": 0.3, "eps": 1e-3, **options}
    z, bits, statistics = batch_norm(x, sums, gamma, beta, residual=residual, bits=1, counters=rows[0], **named)
    back = batch_norm_backward(du, x, dsums, statistics, gamma, residual=residual, counters=rows[1], **options)
    return [z, bits, *statistics, *running, *back]


def zeros(x, groups):
    return torch.zeros(2, num_counters(x.shape[-1], len(x) if groups != "shared" else 1), dtype=torch.int32).to(
        x.device
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@GROUPS
@pytest.mark.parametrize(("shape", "T"), CASES)
def test_it_is_the_two_launches_and_the_definition(shape, T, groups, dtype, device):
    given = arguments(shape, T, groups, dtype, device)
    x, du, residual, sums, dsums, gamma, beta, running, options = given
    result, apart = both(*given, counters=zeros(x, groups)), both(*given)
    assert all(torch.equal(one, other) for one, other in zip(result, apart, strict=True))

    def by_definition(x, du, residual, sums, dsums, gamma, beta, *running):
        named = {"running_mean": running[0], "running_var": running[1], "momentum": 0.3, "eps": 1e-3, **options}
        z, _, statistics = batch_norm_ref(x, sums, gamma, beta, residual=residual, **named)
        back = batch_norm_backward_ref(du, x, dsums, statistics, gamma, residual=residual, **options)
        return [z, *statistics, *running, *back]

    tensors = (x, du, residual, sums, dsums, gamma, beta, *running)
    own = by_definition(*(v.clone() for v in tensors))
    truth = by_definition(*(v.clone() for v in doubled(*tensors)))
    for mine, its, right in zip([result[0], *result[2:]], own, truth, strict=True):
        agrees(mine, its, right, 4e-7)


@GROUPS
def test_statistics_of_rows_in_shares_are_those_of_one_program(groups, device):
    x, _, _, sums, _, gamma, beta, running, options = arguments((2, 3, 4, 4, 64), 300, groups, torch.float32, device)
    once = {"running_mean": running[0].clone(), "running_var": running[1].clone(), **options}
    many = {"running_mean": running[0].clone(), "running_var": running[1].clone(), **options}
    one = batch_norm_statistics(sums, gamma, beta, **once)
    shared = batch_norm_statistics(sums, gamma, beta, counters=zeros(x, groups)[0], **many)
    # fp64 additions in another order
    for v, w in zip([*one, *once.values()][:6], [*shared, *many.values()][:6], strict=True):
        torch.testing.assert_close(v, w, rtol=2e-7, atol=1e-7)


def test_it_can_be_switched_off(device, monkeypatch):
    given = arguments((1, 1, 3, 5, 8), 2, "shared", torch.float32, device)
    launched: list[str] = []
    for is_fused in (True, False):
        monkeypatch.setattr(fused, "FUSED", is_fused)
        with recording(lambda kernel, *_: launched.append(kernel.fn.__name__)):
            both(*given, counters=zeros(given[0], "shared"))
    names = ["statistics", "apply", "coefficients", "input_gradient"]
    assert launched == [f"batch_norm_{name}_kernel" for name in ("apply", "input_gradient", *names)]


@pytest.mark.gpu
def test_launches_in_two_streams_give_the_same_bits_again_and_again(device):
    """Each launch has as many programs as the device holds, several times over: they wait for sums of one another."""
    given = arguments((4, 128, 32, 32, 64), 1024, "shared", torch.bfloat16, device)
    expected = both(*given)
    streams = [torch.cuda.Stream() for _ in range(2)]
    graphs, results = [], []
    torch.cuda.synchronize()
    for stream in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results.append(both(*given, counters=zeros_on(given[0])))
        graphs.append(graph)
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True))


def zeros_on(x):
    """Zeroed by the graph itself, at every replay."""
    return torch.zeros(2, num_counters(x.shape[-1]), dtype=torch.int32, device=x.device)


@GROUPS
def test_on_meta(groups, device):
    given = arguments((2, 1, 3, 2, 20), 2, groups, torch.bfloat16, device)
    x, du, residual, sums, dsums, gamma, beta, running, options = given
    forward, backward = zeros(x, groups).unbind()
    named = {"running_mean": running[0], "running_var": running[1], "residual": residual, "counters": forward}
    writes = (*running, forward)
    assert_launches_alike_on_meta(batch_norm, x, sums, gamma, beta, **named, bits=1, **options, writes=writes)
    mean, rstd = vectors(1 if groups == "shared" else 2, 20, device=device)
    statistics = BatchStatistics(mean, rstd, mean, rstd)
    named = {"residual": residual, "counters": backward, **options}
    assert_launches_alike_on_meta(batch_norm_backward, du, x, dsums, statistics, gamma, **named, writes=[backward])


def test_bad_arguments():
    x, sums, vector = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 2, 5), torch.rand(5)
    running = {"running_mean": torch.rand(5), "running_var": torch.rand(5)}
    statistics = BatchStatistics(*torch.rand(4, 1, 5).unbind())
    counters = torch.zeros(num_counters(5), dtype=torch.int32)
    for message, call in {
        r"counters: expected contiguous int32 \(96,\)": lambda: batch_norm(
            x, sums, vector, vector, count=12, counters=counters[:64], **running
        ),
        "counters: expected contiguous int32": lambda: batch_norm_backward(
            x, x, sums, statistics, vector, count=12, counters=counters.long()
        ),
        "residual: expected": lambda: batch_norm(
            x, sums, vector, vector, count=12, residual=x[:1], counters=counters, **running
        ),
        "bits: expected 0 without ReLU": lambda: batch_norm(
            x, sums, vector, vector, count=12, relu=False, bits=1, counters=counters, **running
        ),
        "running_mean: expected": lambda: batch_norm(
            x, sums, vector, vector, count=12, counters=counters, **(running | {"running_mean": vector.double()})
        ),
        "du: expected": lambda: batch_norm_backward(x.half(), x, sums, statistics, vector, count=12, counters=counters),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()

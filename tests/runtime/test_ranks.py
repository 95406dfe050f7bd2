"""Several processes: two real ones on the CPU, talking by gloo; and what each does by itself."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import rank_programs as programs
import torch
from networks import K, folding, move_, small_classifier
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.data.feed import Feed
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.registry import open_source
from ensdistill.engine.member_training import MemberTraining, trunk_and_heads
from ensdistill.engine.operations import LibraryOperations, TritonOperations
from ensdistill.kernels.norm.statistics import batch_norm_statistics
from ensdistill.models.batch_ensemble import to_batch_ensemble
from ensdistill.models.layers import BatchNorm2d
from ensdistill.models.students import build_student
from ensdistill.models.synced_norm import averaged_statistics, gather_statistics, scatter_statistics, synchronise_norms
from ensdistill.run.predict import _own_batches, predict
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.ranks import ALONE, Ranks, from_environment

CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What rank_programs.py found on each of two processes that torchrun started."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]  # picks a free port
    process = subprocess.Popen(
        [sys.executable, *torchrun, programs.__file__, str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends those that it started, which have process groups of their own
            process.wait(timeout=60)
    assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# ---- two processes --------------------------------------------------------------------------------------------------


def test_averages_are_the_same_on_all_ranks(found):
    expected = [(a + b) / 2 for a, b in zip(programs.gradients(0), programs.gradients(1), strict=True)]
    for here in found:
        torch.testing.assert_close(here["averaged"], expected, rtol=0, atol=0)
        assert torch.equal(here["mean"], torch.tensor([1.0, 5.0])) and torch.equal(here["sum"], torch.tensor([3.0]))
    assert torch.equal(found[1]["own"], torch.tensor([1.0, 10.0]))  # what is averaged into a new tensor stays


def test_rows_come_in_the_order_of_the_ranks(found):
    for here in found:
        assert here["gathered"].tolist() == [[0, 7], [1, 7]]
        assert here["rows"][0].tolist() == [[10, 11], [12, 13]] and here["rows"][0].dtype == torch.int64
        assert torch.equal(here["rows"][1], torch.ones(3, 2, dtype=torch.float64))


def test_the_first_rank_speaks_for_all(found):
    for here in found:
        assert here["any"] == [False, True, True]
        assert here["first"] == "a value" and here["copy"]
        assert here["broadcast"][0].tolist() == [5.0] * 3 and here["broadcast"][1].item() == 0
    assert [here["written"] for here in found] == [[0], []]


def test_a_failure_of_the_first_rank_ends_the_others(found):
    assert found[0]["failure"] == ("OSError", "no space left")
    kind, message = found[1]["failure"]
    assert kind == "UserError" and re.fullmatch(
        r"process 1 of 2: the first process stopped \(no space left\).*", message
    )
    assert all(here["after"] for here in found)


def test_shared_evaluation_is_the_unshared_one(found):
    for i, sizes in enumerate(programs.FEEDS):
        feed: Any = programs.CountingFeed(sizes)
        logits_NMK, labels_N = predict(programs.members_of, feed, device=CPU, precision="fp32")
        for here in found:
            assert torch.equal(here["predicted"][i][0], logits_NMK) and torch.equal(here["predicted"][i][1], labels_N)
    assert [here["taken"] for here in found] == [[[0, 1], []], [[2, 3, 4], [0]]]


def test_running_statistics_are_averaged_for_a_while_and_stored_of_each(found):
    ours = [here["statistics"] for here in found]
    for name, first in ours[0]["before"].items():
        second = ours[1]["before"][name]
        assert not torch.equal(first, second)
        for own, here in zip((first, second), ours, strict=True):
            torch.testing.assert_close(here["inside"][name], (first + second) / 2)
            assert torch.equal(here["after"][name], own) and torch.equal(here["restored"][name], own)
            assert torch.equal(here["stored"][name], torch.stack((first, second)))


def assert_same(ours: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype, what: str) -> None:
    """To 1e-10 of a tensor's largest value in float64; in float32 to 1e-4, as sums run in another order."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert ours[what].keys() == expected[what].keys() and ours[what]
    for name, right in expected[what].items():
        error = (ours[what][name] - right).abs().max().item()
        assert error <= tolerance * max(right.abs().max().item(), 0.01), f"{what} {name}: {error}"


@pytest.mark.parametrize("case", programs.CASES, ids=str)
def test_synchronised_norms_make_two_halves_one_batch(found, case):
    whole = programs.step(case, range(programs.B), ALONE, sync=False)
    for here in found:
        ours = here["steps"][f"{case} True"]
        torch.testing.assert_close(
            ours["loss"], whole["loss"], rtol=1e-10 if case.dtype == torch.float64 else 1e-6, atol=0
        )
        for what in ("momentum", "parameters", "statistics"):
            assert_same(ours, whole, case.dtype, what)
        assert ours["keys"] == whole["keys"]


@pytest.mark.parametrize("case", [case for case in programs.CASES if case.network != "foreign"], ids=str)
def test_without_them_each_half_is_normalised_by_itself(found, case):
    halves = [
        programs.step(case, range(start, start + programs.B // 2), ALONE, sync=False) for start in (0, programs.B // 2)
    ]
    gradients = {
        name: (halves[0]["momentum"][name] + halves[1]["momentum"][name]) / 2 for name in halves[0]["momentum"]
    }
    for rank, here in enumerate(found):
        ours = here["steps"][f"{case} False"]
        assert_same(ours, {"momentum": gradients}, case.dtype, "momentum")
        assert_same(ours, halves[rank], case.dtype, "statistics")
        torch.testing.assert_close(ours["loss"], (halves[0]["loss"] + halves[1]["loss"]) / 2)
    name = next(iter(halves[0]["statistics"]))
    assert not torch.equal(halves[0]["statistics"][name], halves[1]["statistics"][name])


def test_a_rank_reads_its_share_of_a_feed(tmp_path):
    """Cached or decoded on the way, the shares behind each other are the epoch."""
    data = prepare(open_source("digits"), tmp_path).splits["valid"]
    for cache in ("host", "none"):
        options: dict[str, Any] = {"indices": range(0, 70), "batch_size": 16, "cache": cache}
        with Feed(data.path, seed=0, shuffle=False, drop_last=False, **options) as feed:
            shares, numbers = [], []
            for r in range(3):
                with _own_batches(feed, Ranks(rank=r, size=3)) as batches:
                    numbered = list(batches)
                numbers += [number for number, _ in numbered]
                shares.append([labels for _, (_, labels) in numbered])
            with feed.epoch(0) as batches:
                whole = [labels for _, labels in batches]
        assert [len(share) for share in shares] == [1, 2, 2] and numbers == [0, 1, 2, 3, 4]
        assert all(map(torch.equal, [labels for share in shares for labels in share], whole))


# ---- one process ---------------------------------------------------------------------------------------------------


class Twins(Ranks):
    """Two ranks with the same rows, seen by one of them: nothing is communicated, and all means are its own."""

    def sum_(self, tensor):
        return tensor.mul_(2)

    def gather(self, tensor):
        return torch.stack((tensor, tensor))


def trained(network: nn.Module, E: int, dtype, operations, x, seeds, **options) -> list[torch.Tensor]:
    """Logits, gradients and buffers of a training forward and backward."""
    logits = MemberTraining(network, E, dtype=dtype, operations=operations, **options)(x)
    (logits * seeds).sum().backward()
    return [logits.detach(), *(p.grad for p in network.parameters()), *(b.clone() for b in network.buffers())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operations", [LibraryOperations, TritonOperations])
def test_norms_of_passes_together_with_a_twin_are_its_own(operations, dtype, device):
    apart = programs.Foreign().to(device).train()
    for norm in (apart.norm1, apart.norm2):
        norm.__class__ = BatchNorm2d
    together = copy.deepcopy(apart)
    synchronise_norms(together, Twins(size=2))
    x, seeds = torch.randn(2, 7, 7, 3, device=device), torch.randn(1, 2, programs.K, device=device)
    ours, expected = (trained(network, 1, dtype, folding(operations, False), x, seeds) for network in (together, apart))
    for mine, right in zip(ours, expected, strict=True):
        # sums are rounded at other places, which one bf16 value in a few may see
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(mine, right, rtol=0, atol=tolerance * max(1, right.abs().max().item()))


@pytest.mark.parametrize("network", ["wrn10x1", "resnet20"])
def test_hydra_s_norms_together_with_a_twin_are_its_own(network):
    apart = build_student(Method.parse("hydra"), lambda seed: small_classifier(seed, network), E=2, seed=0).double()
    together = copy.deepcopy(apart)
    synchronise_norms(together, Twins(size=2))
    x, seeds = torch.randn(2, 9, 9, 3, dtype=torch.float64), torch.randn(2, 2, K, dtype=torch.float64)

    def trained(student):
        networks = [nn.Sequential(student.trunk.network, head) for head in student.heads]
        passes = trunk_and_heads(networks, dtype=torch.float64, operations=LibraryOperations())
        (passes(x) * seeds).sum().backward()
        return [*(p.grad for p in student.parameters()), *student.buffers()]

    for mine, right in zip(trained(together), trained(apart), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9 * max(1, right.abs().max().item()))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [BatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_together_with_a_twin_is_itself_but_for_its_count(kind, momentum, affine, dtype, device):
    """A twin leaves mean and biased variance alone; n of the unbiased one is twice as large."""
    apart = kind(5, momentum=momentum, affine=affine).to(device)
    if affine:
        nn.init.uniform_(apart.weight)
    together = copy.deepcopy(apart)
    synchronise_norms(together, Twins(size=2))
    x = (3 + torch.randn(4, 5, 3, 2, device=device)).to(dtype).contiguous(memory_format=torch.channels_last)
    seeds = torch.randn(4, 5, 3, 2, device=device).to(dtype)
    found = []
    for norm in (together, apart):
        leaf = x.clone().requires_grad_()
        for _ in range(2):
            y = norm(leaf)
        y.backward(seeds)
        found.append([y, leaf.grad, *(p.grad for p in norm.parameters()), norm.running_mean])
    for mine, right in zip(*found, strict=True):
        assert mine.dtype == right.dtype
        tolerance = 1e-5 if right.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)
    n = x.numel() // 5
    weight = 1 if momentum is None else 1 - 0.9**2
    ratio = 1.0 if kind is BatchNorm2d else 2 * (n - 1) / (2 * n - 1)
    batch = (apart.running_var - (1 - weight)) / weight
    torch.testing.assert_close((together.running_var - (1 - weight)) / weight, batch * ratio, rtol=1e-4, atol=1e-5)
    assert together.num_batches_tracked == 2
    apart.load_state_dict(together.state_dict())
    assert torch.equal(together.eval()(x), apart.eval()(x))


def F_eval(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


def test_a_norm_without_statistics_is_normalised_together_in_training():
    apart = nn.BatchNorm2d(3, track_running_stats=False)
    together = copy.deepcopy(apart)
    synchronise_norms(together, Twins(size=2))
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(together(x), apart(x))
    torch.testing.assert_close(together.eval()(x), apart.eval()(x))


def test_networks_beside_each_other_are_normalised_together_each_by_itself():
    apart = programs.Foreign().double().train()
    for norm in (apart.norm1, apart.norm2):
        norm.__class__ = BatchNorm2d
    for tensor in (*apart.parameters(), *(b for b in apart.buffers() if b.ndim)):
        tensor.data = torch.stack((tensor, tensor + 0.1 * torch.rand_like(tensor)))
    together = copy.deepcopy(apart)
    synchronise_norms(together, Twins(size=2))
    x, seeds = (torch.randn(2, 3, *shape, dtype=torch.float64) for shape in ((7, 7, 3), (programs.K,)))
    ours, expected = (
        trained(network, 2, torch.float64, LibraryOperations(), x, seeds, stacked=True) for network in (together, apart)
    )
    for mine, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_sums_of_passes_lose_nothing_on_their_way():
    """In float32, what rounding takes off the total goes along as a part of its own."""

    class Recording(LibraryOperations):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def __call__(self, operation, /):
            def recorded(sums_MT2C, *vectors, **options):
                self.seen.append(sums_MT2C.double().sum((0, 1)))
                return operation.library(sums_MT2C, *vectors, **options)

            return recorded if operation is batch_norm_statistics else super().__call__(operation)

    x, seeds = 3 + torch.randn(2, 7, 7, 3), torch.randn(3, 2, programs.K)
    apart, together = Recording(), Recording()
    for operations, ranks in ((apart, ALONE), (together, Twins(size=2))):
        torch.manual_seed(0)
        student = to_batch_ensemble(programs.Foreign(), 3)
        move_(student, 1)
        synchronise_norms(student, ranks)
        trained(student, 3, torch.float32, operations, x, seeds)
    torch.testing.assert_close(together.seen[0], 2 * apart.seen[0], rtol=1e-13, atol=0)


def test_converting_keeps_every_name_and_goes_back():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), BatchNorm2d(4))
    keys, twins = list(network.state_dict()), Twins(size=2)
    synchronise_norms(network, twins)
    assert [norm.ranks for norm in network[1:]] == [twins, twins] and list(network.state_dict()) == keys
    copied = copy.deepcopy(network)
    synchronise_norms(copied, ALONE)
    assert type(copied[1]) is nn.BatchNorm2d and copied[2].ranks == ALONE and type(network[1]) is not nn.BatchNorm2d


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), type("Mine", (nn.BatchNorm2d,), {})(3), nn.SyncBatchNorm(3)])
def test_norms_that_are_not_known_are_named(norm):
    network = nn.Sequential(BatchNorm2d(3), norm)
    with pytest.raises(UserError, match=rf"--sync-bn: {type(norm).__name__} '1' keeps statistics.*nn.BatchNorm2d"):
        synchronise_norms(network, Twins(size=2))
    assert network[0].ranks == ALONE  # nothing was converted


def test_norms_without_statistics_of_a_batch_are_left_alone():
    network = nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.LayerNorm(3))
    synchronise_norms(network, Twins(size=2))
    assert [type(module) for module in network] == [nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm]


def test_one_process_communicates_nothing():
    tensors = [torch.randn(3), torch.randn(2)]
    before = [tensor.clone() for tensor in tensors]
    ALONE.average_(tensors)
    ALONE.broadcast_(tensors)
    ALONE.barrier()
    assert all(map(torch.equal, tensors, before)) and ALONE.sum_(tensors[0]) is tensors[0]
    assert torch.equal(ALONE.mean(tensors[0]), before[0]) and torch.equal(ALONE.gather_rows(tensors[0]), before[0])
    assert torch.equal(ALONE.gather(tensors[0]), before[0][None])
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.first(lambda: 3) == 3 and ALONE.is_first
    assert ALONE.share(7) == range(7) and ALONE.part(7) == range(7)
    with pytest.raises(ValueError, match="rows: got None on every rank"):
        ALONE.gather_rows(None)
    network = nn.BatchNorm2d(3)
    with averaged_statistics(network, ALONE):
        assert torch.equal(network.running_var, torch.ones(3))
    assert gather_statistics(network, ALONE).keys() == {"running_mean", "running_var"}


def test_a_batch_is_shared_evenly_or_refused():
    assert [Ranks(rank=r, size=4).share(128) for r in (0, 3)] == [range(0, 32), range(96, 128)]
    with pytest.raises(UserError, match=r"batch size 130: .* among 4; set it to 128 or 132, or"):
        Ranks(rank=1, size=4).share(130)
    with pytest.raises(UserError, match=r"batch size 3: .* among 4; set it to 4, or"):
        Ranks(rank=1, size=4).share(3)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_parts_are_in_order_and_even(count):
    parts = [Ranks(rank=r, size=3).part(count) for r in range(3)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_statistics_of_other_runs_are_refused():
    network = nn.BatchNorm2d(3)
    stored = gather_statistics(network, ALONE)
    with pytest.raises(UserError, match=r"written by 1 processes.*resumed by 2; start as many"):
        scatter_statistics(network, stored, Ranks(size=2))
    with pytest.raises(ValueError, match="running_mean"):
        scatter_statistics(nn.BatchNorm2d(4), stored, ALONE)
    with pytest.raises(ValueError, match=r"0\.running_mean"):
        scatter_statistics(nn.Sequential(network), stored, ALONE)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK; start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE=two, expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 LOCAL_RANK=0 WORLD_SIZE=2, expected"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "process 1 of 2 found no others at .*start all of them"),
    ],
)
def test_torchruns_variables_are_checked(variables, message, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), from_environment(CPU):
        pytest.fail("entered")


@pytest.mark.parametrize(
    "device, message", [("cuda", "LOCAL_RANK=1: this machine has 1 usable"), ("cuda:1", "--device")]
)
def test_every_process_has_a_gpu_of_its_own(device, message, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=message), from_environment(torch.device(device)):
        pytest.fail("entered")


def test_without_torchrun_or_with_one_process_there_is_nobody_else(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with from_environment(CPU) as ranks:
        assert ranks is ALONE
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with from_environment(CPU) as ranks:
        assert ranks is ALONE


@pytest.mark.values(raises=torch.distributed.DistBackendError)  # an emulated GPU has no NCCL
@pytest.mark.gpu
def test_a_graph_captures_the_average():
    """NCCL with one process that takes itself for one of two: sums are its own, and means half of them."""
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    try:
        tensors = [torch.ones(1000, device="cuda"), torch.ones(3, 4, device="cuda", dtype=torch.bfloat16)]
        ranks = Ranks(size=2)
        ranks.average_(tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ranks.average_(tensors)
        for replay in range(1, 4):
            graph.replay()
            assert all((tensor == 0.5 ** (replay + 1)).all() for tensor in tensors)
        del graph
    finally:
        torch.distributed.destroy_process_group()

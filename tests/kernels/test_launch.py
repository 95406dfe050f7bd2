"""Launches: which kernels may be placed before the one before them has ended."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from ensdistill import kernels
from ensdistill.kernels import launch
from ensdistill.kernels.loss import record, squares
from ensdistill.kernels.philox import counter_of

FOLDER = Path(inspect.getfile(kernels)).parent


def kernels_launched() -> Counter[str]:
    """Count the kernels that some module of kernels launches: first arguments of `launch`."""
    found: Counter[str] = Counter()
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name == "launch" and isinstance(node.args[0], ast.Name) and node.args[0].id.endswith("_kernel"):
                found[node.args[0].id] += 1
    return found


def test_every_kernel_waits_for_the_one_before_it():
    """Or it is not launched early: one that reads before `begin()` would read what is still being written."""
    launched = kernels_launched()
    assert len(launched) > 25
    waiting = set()
    for path in FOLDER.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in launched:
                first = next(line for line in node.body if not isinstance(getattr(line, "value", None), ast.Constant))
                if ast.unparse(first) == "begin()":
                    waiting.add(node.name)
    assert set(launched) - waiting == {"member_conv_persistent_kernel"}  # Gluon has no such instruction


@triton.jit
def late_kernel(p_x):
    p_x += 1
    launch.begin()


@triton.jit
def early_kernel(p_x):
    """With a docstring."""
    begin()  # noqa: F821 - the name is all that counts
    p_x += 1


@pytest.mark.parametrize(
    ("arch", "kernel", "dependent", "early"),
    [
        (90, early_kernel, True, True),
        (100, early_kernel, True, True),
        (80, early_kernel, True, False),  # has no such launch
        (90, early_kernel, False, False),
        (90, late_kernel, True, False),
    ],
)
def test_who_is_launched_early(arch, kernel, dependent, early, monkeypatch):
    monkeypatch.setattr(launch, "dependent", dependent)
    options = launch._of_launch(kernel, GPUTarget("cuda", arch, 32))
    assert options == ({"launch_pdl": True} if early else {})
    assert launch._of_launch(kernel, None) == {}


@pytest.mark.gpu
def test_a_recorded_launch_can_be_launched(device):
    """A recorder is given the options of the launch itself."""
    x, seen = torch.randn(100, device=device), []
    squared = squares.HalfSquares([x], [1.0])
    with launch.recording(lambda *recorded: seen.append(recorded)):
        squared()
    (kernel, grid, args, options), sums = seen[0], torch.zeros(1, device=device)
    launch.launch(kernel, grid, *args[:2], sums, *args[3:], **options)
    torch.testing.assert_close(sums[0], x.square().sum() / 2)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs compute capability 9.0"
)
def test_a_chain_of_dependent_launches_computes_what_one_after_another_does(device, monkeypatch):
    """Each kernel reads what the one before wrote, eagerly and in a graph, 200 times."""
    x = torch.randn(1 << 22, device=device)
    squared = squares.HalfSquares([x], [1.0])
    results = {}
    for dependent in (True, False):
        monkeypatch.setattr(launch, "dependent", dependent)
        table, counter = torch.zeros(64, 1, 1, dtype=torch.float64, device=device), counter_of(0, 0, 0, device)

        def chain(table=table, counter=counter):
            record.record(table, counter, [squared()], kernel=True)

        for _ in range(3):
            chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                chain()
        for _ in range(10):
            graph.replay()
        results[dependent] = (table.cpu(), counter.tolist())
    assert results[True][1] == results[False][1] == [0, 203, 0]
    assert torch.equal(results[True][0], results[False][0])

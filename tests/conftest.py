"""Where there is no GPU, kernels run in Triton's interpreter; this must be said before any of them is imported.

Beside each other test processes have a thread each: on tiny networks two that share two cores take twice as long.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU, or the CPU with interpreted kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Products and convolutions in fp32 that round no operand to tf32.

    Set by hand: these flags are no attributes of their objects, and monkeypatch ends in an error where it deletes them.
    """
    flags: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Count the processes of `-n auto`: a core each, at most 8 (each takes 1 GB); 4 where they share a GPU."""
    return min(len(os.sched_getaffinity(0)), 4 if torch.cuda.is_available() else 8)


_LONGEST = ("test_many_processes.py", "test_fast_train.py", "test_plan.py", "test_kills.py")
"""Files that take longest: they come first, so that no process is left with one of them at the end."""


def pytest_collection_finish() -> None:
    """Keep what was imported out of every later collection of garbage: among so many objects each takes 0.2 s."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-values",
        action="store_true",
        help="kernels compute nothing here (an emulated GPU): tests marked `values` may fail in what they assert, and "
        "in nothing else",
    )
    parser.addoption(
        "--chaos",
        type=int,
        default=8,
        metavar="N",
        help="trials of each campaign in tests/chaos, some N (`make chaos`: 1,000); few, of every kind, by default",
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; mark those of kernels, which compare values, all of them."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent / "kernels"):
            item.add_marker("values")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if (mark := item.get_closest_marker("values")) and config.getoption("--no-values"):
            reason = "compares values, where kernels compute nothing"
            item.add_marker(
                pytest.mark.xfail(raises=mark.kwargs.get("raises", AssertionError), strict=False, reason=reason)
            )

"""Benchmarks of operations and steps; those marked `gpu` are skipped where there is none.

`PROVIDERS=triton,library` in the environment keeps those of these providers (or backends), and those that have none.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def _provider(item: pytest.Item) -> str | None:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return parameters.get("provider", parameters.get("backend"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and keep the wanted providers."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    if wanted := [name.strip() for name in os.environ.get("PROVIDERS", "").split(",") if name.strip()]:
        others = [item for item in items if _provider(item) not in (None, *wanted)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _provider(item) in (None, *wanted)]


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks: list[Any]) -> None:
    """Leave out a benchmark that was cut off before its first round: its lack of data would cost all others theirs."""
    benchmarks[:] = [one for one in benchmarks if one.has_error or one.stats.data]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    """Reset dynamo: past eight compiled variants, of all cases together, torch.compile gives up silently."""
    torch._dynamo.reset()

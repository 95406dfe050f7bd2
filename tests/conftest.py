"""Where there is no GPU, kernels run in Triton's interpreter; this must be said before any of them is imported."""

from __future__ import annotations

import os
from pathlib import Path

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-values",
        action="store_true",
        help="kernels compute nothing here (an emulated GPU): tests marked `values` may fail in what they assert, and "
        "in nothing else",
    )


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none; those of kernels compare values, all of them."""
    for item in items:
        if item.path.parent == Path(__file__).parent / "kernels":
            item.add_marker("values")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if (mark := item.get_closest_marker("values")) and config.getoption("--no-values"):
            reason = "compares values, where kernels compute nothing"
            item.add_marker(
                pytest.mark.xfail(raises=mark.kwargs.get("raises", AssertionError), strict=False, reason=reason)
            )

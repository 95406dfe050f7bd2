"""Benchmarks share tests/'s networks and rivals; those marked `gpu` are skipped where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))

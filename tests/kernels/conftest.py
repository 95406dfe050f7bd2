"""Memory for the tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import fresh_memory_is_nan


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill `torch.empty` with NaN, so that what a kernel leaves out shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    with fresh_memory_is_nan():
        yield

"""Faults of a run of several processes: one that is silent, and ones that were started with something else."""

from typing import Any

Store = Any
"""A `torch.distributed.Store`, a name that PyTorch does not export for type checkers."""

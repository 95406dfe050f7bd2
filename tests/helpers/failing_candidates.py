"""Candidates that fail, each in a way of its own. Another process imports them by this module's name."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensdistill.engine.launch_key import Key
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.measuring import DeviceLost


@dataclass(frozen=True, kw_only=True)
class Aborts(Candidate):
    """Ends its process, as a fault in native code does."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        os.abort()


@dataclass(frozen=True, kw_only=True)
class Hangs(Candidate):
    """Never comes back."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        time.sleep(600)


@dataclass(frozen=True, kw_only=True)
class Raises(Candidate):
    """Does not compile."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        raise RuntimeError("does not compile\nfor a long reason")


@dataclass(frozen=True, kw_only=True)
class Breaks(Candidate):
    """Leaves the device unusable, as an illegal access does."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        raise DeviceLost(self, "an illegal memory access was encountered")


@dataclass(frozen=True, kw_only=True)
class AbortsLater(Candidate):
    """Right at first; ends its process once it is timed."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        count = globals().setdefault("_count", [0])
        count[0] += 1
        if count[0] > 3:  # verified once, then run over both sets of inputs
            os.abort()
        return Candidate(provider="library").run(key, tensors, options)


@dataclass(frozen=True, kw_only=True)
class Wrong(Candidate):
    """Computes something else."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        out = Candidate(provider="library").run(key, tensors, options)
        return out._replace(y=1.1 * out.y)


@dataclass(frozen=True, kw_only=True)
class Full(Candidate):
    """Finds no memory."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        raise torch.OutOfMemoryError("out of memory")

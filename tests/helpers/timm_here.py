"""timm beside a PyTorch for CPUs, whose torchvision is built for CUDA."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch

_library: list[torch.library.Library] = []  # what it defines goes with it


def define_operators() -> None:
    """Let a torchvision for CUDA be imported, by timm, Lightning or whoever, beside a PyTorch for CPUs.

    It cannot load its operators there, but asks for them as it is imported. So they are defined here, without anything
    to compute them: no classifier calls them, and timm's networks are what they are with them.
    """
    found = importlib.util.find_spec("torchvision")
    if found and not _library and not torch.version.cuda and "+cpu" not in importlib.metadata.version("torchvision"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.append(library)


def import_timm() -> Any:
    """Import timm, or skip the test that calls."""
    define_operators()
    return pytest.importorskip("timm", reason="no timm with a torchvision of this PyTorch", exc_type=ImportError)

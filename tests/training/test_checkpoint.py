"""A checkpoint whose values are of other types is refused in one line, whoever wrote it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import small_state

from ensdistill.runtime.errors import UserError
from ensdistill.training.checkpoint import checkpoint_step, save_checkpoint
from ensdistill.training.loop import Loop

WRONG: list[dict[str, Any]] = [
    {"step": "3"}, {"step": -1}, {"step": 1 << 70}, {"step": True}, {"format": torch.ones(2)}, {"progress": 5},
    {"progress": [5]}, {"progress": []}, {"progress": [{"epochs": "x"}]}, {"progress": [{"seconds": float("nan")}]},
    {"progress": [{"images": 10**30}]}, {"progress": [{"log": 3}]},
    {"progress": [{"log": {"lines": -1, "bytes": 0, "event_bytes": 0}}]}, {"progress": [{"log": {"lines": 1}}]},
    {"student": None}, {"student": {"a": 1}}, {"statistics": None}, {"statistics": {"a": None}}, {"optimizer": []},
    {"optimizer": {"state": 5}}, {"optimizer": {"state": [torch.zeros(())]}},
]  # fmt: skip


def test_values_of_other_types_are_refused(tmp_path):
    state, _ = small_state("ce")
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state, [{"epochs": 1}])
    loop: Any = SimpleNamespace(trainees=[None], _checkpoint=path, state=state)
    assert Loop._load(loop)[0][0].epochs == 1
    whole = torch.load(path, weights_only=True)
    for wrong in WRONG:
        torch.save(whole | wrong, path)
        with pytest.raises(UserError) as error:
            checkpoint_step(path)
            Loop._load(loop)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value), wrong

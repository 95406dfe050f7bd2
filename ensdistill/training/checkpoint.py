"""Checkpoints: everything that a step changes, in one file that is whole or absent, read without pickle's freedom."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ensdistill.models.synced_norm import gather_statistics, scatter_statistics
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write, damaged_part
from ensdistill.training.optimizer import restore_optimizer
from ensdistill.training.step import State

FORMAT = 1


def save_checkpoint(path: Path, state: State, progress: list[dict[str, Any]]) -> None:
    """Write `state` and `progress` (plain numbers and strings) of every network of it.

    All ranks call it; the first writes, for all have the same parameters, and every one's running statistics. A cut-off
    write leaves the previous file as it was.
    """
    content = stored(state)
    if not state.ranks.is_first:
        return
    content |= {"format": FORMAT, "progress": progress}
    whole = io.BytesIO()  # torch.save says of a full disk that it is an internal error
    torch.save(content, whole)
    with atomic_write(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def stored(state: State) -> dict[str, Any]:
    """Everything that a step changes, as tensors and numbers; all ranks call it."""
    content = {
        "step": state.step,
        "student": state.student.state_dict(),
        "statistics": gather_statistics(state.student, state.ranks),
        "optimizer": state.optimizer.state_dict(),
    }
    if state.ema is not None:
        content["ema"] = state.ema.stored(state.ranks)
    if state.swa is not None:
        content["swa"] = state.swa.stored()
    return content


def restore(state: State, content: dict[str, Any]) -> None:
    """Set `state` to what `stored` gave.

    Raises:
        UserError: that was of another number of processes.
        RuntimeError, ValueError, LookupError, TypeError, AttributeError: that was of another network.
    """
    state.student.load_state_dict(content["student"])
    if "statistics" in content:  # not in those of an earlier version
        scatter_statistics(state.student, content["statistics"], state.ranks)
    restore_optimizer(state.optimizer, content["optimizer"])
    if state.ema is not None:
        state.ema.restore(content["ema"], state.ranks)
    if state.swa is not None:
        state.swa.restore(content["swa"])
    state.step = content["step"]


def load_checkpoint(path: Path, state: State) -> list[dict[str, Any]]:
    """Set `state` to what `save_checkpoint` wrote, and return its `progress`.

    Raises:
        UserError: not a checkpoint, truncated, of another format, of another network, or of another number of
            processes.
    """
    content = _read(path)
    try:
        restore(state, content)
    except UserError as error:  # a ValueError too, and says already what it is
        raise UserError(f"{path}: {error}") from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: belongs to another network ({first}); choose another --out") from error
    progress: list[dict[str, Any]] = content["progress"]
    return progress


def checkpoint_step(path: Path) -> int:
    """The updates done by the checkpoint at `path`; 0 where there is none.

    Raises:
        UserError: as `load_checkpoint`.
    """
    return _read(path)["step"] if path.exists() else 0


def _read(path: Path) -> dict[str, Any]:
    try:
        if (part := damaged_part(path)) is not None:
            raise ValueError(f"{part} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file, none of them its own
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to start this network anew"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is not int or found != FORMAT:
        raise UserError(f"{path}: not a checkpoint of format {FORMAT}; delete it to start this network anew")
    step, progress = content.get("step"), content.get("progress")
    if isinstance(progress, dict):  # an earlier version trained one at a time
        content["progress"] = progress = [progress]
    is_progress = isinstance(progress, list) and all(isinstance(one, dict) for one in progress)
    if type(step) is not int or not 0 <= step < 1 << 63 or not is_progress:
        raise UserError(f"{path}: not a checkpoint's step and progress; delete it to start this network anew")
    return content

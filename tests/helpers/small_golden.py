"""A golden file small enough for Triton's interpreter: the official networks on small images, by our own definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ensdistill import verify
from ensdistill.formats.golden import Golden

E, B, SIZE = 2, 2, 8


def small_golden(official: Path, path: Path) -> dict[str, np.ndarray]:
    """Cut the official file to `E` members and `B` images of `SIZE` pixels; write what plain PyTorch makes of that."""
    arrays = dict(np.load(official, allow_pickle=False))
    for name in [name for name in arrays if name.startswith(("teacher2/", "teacher3/"))]:
        del arrays[name]
    for name, array in arrays.items():
        if name.startswith("latentbe") and name.endswith(("/r", "/s")):
            arrays[name] = array[:E]
        elif name.endswith("/pair"):
            arrays[name] = np.array([1, 0], array.dtype)
    arrays["images"] = arrays["images"][:, :B, :SIZE, :SIZE]
    arrays["labels"] = arrays["labels"][:, :B]
    arrays["merged/images"] = arrays["merged/images"][: 2 * B, :SIZE, :SIZE]
    np.savez(path, **arrays)
    arrays.update(computed(path))
    np.savez(path, **arrays)
    return arrays


def computed(path: Path, **how: Any) -> dict[str, np.ndarray]:
    """Compute what the networks and images of a file give, in float32's numbers; `how`: see `verify.Replay`."""
    replay = verify.Replay(Golden(path), **how)
    others = (verify.Replay.schedule, verify.Replay.metrics)
    found = (one for section in verify.SECTIONS if section not in others for one in section(replay))
    return {name: array.astype(np.float32) for one in found for name, array in one.arrays.items()}

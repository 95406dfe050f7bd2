"""A golden file small enough for Triton's interpreter: the official networks on small images, by our own definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensdistill import verify

E, B, SIZE = 2, 2, 8


def write_small_golden(official: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    arrays["teacher_log_confidences_clean"] = arrays["teacher_log_confidences_clean"][:, :E, :B]
    for step in (0, 1):
        name = f"latentbe_tdiv_sdiv/step{step}/perturbed_images"
        arrays[name] = arrays[name][:B, :SIZE, :SIZE]

    computed: dict[str, np.ndarray] = {}
    after: list[dict[str, np.ndarray]] = []
    official_from_state_dict, update = verify.official_from_state_dict, verify.update
    shown: list[np.ndarray] = []

    def record(name, ours, golden, tolerance):
        computed[name] = verify._array(ours)
        return verify.Check(name, 0.0, tolerance)

    def record_after(state_dict):
        after.append(official_from_state_dict(state_dict))
        return after[-1]

    def record_shown(state, config, x_BCHW, labels_B, lr):
        shown.append(x_BCHW.permute(0, 2, 3, 1).numpy().copy())
        return update(state, config, x_BCHW, labels_B, lr)

    np.savez(path, **arrays)
    with monkeypatch.context() as patched:
        patched.setattr(verify, "relative", record)
        patched.setattr(verify, "official_from_state_dict", record_after)
        patched.setattr(verify, "update", record_shown)
        list(verify.verify(verify.Golden(path)))
    names = [name for name in computed if name in arrays and not name.startswith(("lr_schedule", "metrics/"))]
    arrays.update({name: computed[name].astype(np.float32) for name in names})
    for run, tensors in zip(verify.RUNS, after, strict=True):
        arrays.update({f"{run}/after/{name}": array for name, array in tensors.items()})
    for step, images in enumerate(shown[-2:]):
        arrays[f"latentbe_tdiv_sdiv/step{step}/perturbed_images"] = images
    np.savez(path, **arrays)

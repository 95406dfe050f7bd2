"""A whole job that takes a second, what came of it, and what must hold of a folder whose job was killed.

Two teachers, and students that learn from them, for two epochs of two steps each, on sixteen images.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import Tensor, nn

from ensdistill.formats.ours import read_safetensors
from ensdistill.runtime.files import damaged_part

EPOCHS = 2
ARGUMENTS = (
    "--network small_job:network --members 2 --recalibrate-bn "
    f"--teacher.epochs {EPOCHS} --teacher.warmup-epochs 1 --teacher.batch-size 8 "
    f"--student.epochs {EPOCHS} --student.warmup-epochs 1 --student.batch-size 8 "
    "--precision fp32 --threads 1 --log-every 1 --monitor-every 0"
).split()
FEW = ("--methods", "kd", "latentbe+tdiv-sdiv")
"""A network without members, and one with: every kind of file that a run has."""
ALL = ("--methods", "ce", "kd", "latentbe+tdiv-sdiv", "be", "hydra")
NUM_NETWORKS = 7


class Small(nn.Module):
    """A convolution and a head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.trunk, self.head = nn.Sequential(*layers), nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def split_head(self) -> tuple[nn.Module, nn.Module]:
        return self.trunk, self.head


def network(num_classes: int = 2) -> nn.Module:
    """Build the network of the job, for `--network`."""
    return Small(num_classes)


def write_images(folder: Path) -> None:
    """Write the images of the job, for `--data`."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 16), ("valid", 8), ("test", 8)):
        np.save(folder / f"{split}_images.npy", rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8))
        np.save(folder / f"{split}_labels.npy", np.arange(count) % 2)


def command(images: Path, out: Path, *more: str) -> list[str]:
    """Arguments of `fast_train` for the job in `out`, which is `RUN` in a folder of its own: data lie beside it."""
    return ["--data", str(images), "--out", str(out), *ARGUMENTS, *more]


_TIMED = (
    "sha256",  # of values that have times among them
    "images_per_s",
    "data_wait",
    "seconds",
    "floor_share",
    "device",
    "cost",
    "peak_gb",
    "peak_bytes",
    "waited",
    "busy",
    "tables",  # with times in them
)


def outcome(out: Path) -> dict[str, Any]:
    """Everything that a finished job has left that no clock decides, by file."""
    found: dict[str, Any] = {}
    for path in sorted(out.parent.rglob("*")):
        name = str(path.relative_to(out.parent))
        if path.is_dir():
            continue
        if path.suffix == ".safetensors":
            metadata, tensors = read_safetensors(path)
            bits = {key: (tensor.shape, tensor.numpy().tobytes()) for key, tensor in tensors.items()}
            found[name] = {"metadata": metadata, "tensors": bits}
        elif path.name == "metrics.jsonl":
            found[name] = [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
        elif "tfevents" in path.name:
            found[name] = _scalars(path)
        elif path.name in ("results.json", "outcome.json"):
            found[name] = _untimed(json.loads(path.read_text()))
        elif path.name in ("results.txt", "report.html", "environment.json", ".lock"):
            found[name] = "there"  # times, and the process
        else:
            found[name] = hashlib.sha256(path.read_bytes().replace(bytes(out.parent), b"")).hexdigest()
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in _TIMED}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def _scalars(path: Path) -> list[tuple[int, str, float]]:
    """Steps, tags and values of TensorBoard's events."""
    return [
        (event.step, value.tag, value.simple_value)
        for event in LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
        if not value.tag.endswith(_TIMED)
    ]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of the files that differ, are missing, or are too many."""
    names = found.keys() | expected.keys()
    return sorted(name for name in names if found.get(name) != expected.get(name))


def finished_epochs(out: Path) -> dict[str, int]:
    """Number of finished epochs of every network, by the name of its folder, as `--resume` will find it."""
    found = {path.parent.name: EPOCHS for path in out.glob("*/*/outcome.json")}
    for path in out.glob("*/*/checkpoint.pt"):
        if path.parent.name not in found:
            found[path.parent.name] = torch.load(path, weights_only=True)["progress"][0]["epochs"]
    return found


def halves(folder: Path) -> list[str]:
    """What is wrong with files in `folder` that have their final names: they have to be whole at every moment."""
    wrong = []
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                read_safetensors(path)
            elif path.suffix == ".pt":
                assert damaged_part(path) is None
                torch.load(path, weights_only=True)
        except Exception as error:  # whatever a reader says of it
            wrong.append(f"{path}: {error!r}")
    return wrong

"""A run folder without a run: networks of drawn logits, measured and kept as a run does it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensdistill.report.records import Shown, ShownImages, write_predictions, write_shown
from ensdistill.run.kept import predictions
from ensdistill.run.metrics import Measures, diversity, measures, member_values

# How much better than chance each is, and how overconfident; by the name of its rows.
SKILL = {"teacher ensemble": (3.0, 1.0), "single teacher": (2.6, 1.3), "ce": (2.6, 1.5), "kd": (3.0, 2.2)}


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """What was written."""

    path: Path
    """The folder."""
    labels_N: torch.Tensor
    """Labels of the test images."""
    logits: Mapping[str, Sequence[torch.Tensor]]
    """Test logits (N, E, K) of every row, by name."""
    measures: Mapping[str, Sequence[Measures]]
    """Measures of every row."""


def write_run(
    path: Path,
    *,
    methods: Sequence[str] = ("kd", "latentbe+tdiv-sdiv"),
    seed: int = 0,
    seeds: int = 1,
    K: int = 10,
    N: int = 200,
    E: int = 3,
    side: int = 8,
    class_names: Sequence[str] = (),
    absent: int | None = None,
    config: Mapping[str, Any] = {},
) -> SmallRun:
    """Write a run folder.

    Args:
        absent: a class without a test image.
    """
    generator = torch.Generator().manual_seed(seed)
    names = tuple(class_names) or tuple(f"class {k}" for k in range(K))
    splits = [torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(9 + i)) for i in range(2)]
    if absent is not None:
        splits = [torch.where(labels == absent, (absent + 1) % K, labels) for labels in splits]
    labels_N, val_labels_N = splits
    hard = [torch.randn(N, K, generator=torch.Generator().manual_seed(5 + i)) for i in range(2)]

    def logits(name: str, members: int) -> list[torch.Tensor]:
        skill, scale = SKILL.get(name, (3.2, 1.6))
        return [
            scale * (skill * torch.nn.functional.one_hot(labels, K)[:, None] + common[:, None] + 0.8 * noise)
            for labels, common, noise in zip(
                splits, hard, torch.randn(2, N, members, K, generator=generator).unbind(), strict=True
            )
        ]

    rows: list[dict[str, Any]] = []
    kept, all_logits, all_measures = [], {}, {}
    found = [("teacher ensemble", E, None)] + [("single teacher", 1, f"teachers/{t}") for t in range(E)]
    found += [(method, 1, f"students/{method}-seed{n}") for n in range(seeds) for method in methods]
    for name, members, folder in found:
        test_NEK, val_NEK = logits(name, members)
        measured = measures(test_NEK, labels_N, val_NEK, val_labels_N)
        kept.append((name, predictions(test_NEK, labels_N, measured.temperature)))
        row = {"name": name, "measures": asdict(measured), "folder": folder, "seconds": 60.0, "averaging": {}}
        if name.startswith(("latentbe", "be", "hydra")) or members > 1:
            members_NMK = test_NEK if members > 1 else logits(name, E)[0]
            row["diversity"] = asdict(diversity(members_NMK))
            row["averaging"] = member_values(members_NMK, labels_N) if members == 1 else {}
        rows.append(row)
        all_logits.setdefault(name, []).append(test_NEK)
        all_measures.setdefault(name, []).append(measured)
    inference = {name: {"macs": 1e6 * (E if members > 1 else 1), "images_per_s": 900.0 / members}
                 for name, members, _ in found}  # fmt: skip
    settings = {"recipe": "small", "network": "wrn10x1", "members": E, "seed": seed, "methods": list(methods)}
    training = {"epochs": 10, "batch_size": 20}
    settings |= {"teacher": training, "student": training, "teachers": [], **config}
    cells = [[row["name"], f"{100 * row['measures']['acc']:.2f}\n±1.00"] for row in rows]
    tables = [{"title": "a table", "columns": ["", "ACC\nof it"], "rows": cells}]
    _json(path / "results.json", {"rows": rows, "tables": tables, "inference": inference, "config": settings})
    _json(path / "config.json", settings)
    _json(path / "environment.json", {"device": "a device", "precision": "fp32", "versions": {"torch": "2.13.0"}})
    _json(path / "data.json", {"class_names": names, "counts": {"train": 100, "valid": N, "test": N}})
    write_predictions(path / "predictions.npz", labels_N.numpy(), kept)
    for name, _, folder in found:
        if folder is not None:
            _log(path / folder / "metrics.jsonl", has_members=name.startswith(("latentbe", "be", "hydra")))
    perturbed = [method for method in methods if "+" in method]
    if perturbed:
        _shown(path / "shown.npz", perturbed, side=side, E=E, K=K)
    return SmallRun(path=path, labels_N=labels_N, logits=all_logits, measures=all_measures)


def _log(path: Path, *, has_members: bool) -> None:
    lines: list[dict[str, Any]] = []
    for step in range(1, 51):
        epoch = math.ceil(step / 5)
        lines.append({"kind": "train", "step": step, "loss": 3 / step, "loss_kd": 2 / step + 0.5, "images_per_s": 400.0,
                      "epoch": epoch})  # fmt: skip
        lines.append({"kind": "device", "step": step, "utilisation": 0.5 + 0.4 * math.sin(step), "power_w": None})
        if step % 5 == 0:
            acc = 1 - 0.5 / epoch
            line = {"kind": "valid", "step": step, "acc": acc, "nll": 1 - acc, "epoch": epoch}
            if has_members:
                line |= {"members_acc": acc - 0.02, "ensemble_acc": acc + 0.01}
            lines.append(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "trai')  # of a lost process


def _shown(path: Path, methods: Sequence[str], *, side: int, E: int, K: int) -> None:
    draw = np.random.default_rng(0)
    n = min(8, K)

    def classes() -> np.ndarray:
        return draw.integers(0, K, (n, E)).astype(np.uint16)

    write_shown(
        path,
        ShownImages(
            images_nHWC=draw.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
            labels_n=np.arange(n),
            kl_n=draw.random(n, dtype=np.float32),
            classes_nE=classes(),
            methods={
                name: Shown(
                    steps_nHWC=(draw.standard_normal((n, side, side, 3)) / 255).astype(np.float16),
                    kl_n=draw.random(n, dtype=np.float32),
                    classes_nE=classes(),
                )
                for name in methods
            },
        ),
    )


def _json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))

"""A run folder as a report reads it: what is there, and in words what is not. Nothing of it is trusted or required.

Only `results.json` must be there. A file that is missing, damaged or of another version costs its own part of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ensdistill.report.records import (
    PREDICTIONS_FILE,
    SHOWN_FILE,
    KeptPredictions,
    Predictions,
    ShownImages,
    read_predictions,
    read_shown,
)
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import parse_json, read_json

T = TypeVar("T")
AWAY_FILE = "away.json"
TEACHERS = ("teacher ensemble", "single teacher")
"""Names of rows that are no students."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network, or ensemble, of the results."""

    name: str
    """Name in the tables; rows of one name are seeds of one thing."""
    values: Mapping[str, Any]
    """Its fields in results.json."""
    predictions: Predictions | None = None
    """Its predictions on the test images."""
    run_seed: int = 0
    """Seed of the run that it is of."""
    place: int = 0
    """Place among the rows of its name in that run."""

    def measure(self, name: str) -> float:
        """A measure on the test images; nan where it is not known."""
        measures = self.values.get("measures")
        return number(measures.get(name)) if isinstance(measures, Mapping) else math.nan

    def group(self, name: str) -> Mapping[str, float]:
        """A field that holds numbers by name, such as `averaging`."""
        found = self.values.get(name)
        return {key: number(value) for key, value in found.items()} if isinstance(found, Mapping) else {}


@dataclass(frozen=True, kw_only=True)
class Training:
    """The log of one network's training."""

    name: str
    """Name of the network in the tables."""
    folder: str
    """Its folder in the run's."""
    is_student: bool
    """False for a teacher."""
    batch_size: int
    """Images a step."""
    epochs: int
    """Epochs of its schedule."""
    lines: Mapping[str, Mapping[str, np.ndarray]]
    """Lines of the log by kind (train, valid, device): each value's numbers, nan where a line has none."""

    def series(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs, a part of one included, and values where they are known."""
        lines = self.lines.get(kind, {})
        if name not in lines:
            return np.empty(0), np.empty(0)
        known = np.isfinite(lines[name])
        return lines["at_epoch"][known], lines[name][known]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Everything that is known of a run."""

    path: Path
    """The folder."""
    label: str
    """Name on the page."""
    rows: tuple[Row, ...]
    """Rows of the results."""
    results: Mapping[str, Any]
    """All of results.json."""
    config: Mapping[str, Any]
    """Configuration."""
    environment: Mapping[str, Any]
    """Versions and devices."""
    class_names: tuple[str, ...]
    """Names of the classes; empty where they are not known."""
    counts: Mapping[str, int]
    """Number of images of each split."""
    labels_N: np.ndarray | None
    """Labels of the test images."""
    trainings: tuple[Training, ...]
    """Logs, teachers first."""
    shown: ShownImages | None
    """Images as students were shown them."""
    away: Mapping[str, Any] | None
    """Measures away from the training data, as `ensdistill.evaluate` writes them."""
    missing: list[str] = field(default_factory=list)
    """What could not be read, and what brings it."""

    @property
    def seed(self) -> int:
        """Key of the run's draws."""
        return int(number(self.config.get("seed", 0)) or 0)

    def class_name(self, k: int) -> str:
        """Name of class `k`."""
        return self.class_names[k] if k < len(self.class_names) else str(k)


def number(value: Any) -> float:
    """The number that a value of results.json is, where infinity and nan are text; nan for anything else."""
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def read_run(path: Path) -> RunFolder:
    """Read what a run left.

    Raises:
        UserError: it holds no results: no run has ended there.
    """
    file = path / "results.json"
    try:
        results = read_json(file)
        rows = [row for row in results["rows"] if isinstance(row["name"], str)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else repr(error)
        raise UserError(
            f"{file}: no results of a run ({reason}); give the folder of a finished run, runs/digits for example, or "
            "write them: python -m ensdistill.fast_train … --stage evaluate"
        ) from error
    missing: list[str] = []

    def optional(read: Callable[[], T], otherwise: T, what: str) -> T:
        try:
            return read()
        except (OSError, ValueError, UserError) as error:
            missing.append(f"{what}: {'not there' if isinstance(error, FileNotFoundError) else error}")
            return otherwise

    def values(name: str) -> Callable[[], Mapping[str, Any]]:
        return lambda: _mapping(read_json(path / name))

    again = "written by the end of a run (fast_train … --stage evaluate writes it again)"
    nothing: Mapping[str, Any] = {}
    config: Mapping[str, Any] = results["config"] if isinstance(results.get("config"), dict) else nothing
    config = config or optional(values("config.json"), nothing, "config.json")
    environment = optional(values("environment.json"), nothing, "environment.json")
    data = optional(values("data.json"), nothing, "data.json")
    found = optional(lambda: read_predictions(path / PREDICTIONS_FILE), None, f"{PREDICTIONS_FILE}, {again}")
    if found is not None and not _fits(found, rows):
        missing.append(f"{PREDICTIONS_FILE}: of another evaluation than results.json; {again}")
        found = None
    perturbs = any("+" in row["name"] for row in rows)
    shown = optional(lambda: read_shown(path / SHOWN_FILE), None, f"{SHOWN_FILE}, {again}") if perturbs else None
    away = optional(values(AWAY_FILE), None, AWAY_FILE) if (path / AWAY_FILE).exists() else None
    names = data.get("class_names")
    counts = data.get("counts")
    run_seed = int(number(config.get("seed", 0)) or 0)
    places: dict[str, int] = {}
    made = []
    for i, row in enumerate(rows):
        places[row["name"]] = place = places.get(row["name"], -1) + 1
        made.append(
            Row(
                name=row["name"],
                values=row,
                predictions=found.rows[i] if found else None,
                run_seed=run_seed,
                place=place,
            )
        )
    return RunFolder(
        path=path,
        label=path.resolve().name,
        rows=tuple(made),
        results=results,
        config=config,
        environment=environment,
        class_names=tuple(map(str, names)) if isinstance(names, list) else (),
        counts={str(key): int(number(value)) for key, value in counts.items()} if isinstance(counts, dict) else {},
        labels_N=found.labels_N if found else None,
        trainings=tuple(_trainings(path, config, missing)),
        shown=shown,
        away=away,
        missing=missing,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _fits(found: KeptPredictions, rows: list[dict[str, Any]]) -> bool:
    """Tell whether predictions are of these rows: the same names, and the same accuracies."""
    if found.names != tuple(row["name"] for row in rows) or not len(found.labels_N):
        return False
    accuracies = [(one.predicted_N == found.labels_N).mean() for one in found.rows]
    return all(
        abs(acc - number(row["measures"]["acc"])) < 0.5 / len(found.labels_N)
        for acc, row in zip(accuracies, rows, strict=True)
    )


def _trainings(path: Path, config: Mapping[str, Any], missing: list[str]) -> Iterable[Training]:
    for folder in sorted(path.glob("teachers/*"), key=_in_order) + sorted(path.glob("students/*"), key=_in_order):
        log = folder / "metrics.jsonl"
        if not log.is_file():
            continue
        is_student = folder.parent.name == "students"
        stage = config.get("student" if is_student else "teacher")
        stage = stage if isinstance(stage, dict) else {}
        try:
            lines = _lines(log)
        except OSError as error:
            missing.append(f"{folder.relative_to(path)}/metrics.jsonl: {error}")
            continue
        yield Training(
            name=folder.name.rpartition("-seed")[0] if is_student else "single teacher",
            folder=str(folder.relative_to(path)),
            is_student=is_student,
            batch_size=int(number(stage.get("batch_size", 0)) or 0),
            epochs=int(number(stage.get("epochs", 0)) or 0),
            lines=lines,
        )


def _in_order(folder: Path) -> tuple[str, int]:
    name, _, seed = folder.name.rpartition("-seed")
    return name, int(seed) if seed.isdecimal() else 0


def _lines(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Columns of a log by kind, with `at_epoch`: the epochs done, by the step of the lines that end one."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_bytes().splitlines():
        try:
            values = parse_json(line)
            kinds.setdefault(str(values["kind"]), []).append(values)
        except (ValueError, TypeError, KeyError):
            continue  # damaged, or half of one
    steps_an_epoch = [
        number(values.get("step")) / number(values.get("epoch"))
        for values in kinds.get("valid", [])
        if number(values.get("epoch")) > 0
    ]
    per_epoch = steps_an_epoch[-1] if steps_an_epoch and steps_an_epoch[-1] > 0 else 1.0
    columns = {}
    for kind, lines in kinds.items():
        names = {name for values in lines for name in values} - {"kind"}
        columns[kind] = {name: np.array([number(values.get(name)) for values in lines]) for name in sorted(names)}
        if "step" in columns[kind]:
            columns[kind]["at_epoch"] = columns[kind]["step"] / per_epoch
    return {kind: column for kind, column in columns.items() if "at_epoch" in column}

"""Runs of one configuration as one: their networks are seeds of each other. Runs of several stand beside each other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensdistill.report.folder import TEACHERS, Row, RunFolder, Training

# Fields in which runs of one configuration may differ: the key of the draws, and the place of the data.
_MAY_DIFFER = ("seed", "data", "methods")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one configuration."""

    runs: tuple[RunFolder, ...]
    """The runs, of different seeds."""
    label: str
    """Name on the page."""

    @property
    def first(self) -> RunFolder:
        """The run that stands for what all have alike."""
        return self.runs[0]

    @property
    def names(self) -> list[str]:
        """Names of the rows, in the order of the tables."""
        return list(dict.fromkeys(row.name for run in self.runs for row in run.rows))

    @property
    def students(self) -> list[str]:
        """Names of students, without averages over time."""
        return [name for name in self.names if name not in TEACHERS and "," not in name]

    def rows(self, name: str) -> list[Row]:
        """Rows of one name, of all runs."""
        return [row for run in self.runs for row in run.rows if row.name == name]

    def mean(self, name: str, value: Callable[[Row], float]) -> float:
        """Mean of a value over the rows of `name`; nan where it is not known."""
        known = self.known(name, value)
        return statistics.fmean(known) if known else math.nan

    def known(self, name: str, value: Callable[[Row], float]) -> list[float]:
        """Values of the rows of `name`, as far as they are known and finite."""
        return [found for row in self.rows(name) if math.isfinite(found := value(row))]

    def trainings(self, name: str) -> list[Training]:
        """Logs of the networks of one name, of all runs."""
        return [training for run in self.runs for training in run.trainings if training.name == name]

    @property
    def labels_N(self) -> np.ndarray | None:
        """Labels of the test images, where all runs keep the same."""
        labels = [run.labels_N for run in self.runs]
        first = labels[0]
        if first is None or any(other is None or not np.array_equal(first, other) for other in labels):
            return None
        return first

    def correct_RN(self, name: str) -> np.ndarray | None:
        """Whether each row of `name` is right on each test image, bool; None where it is not known."""
        labels_N, rows = self.labels_N, self.rows(name)
        found = [row.predictions for row in rows]
        if labels_N is None or not rows or any(one is None for one in found):
            return None
        return np.stack([one.predicted_N == labels_N for one in found if one is not None])

    @property
    def num_images(self) -> int:
        """Number of test images; 0 where it is not known."""
        return self.first.counts.get("test", 0) if self.labels_N is None else len(self.labels_N)

    def label_of(self, name: str) -> str:
        """Name of a network in words."""
        method, comma, average = name.partition(",")
        words = {"single teacher": "one network on labels", "ce": "ce, one network on labels"}.get(method, method)
        if method == "single teacher" and self.first.config.get("teachers"):
            words = "one teacher"
        return f"{words}{comma}{average}"

    @property
    def target(self) -> str | None:
        """The network that the verdict is about: chosen by its method, not by how well it did.

        The averaged network shown the most, else any other student; None where there is none.
        """
        students = self.students
        for wanted in ("latentbe+tdiv-sdiv", "latentbe+tdiv", "latentbe+", "latentbe", "be", "hydra", "kd"):
            if found := next((name for name in students if name.startswith(wanted)), None):
                return found
        return None

    @property
    def baselines(self) -> list[str]:
        """Networks that the target is compared with: one on labels, and kd."""
        labels = next((name for name in ("ce", "single teacher") if name in self.names), None)
        kd = next((name for name in self.students if name == "kd"), None) or next(
            (name for name in self.students if name.startswith("kd")), None
        )
        return [name for name in (labels, kd) if name is not None and name != self.target]

    @property
    def main_names(self) -> list[str]:
        """Networks worth a figure of their own: the target, what it is compared with, and the teachers' ensemble."""
        wanted = [self.target, *reversed(self.baselines), "teacher ensemble"]
        return [name for name in wanted if name is not None and name in self.names]


def measure(name: str) -> Callable[[Row], float]:
    """Gives a measure of a row."""
    return lambda row: row.measure(name)


def groups_of(runs: Sequence[RunFolder]) -> tuple[list[Group], list[str]]:
    """Join runs of one configuration; and say what was left out.

    Two runs of one configuration and one seed are one run made twice: the second is no further seed.
    """
    joined: dict[str, list[RunFolder]] = {}
    notes = []
    for run in runs:
        alike = joined.setdefault(_key(run), [])
        if any(other.seed == run.seed for other in alike):
            notes.append(
                f"{run.path}: the same configuration and seed as {alike[0].path}: not counted as a further seed"
            )
            continue
        alike.append(run)
    several = len(joined) > 1
    groups = []
    for alike in joined.values():
        label = alike[0].label if several or len(alike) == 1 else f"{alike[0].config.get('recipe', alike[0].label)}"
        groups.append(Group(runs=tuple(alike), label=label))
    labels = [group.label for group in groups]
    if len(set(labels)) < len(labels):  # runs/a/digits and runs/b/digits
        groups = [Group(runs=group.runs, label=str(group.first.path)) for group in groups]
    return groups, notes


def _key(run: RunFolder) -> str:
    values: Mapping[str, Any] = {name: value for name, value in run.config.items() if name not in _MAY_DIFFER}
    names = tuple(run.class_names), tuple(sorted(run.counts.items()))
    return repr((sorted(values.items()), names)) if run.config else str(run.path)


def config_differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Fields of the configurations that differ, with the value of each group."""
    flat = [_flat(group.first.config) for group in groups]
    names = list(dict.fromkeys(name for values in flat for name in values))
    return {name: found for name in names if len(set(found := [_text(values.get(name)) for values in flat])) > 1}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _text(value: Any) -> str:
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)

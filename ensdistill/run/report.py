"""The end of a run: every network that is there, measured on the test images, as one table, and as report.html.

Measures come from the exported files, as anybody would load them. The temperature is fitted on the validation images
and written, with the measures, into the file that it belongs to.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from ensdistill.config.configs import Config
from ensdistill.config.recipes import RECIPES
from ensdistill.costs.floor import step_floor
from ensdistill.costs.network import NetworkCost, network_cost
from ensdistill.data.dataset import DataSet
from ensdistill.formats.ours import load_network, save_network
from ensdistill.monitor.readings import Figures, format_wh, spoiled, total_of
from ensdistill.report.records import Predictions
from ensdistill.run.display import PIPE_WIDTH
from ensdistill.run.job import Job, Run
from ensdistill.run.kept import cells_of, draw, inference, keep, predictions
from ensdistill.run.metrics import (
    Diversity,
    Measures,
    averaging_gap,
    diversity,
    ensemble_cnll_by_size,
    equivalent_size,
    format_dee,
    measures,
    member_values,
)
from ensdistill.runtime.cli import plain_console
from ensdistill.runtime.devices import Device, rates_of
from ensdistill.runtime.files import atomic_write
from ensdistill.training.loop import Progress

# Its curve takes a fitted temperature for every subset of the teachers: at 16 the end of a run would take hours.
MAX_DEE_TEACHERS = 10
_LEAST_FIRST = ("aECE", "Brier", "cost", "ACC last", "time", "DEE")
"""Columns that the main table leaves out of a narrow screen, one after another; results.txt has them all."""
_WIDE_SCREEN = plain_console(width=1000)


@dataclass(frozen=True, kw_only=True)
class NetworkRow:
    """One network, or one ensemble, measured on the test images."""

    name: str
    """Name in the table; rows of one name are seeds of one thing."""
    measures: Measures
    """Measures of the best epoch on validation."""
    dee: float | None
    """Deep-ensemble equivalent; None with more teachers than `MAX_DEE_TEACHERS`."""
    last_acc: float | None = None
    """Accuracy of the network of the last epoch."""
    seconds: float | None = None
    """Seconds of training; None where it was not trained here."""
    images_per_s: float | None = None
    """Speed of training, in images a second."""
    data_wait: float | None = None
    """Share of its time that the training waited for data."""
    floor_share: float | None = None
    """The floor of its steps divided by the time that they took; None where the device's rates are not known."""
    device: Figures | None = None
    """Device's utilisation, energy and throttling in training."""
    peak_gb: float | None = None
    """Peak memory of the tensors on a GPU; a CPU does not tell."""
    predicted_gb: float | None = None
    """Peak memory as predicted before training."""
    cost: float | None = None
    """Seconds relative to training one plain network, a teacher."""
    averaging: dict[str, float] = field(default_factory=dict)
    """Accuracy and NLL of the members' mean, their ensemble, what is shipped, and that with statistics of its own."""
    folder: str | None = None
    """Folder of its training in the run's, `students/kd-seed0`; None where it was not trained here."""
    diversity: Diversity | None = None
    """Differences between the members of a student."""
    predictions: Predictions | None = None
    """Predictions on the test images, which results.json leaves out."""


_Cell = Callable[[Sequence[NetworkRow]], str]
"""Makes one cell of a table from the rows of one name."""
_THREE = "{:z.3f}"


class Evaluation:
    """Measures networks of a job on its test images."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.val_feed, self.test_feed = job.eval_feed("valid"), job.eval_feed("test")
        self.teachers = teachers = job.load_teachers()
        val_NEK, val_labels_N = job.predict(teachers, self.val_feed)
        test_NEK, test_labels_N = job.predict(teachers, self.test_feed)
        self.teacher_logits = (test_NEK, test_labels_N, val_NEK, val_labels_N)
        self.cnll_by_size = ensemble_cnll_by_size(*self.teacher_logits) if teachers.E <= MAX_DEE_TEACHERS else None
        outcomes = [run.outcome() for run in job.teacher_runs()]
        self.teacher_seconds = statistics.fmean(o.seconds for o in outcomes) if outcomes else None
        self.rates = rates_of(job.device, job.precision)
        self.teacher_costs = [self._cost(classifier) for classifier in teachers.classifiers]
        self.student_cost = self._cost(job.make_classifier(0))

    def _cost(self, classifier: Any) -> NetworkCost:
        H, W, C = self.job.image_shape
        return network_cost(classifier.network, in_channels=C, image_size=(H, W))

    def _memory(self, outcomes: Sequence[Progress]) -> dict[str, Any]:
        """Peak memory, measured and predicted: the most of several trainings."""
        on_gpu = self.job.device.type == "cuda"
        return {
            "peak_gb": _most([o.peak_bytes for o in outcomes if on_gpu]),
            "predicted_gb": _most([o.predicted_bytes for o in outcomes]),
        }

    def _floor_share(self, run: Run, progress: Progress) -> float | None:
        if self.rates is None or not progress.seconds:
            return None
        batch_size = run.training.batch_size
        rows = batch_size // self.job.ranks.size
        costs, updates = (self.student_cost, self.teacher_costs), self.job.config.updates
        step = sum(step_floor(*costs, run.method, rows, self.rates, updates).values())
        return step * progress.images / batch_size / progress.seconds

    def dee(self, measured: Measures) -> float | None:
        """Deep-ensemble equivalent among the run's own teachers."""
        return equivalent_size(measured.cnll, self.cnll_by_size) if self.cnll_by_size is not None else None

    def teacher_rows(self) -> list[NetworkRow]:
        """The ensemble of the teachers, and each by itself."""
        test_NEK, test_labels_N, val_NEK, val_labels_N = self.teacher_logits
        runs = self.job.teacher_runs()
        ensemble = measures(*self.teacher_logits)
        outcomes = [run.outcome() for run in runs]
        rows = [
            NetworkRow(
                name="teacher ensemble",
                measures=ensemble,
                dee=self.dee(ensemble),
                seconds=sum(o.seconds for o in outcomes) if outcomes else None,
                images_per_s=_rate(outcomes),
                data_wait=_data_wait(outcomes),
                **self._memory(outcomes),
                floor_share=_mean([self._floor_share(run, o) for run, o in zip(runs, outcomes, strict=True)]),
                cost=float(len(runs)) if runs else None,
                device=_device(outcomes),
                diversity=diversity(test_NEK) if test_NEK.shape[1] > 1 else None,
                predictions=predictions(test_NEK, test_labels_N, ensemble.temperature),
            )
        ]
        for m in range(test_NEK.shape[1]):
            measured = measures(test_NEK[:, m : m + 1], test_labels_N, val_NEK[:, m : m + 1], val_labels_N)
            found = predictions(test_NEK[:, m : m + 1], test_labels_N, measured.temperature)
            row = NetworkRow(name="single teacher", measures=measured, dee=self.dee(measured), predictions=found)
            rows.append(replace(row, **self._of_training(runs[m])) if runs else row)
        return rows + [row for run in runs for row in self._average_rows(run, "single teacher")]

    def student_rows(self, run: Run) -> list[NetworkRow]:
        """One student and the averages of its weights over time, from their files; measures are written into them."""
        views = self._measure_views(run, "best")
        recalibrated = run.folder / "recalibrated.safetensors"
        if recalibrated.exists():
            own, _ = self._measure_file(recalibrated)
            views["averaging"] |= {"recalibrated_acc": own.acc, "recalibrated_nll": own.nll}
        row = NetworkRow(name=str(run.method), **views, **self._of_training(run))
        return [row, *self._average_rows(run, row.name)]

    def _average_rows(self, run: Run, name: str) -> list[NetworkRow]:
        """The averages over time of the network of `run`; what its training took stands in its own row."""
        rows = []
        for stem, label in self.job.config.updates.averages.items():
            last = self._measure_file(run.folder / "last-ema.safetensors")[0].acc if stem == "best-ema" else None
            rows.append(NetworkRow(name=f"{name}, {label}", last_acc=last, **self._measure_views(run, stem)))
        return rows

    def _measure_views(self, run: Run, stem: str) -> dict[str, Any]:
        """Measures of a shipped network and, where it has members, of those and their ensemble: fields of a row."""
        path = run.folder / f"{stem}.safetensors"
        measured, found = self._measure_file(path)
        row: dict[str, Any] = {"measures": measured, "dee": self.dee(measured), "predictions": found, "averaging": {}}
        if run.method.has_members:
            logits_NMK, labels_N = self.job.predict(self.job.load_student(run, path), self.test_feed)
            row["averaging"] = member_values(logits_NMK, labels_N) | {"acc": measured.acc, "nll": measured.nll}
            row["diversity"] = diversity(logits_NMK)
        return row

    def _of_training(self, run: Run) -> dict[str, Any]:
        progress = run.outcome()
        last, _ = self._measure_file(run.folder / "last.safetensors")
        return {
            "folder": str(run.folder.relative_to(self.job.out)),
            "last_acc": last.acc,
            "seconds": progress.seconds,
            "images_per_s": _rate([progress]),
            "data_wait": _data_wait([progress]),
            **self._memory([progress]),
            "floor_share": self._floor_share(run, progress),
            "device": progress.device,
            "cost": progress.seconds / self.teacher_seconds if self.teacher_seconds else None,
        }

    def _measure_file(self, path: Path) -> tuple[Measures, Predictions]:
        classifier, info = load_network(path, builder=self.job.config.builder)
        classifier = classifier.to(self.job.device)
        logits = [self.job.predict(classifier, feed) for feed in (self.test_feed, self.val_feed)]
        measured = measures(*logits[0], *logits[1])
        values = {f"test_{name}": value for name, value in asdict(measured).items() if name != "temperature"}
        save_network(path, classifier.network, replace(info, temperature=measured.temperature, measures=values))
        return measured, predictions(*logits[0], measured.temperature)


def report(job: Job) -> None:
    """Measure what is there, print the tables, write results.json, results.txt and report.html.

    Raises:
        UserError: there is no ensemble of teachers to measure.
    """
    job.screen.say("evaluating on the test images")
    evaluation = Evaluation(job)
    rows = evaluation.teacher_rows()
    missing = []
    if job.command.stage != "teachers":
        for run in job.student_runs():
            if run.is_done:
                rows += evaluation.student_rows(run)
            else:
                missing.append(run.title)
    E = job.config.members
    tables = [main_table(rows, E, title=_title(job))]
    if any(row.averaging for row in rows):
        tables.append(averaging_table(rows))
    if any(row.seconds is not None for row in rows):
        tables.append(speed_table(rows, evaluation.rates))
    text = _render(*tables)
    differ = rows[0].diversity
    results = {
        "rows": [_values(row) for row in rows],
        "teacher_diversity": asdict(differ) if differ else None,
        "tables": [cells_of(table) for table in tables],
        "inference": inference(job, evaluation.teachers, evaluation.teacher_costs, evaluation.student_cost),
        "config": job.config.to_json(),
    }
    with atomic_write(job.out / "results.json") as temporary:
        temporary.write_text(json.dumps(_finite(results), indent=2) + "\n", encoding="utf-8")
    with atomic_write(job.out / "results.txt") as temporary:
        temporary.write_text(text, encoding="utf-8")
    job.screen.console.print()
    job.screen.show(main_table(rows, E, title=_title(job), width=job.screen.console.width), *tables[1:])
    for row in rows:
        if row.averaging and (gap := averaging_gap(row.averaging)):
            job.screen.warn(f"{row.name}: {gap}")
    for name, group in _groups(rows[1:]):  # the first, the ensemble, was trained teacher by teacher
        for trouble in spoiled(row.device for row in group):
            job.screen.warn(f"{name}: {trouble}")
    if missing:
        job.screen.say(f"not trained yet, and not in the table: {', '.join(missing)}")
    named = [(row.name, row.predictions) for row in rows if row.predictions is not None]
    draw(job.out, job.screen, lambda: keep(job, evaluation.teachers, evaluation.teacher_logits[1], named))
    job.screen.say(f"everything is in {job.out}; the networks are best.safetensors in its folders")


def _values(row: NetworkRow) -> dict[str, Any]:
    values = asdict(replace(row, predictions=None))
    del values["predictions"]  # in a file of their own
    return values


def main_table(rows: Sequence[NetworkRow], E: int, title: str, width: int = PIPE_WIDTH) -> Table:
    """One line a name; where it has several seeds, the mean and below it ± the standard deviation.

    `width`: columns of the screen; where it is too narrow for all values some are left out, `_LEAST_FIRST`.
    """
    columns = {"ACC": _mean_of(lambda row: row.measures.acc, _percent, spread=True)}
    for heading in ("NLL", "ECE", "cNLL", "cECE", "Brier", "aECE"):
        columns[heading] = _mean_of(attrgetter(f"measures.{heading.lower()}"), _THREE.format, spread=True)
    columns |= {
        "DEE": lambda group: _median_dee([row.dee for row in group], E),
        "ACC last": _mean_of(lambda row: row.last_acc, _percent, spread=True),
        "time": _mean_of(lambda row: row.seconds, _duration),
        "cost": _mean_of(lambda row: row.cost, "{:.1f}x".format),
    }
    table = _table(title, rows, columns, counted=True)
    for heading in _LEAST_FIRST:
        if _WIDE_SCREEN.measure(table).maximum <= width:
            break
        del columns[heading]
        table = _table(title, rows, columns, counted=True)
    return table


def speed_table(rows: Sequence[NetworkRow], rates: Device | None) -> Table:
    """One line a name: what the trainings took of the device; of several seeds the mean."""
    columns = {
        "images/s": _mean_of(lambda row: row.images_per_s, "{:,.0f}".format),
        "of the floor": _mean_of(lambda row: row.floor_share, "{:.0%}".format),
        "data wait": _mean_of(lambda row: row.data_wait, "{:.1%}".format),
        "GB": _mean_of(lambda row: row.peak_gb, "{:.3g}".format),
        "predicted": _mean_of(lambda row: row.predicted_gb, "{:.3g}".format),
        "utilisation": _mean_of(lambda row: (row.device or Figures()).utilisation, "{:.0%}".format),
        "Wh": _mean_of(lambda row: (row.device or Figures()).energy_wh, format_wh),
    }
    known = "" if rates is None else f", floor: {rates.rates}"
    return _table(f"training{known}", [row for row in rows if row.seconds is not None], columns)


def averaging_table(rows: Sequence[NetworkRow]) -> Table:
    """One line a name: the members' mean, their ensemble, what is shipped, and that on its own BatchNorm statistics."""
    views = {"members": "members_", "ensemble": "ensemble_", "shipped": ""}
    if any("recalibrated_acc" in row.averaging for row in rows):
        views["own BN"] = "recalibrated_"
    columns = {
        f"{view}\n{key.upper()}": _mean_of(_averaging(prefix + key), text, spread=True)
        for view, prefix in views.items()
        for key, text in (("acc", _percent), ("nll", _THREE.format))
    }
    return _table("members and what is made of them", [row for row in rows if row.averaging], columns)


def _table(title: str, rows: Sequence[NetworkRow], columns: Mapping[str, _Cell], *, counted: bool = False) -> Table:
    """One line a name, of all the rows that have it; `counted`: how many, behind the name, where there are several."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, group in _groups(rows):
        count = f" (n = {len(group)})" if counted and len(group) > 1 else ""
        table.add_row(name + count, *(cell(group) for cell in columns.values()))
    return table


def _mean_of(
    value: Callable[[NetworkRow], float | None], text: Callable[[float], str], *, spread: bool = False
) -> _Cell:
    """The cell of the mean of `value` over rows; `spread`: with the standard deviation below it."""

    def cell(group: Sequence[NetworkRow]) -> str:
        known = [found for row in group if (found := value(row)) is not None]
        if not known:
            return "–"
        mean = text(statistics.fmean(known))
        return f"{mean}\n±{text(statistics.stdev(known))}" if spread and len(known) > 1 else mean

    return cell


def _averaging(name: str) -> Callable[[NetworkRow], float | None]:
    return lambda row: row.averaging.get(name)


def _groups(rows: Sequence[NetworkRow]) -> list[tuple[str, list[NetworkRow]]]:
    names = dict.fromkeys(row.name for row in rows)
    return [(name, [row for row in rows if row.name == name]) for name in names]


def _median_dee(values: Sequence[float | None], E: int) -> str:
    known = [value for value in values if value is not None]
    return format_dee(statistics.median(known), E) if known else "–"  # may be infinite: no mean


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _most(sizes: Sequence[int | None]) -> float | None:
    return max((size / 1e9 for size in sizes if size is not None), default=None)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(outcomes: Sequence[Progress]) -> float | None:
    seconds = sum(o.seconds for o in outcomes)
    return sum(o.images for o in outcomes) / seconds if seconds else None


def _data_wait(outcomes: Sequence[Progress]) -> float | None:
    seconds = sum(o.seconds for o in outcomes)
    return sum(o.waited for o in outcomes) / seconds if seconds else None


def _device(outcomes: Sequence[Progress]) -> Figures | None:
    parts = [o.device for o in outcomes if o.device is not None]
    return total_of(parts) if parts and len(parts) == len(outcomes) else None


def _title(job: Job) -> str:
    config, data = job.config, job.data
    images = config.train_images or data.splits["train"].num_images
    return (
        f"{experiment_name(config, data)}: {config.network}, E = {config.members}, {images:,} training and "
        f"{data.splits['test'].num_images:,} test images, {job.precision} on {job.device}"
    )


def experiment_name(config: Config, data: DataSet) -> str:
    """Return the recipe's name, or the data's where they are not the recipe's."""
    if config.recipe not in RECIPES or RECIPES[config.recipe]().source == config.source:
        return config.recipe
    return f"{data.name} (settings of {config.recipe})"


def _render(*tables: RenderableType) -> str:
    console = plain_console(width=PIPE_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(Group(*tables))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

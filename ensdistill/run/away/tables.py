"""Tables and sentences of what was measured away from the training data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

SCORES = {"max_probability": "max probability", "entropy": "entropy", "mutual_information": "mutual information"}
_Group = Sequence[Mapping[str, Any]]


def severity_table(section: Mapping[str, Any], title: str) -> Table:
    """One line a name: accuracy on clean images and at each severity, the mean over kinds; and means of NLL and ECE."""
    table = _table(f"accuracy on corrupted images, by severity: {title}")
    for heading in ("clean", *map(str, section["severities"]), "mean", "NLL", "ECE"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, group in _groups(section):
        cells = [_cell(group, lambda network: 100 * network["clean"]["accuracy"], "{:.1f}")]
        for column in range(len(section["severities"])):
            cells.append(_cell(group, _at_severity(column), "{:.1f}"))
        cells.append(_cell(group, lambda network: 100 * network["mean"]["accuracy"], "{:.1f}"))
        cells += [_cell(group, _mean_of(measure), "{:z.3f}") for measure in ("nll", "ece")]
        table.add_row(_counted(name, group), *cells)
    return table


def kind_table(section: Mapping[str, Any], title: str) -> Table:
    """One line a kind of corruption: each name's accuracy, the mean over severities."""
    table = _table(f"accuracy by kind of corruption, mean over severities: {title}")
    groups = _groups(section)
    for name, group in groups:
        table.add_column(_counted(name, group), justify="right", overflow="fold")
    for row, kind in enumerate(section["names"]):
        table.add_row(kind, *(_cell(group, _at_kind(row), "{:.1f}") for _, group in groups))
    return table


def detection_table(each: Mapping[str, Any], names: Mapping[str, str], given: str, title: str) -> Table:
    """One line a name and score: AUROC, AUPR of either side and FPR at 95 % true positives, in per cent.

    `names`: of each network by its key, what it is one of.
    """
    table = _table(f"out-of-distribution, positive: {given} ({title})")
    table.add_column("score", no_wrap=True)
    for heading in ("AUROC", "AUPR out", "AUPR in", "FPR95"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(names[key] for key in each):
        group = [scores for key, scores in each.items() if names[key] == name]
        for place, score in enumerate(group[0]):
            measures = ("auroc", "aupr", "aupr_in", "fpr95")
            cells = [_cell(group, _score_of(score, measure), "{:.1f}") for measure in measures]
            table.add_row(_counted(name, group) if place == 0 else "", SCORES[score], *cells)
    return table


def in_a_sentence(section: Mapping[str, Any]) -> str:
    """Mean corruption accuracy of every name."""
    parts = [
        f"{name} {_cell(group, lambda one: 100 * one['mean']['accuracy'], '{:.1f}')}"
        for name, group in _groups(section)
    ]
    text = "; ".join(part.replace("\n", " ") for part in parts)
    kinds, severities = len(section["names"]), len(section["severities"])
    return f"mean corruption accuracy in per cent, over {kinds} kinds at {severities} severities: {text}"


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", overflow="fold")
    return table


def _groups(section: Mapping[str, Any]) -> list[tuple[str, _Group]]:
    networks = list(section["each"].values())
    names = dict.fromkeys(network["name"] for network in networks)
    return [(name, [network for network in networks if network["name"] == name]) for name in names]


def _counted(name: str, group: Sequence[Any]) -> str:
    return f"{name} (n = {len(group)})" if len(group) > 1 else name


def _cell(group: Sequence[Any], value: Callable[[Any], float], text: str) -> str:
    """The mean over a group, and below it the standard deviation where there are several."""
    values = [value(one) for one in group]
    mean = text.format(statistics.fmean(values))
    return f"{mean}\n±{text.format(statistics.stdev(values))}" if len(values) > 1 else mean


def _at_severity(column: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda network: 100 * statistics.fmean(row[column] for row in network["accuracy"])


def _at_kind(row: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda network: 100 * statistics.fmean(network["accuracy"][row])


def _mean_of(measure: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda network: float(network["mean"][measure])


def _score_of(score: str, measure: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda scores: 100 * scores[score][measure]

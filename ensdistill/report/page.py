"""The page: what a run folder holds, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ensdistill.report import prediction_figures, training_figures
from ensdistill.report.folder import RunFolder, number, read_run
from ensdistill.report.group import Group, config_differences, groups_of, measure
from ensdistill.report.numbers import spread
from ensdistill.report.records import Shown
from ensdistill.report.svg import Canvas, Figure, plain
from ensdistill.report.verdict import Difference, basis, compare, sentence, signed
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write

_LARGEST_SIDE = 96
"""Pixels of a picture on the page, at most."""
_PIXELATED_BELOW = 48
_MEASURES = (
    ("acc", "ACC", 100, 2),
    ("nll", "NLL", 1, 3),
    ("ece", "ECE", 1, 3),
    ("cnll", "cNLL", 1, 3),
    ("cece", "cECE", 1, 3),
)


def write_report(folders: Sequence[Path], path: Path) -> list[str]:
    """Draw the report of one run, or of several side by side, to `path`.

    Returns:
        What was left out, and why, a line each.

    Raises:
        UserError: a folder holds no results, or is given twice; or `path` cannot be written.
    """
    page, notes = make_page(folders, path)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return notes


def make_page(folders: Sequence[Path], path: Path) -> tuple[str, list[str]]:
    """The page of `write_report`, and what was left out."""
    places = [folder.resolve() for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"{folders[i]}: given twice; a run is no further seed of itself")
    runs = [read_run(folder) for folder in folders]
    groups, notes = groups_of(runs)
    environment = Environment(
        loader=PackageLoader("ensdistill.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tied"] = _tied
    canvas = Canvas(groups)
    missing = [f"{run.label}: {line}" if len(runs) > 1 else line for run in runs for line in run.missing]
    common = {"missing": missing + notes, "runs": [_run(run, path) for run in runs]}
    if len(groups) > 1:
        context = _comparison(groups, canvas)
        return environment.get_template("comparison.html").render(common | context), missing + notes
    context = _single(groups[0], canvas)
    return environment.get_template("report.html").render(common | context), missing + notes


def _single(group: Group, canvas: Canvas) -> dict[str, Any]:
    first = group.first
    return {
        "title": group.label,
        "facts": _facts(group),
        "verdict": _in_two(sentence(group)),
        "basis": basis(group),
        "tiles": _tiles(group, canvas),
        "differences": _differences(group),
        "tables": [table for run in group.runs for table in _tables(run, several=len(group.runs) > 1)],
        "pooled": _pooled([group], canvas) if len(group.runs) > 1 else None,
        "figures": _figures(canvas),
        "shown": _shown(first),
        "ood": _ood(first),
        "config": _flat(first.config),
        "environment": _flat(first.environment),
    }


def _figures(canvas: Canvas) -> dict[str, Figure | None]:
    """All figures by what they are of; None where the run does not keep what one takes."""
    return {
        "curves": training_figures.curves(canvas),
        "members": training_figures.members(canvas),
        "reliability": prediction_figures.reliability(canvas),
        "cost": prediction_figures.cost(canvas),
        "diversity": prediction_figures.diversity(canvas),
        "classes": prediction_figures.classes(canvas),
        "confusions": prediction_figures.confusions(canvas),
        "device": training_figures.device(canvas),
        "corruptions": prediction_figures.corruptions(canvas),
    }


def _comparison(groups: Sequence[Group], canvas: Canvas) -> dict[str, Any]:
    return {
        "title": " · ".join(group.label for group in groups),
        "groups": [
            {
                "label": group.label,
                "facts": _facts(group),
                "verdict": _in_two(sentence(group)),
                "basis": basis(group),
                "differences": _differences(group),
                "tables": [table for run in group.runs for table in _tables(run, several=len(group.runs) > 1)],
            }
            for group in groups
        ],
        "pooled": _pooled(groups, canvas),
        "figure": prediction_figures.side_by_side(canvas, groups),
        "config_differences": config_differences(groups),
    }


def _run(run: RunFolder, path: Path) -> dict[str, Any]:
    report = run.path / "report.html"
    here = report.resolve() == path.resolve()
    link = os.path.relpath(report, path.parent) if report.is_file() and not here else None
    return {"label": run.label, "path": str(run.path), "seed": run.seed, "link": link}


def _facts(group: Group) -> list[str]:
    run = group.first
    config, environment = run.config, run.environment
    facts = []
    if network := config.get("network"):
        facts.append(f"{network}, {config.get('members', '?')} teachers")
    if run.counts:
        counts = {"train": "training", "valid": "validation", "test": "test"}
        used = dict(run.counts)
        if limit := int(number(config.get("train_images")) if config.get("train_images") else 0):
            used["train"] = min(limit, used.get("train", limit))
        facts.append(", ".join(f"{used[key]:,} {word}" for key, word in counts.items() if key in used) + " images")
    if run.class_names:
        facts.append(f"{len(run.class_names):,} classes")
    if device := environment.get("device"):
        facts.append(f"{environment.get('precision', '')} on {device}".strip())
    return [plain(str(fact)) for fact in facts]


def _tiles(group: Group, canvas: Canvas) -> list[dict[str, Any]]:
    inference = group.first.results.get("inference")
    inference = inference if isinstance(inference, Mapping) else {}

    def macs(name: str) -> float:
        found = inference.get(name)
        return number(found.get("macs")) if isinstance(found, Mapping) else math.nan

    one = macs("single teacher") if "single teacher" in inference else macs(group.target or "")
    tiles = []
    for name in group.main_names:
        acc = group.known(name, measure("acc"))
        if not acc:
            continue
        cost = macs(name) / one if one else math.nan
        tiles.append(
            {
                "name": group.label_of(name),
                "colour": canvas.marks.variable(name),
                "acc": f"{100 * statistics.fmean(acc):.2f}",
                "spread": f"± {100 * spread(acc):.2f}" if len(acc) > 1 else "",
                "n": len(acc),
                "nll": _number(group.mean(name, measure("nll")), 3),
                "cost": f"{cost:.3g} ×" if math.isfinite(cost) else "–",
                "is_target": name == group.target,
            }
        )
    return tiles


def _differences(group: Group) -> list[dict[str, Any]]:
    if group.target is None:
        return []
    found = []
    others = [*group.baselines, *(name for name in ("teacher ensemble",) if name in group.names)]
    for other in others:
        one = compare(group, group.target, other)
        found.append(
            {
                "name": group.label_of(other),
                "n": f"{one.n[0]} / {one.n[1]}",
                "acc": _cell(one.acc, 100, 2, better=1),
                "nll": _cell(one.nll, 1, 3, better=-1),
                "cnll": _cell(one.cnll, 1, 3, better=-1),
                "by": one.acc.by or "–",
            }
        )
    return found


def _cell(found: Difference, scale: float, digits: int, *, better: int) -> dict[str, str]:
    half = "" if found.half is None else f" ± {scale * found.half:.{digits}f}"
    sign = 0 if not found.is_sure else 1 if found.value * better > 0 else -1
    return {
        "text": signed(scale * found.value, digits) + half,
        "kind": {0: "", 1: "better", -1: "worse"}[sign],
        "word": {0: "", 1: " better", -1: " worse"}[sign],
    }


def _tables(run: RunFolder, *, several: bool) -> list[dict[str, Any]]:
    """The tables that the run printed; its text where it kept no cells."""
    found = run.results.get("tables")
    tables = []
    for table in found if isinstance(found, list) else []:
        try:
            columns = [str(column) for column in table["columns"]]
            rows = [[str(cell) for cell in row] for row in table["rows"]]
            title = str(table["title"])
        except (TypeError, KeyError):
            continue
        tables.append(
            {
                "title": f"{run.label}: {title}" if several else title,
                "columns": [column.replace("\n", " ") for column in columns],
                "rows": [[cell.split("\n") for cell in row] for row in rows],
                "text": None,
            }
        )
    if tables:
        return tables
    try:
        text = (run.path / "results.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [{"title": run.label, "columns": [], "rows": [], "text": text}]


def _pooled(groups: Sequence[Group], canvas: Canvas) -> dict[str, Any]:
    """One table of all groups: mean ± standard deviation over their networks."""
    rows = []
    for group in groups:
        for name in group.names:
            cells = []
            for key, _, scale, digits in _MEASURES:
                values = [scale * value for value in group.known(name, measure(key))]
                text = _number(statistics.fmean(values), digits) if values else "–"
                cells.append([text, f"±{spread(values):.{digits}f}"] if len(values) > 1 else [text])
            rows.append(
                {
                    "group": group.label,
                    "name": group.label_of(name),
                    "colour": canvas.marks.variable(name.partition(",")[0]),
                    "n": len(group.rows(name)),
                    "cells": cells,
                    "is_target": name == group.target,
                }
            )
    return {"columns": [heading for _, heading, *_ in _MEASURES], "rows": rows, "several": len(groups) > 1}


def _in_two(sentence: str) -> tuple[str, str]:
    """A verdict and, in brackets, what it is over."""
    before, bracket, after = sentence.rpartition(" (")
    return (before, bracket.strip() + after) if bracket and after.endswith(").") else (sentence, "")


def _tied(text: str) -> str:
    """Text whose numbers do not part from what belongs to them at the end of a line."""
    return re.sub(r"(?<=\d) (?=[±%×])|(?<=[±=]) (?=\d)", "\u00a0", text)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{label}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
            flat[label] = plain(shown) or "–"
    return flat


def _ood(run: RunFolder) -> list[dict[str, Any]]:
    """Lines of the table of data that are not of the training's kind."""
    found = (run.away or {}).get("ood")
    lines = []
    for data, networks in found.items() if isinstance(found, Mapping) else []:
        for network, scores in networks.items() if isinstance(networks, Mapping) else []:
            for score, values in scores.items() if isinstance(scores, Mapping) else []:
                if isinstance(values, Mapping):
                    cells = [_number(number(values.get(key)), 3) for key in ("auroc", "aupr", "fpr95")]
                    lines.append({"data": str(data), "network": str(network), "score": str(score), "cells": cells})
    return lines


# ---- images -------------------------------------------------------------------------------------------------------


def _shown(run: RunFolder) -> dict[str, Any] | None:
    shown = run.shown
    if shown is None:
        return None
    reach = {name: float(np.abs(one.steps_nHWC.astype(np.float64)).max()) or 1.0 for name, one in shown.methods.items()}
    cards = []
    for i in range(len(shown.images_nHWC)):
        label = plain(run.class_name(int(shown.labels_n[i])), 40)
        steps = []
        for name, one in shown.methods.items():
            middle = 0.5 + one.steps_nHWC[i].astype(np.float64) / (2 * reach[name])
            steps.append(
                {
                    "method": name,
                    "picture": _picture(middle, f"what {name} adds to the image of class {label}"),
                    "teachers": _teachers(run, one, i),
                }
            )
        cards.append(
            {
                "label": label,
                "picture": _picture(shown.images_nHWC[i] / 255, f"test image of class {label}"),
                "kl": None if shown.kl_n is None else f"{shown.kl_n[i]:.3f}",
                "named": None if shown.classes_nE is None else _named(run, shown.classes_nE[i]),
                "steps": steps,
            }
        )
    means = [
        {
            "method": name,
            "before": None if shown.kl_n is None else f"{shown.kl_n.mean():.3f}",
            "after": f"{one.kl_n.mean():.3f}",
            "reach": f"{255 * reach[name]:.1f}",
        }
        for name, one in shown.methods.items()
    ]
    return {"cards": cards, "means": means, "pixelated": max(shown.images_nHWC.shape[1:3]) <= _PIXELATED_BELOW}


def _teachers(run: RunFolder, one: Shown, i: int) -> dict[str, str]:
    return {"kl": f"{one.kl_n[i]:.3f}", "named": _named(run, one.classes_nE[i])}


def _named(run: RunFolder, classes_E: np.ndarray) -> str:
    """The classes that teachers name: one where they agree."""
    values, counts = np.unique(classes_E, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    names = [plain(run.class_name(int(values[k])), 24) for k in order]
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{name} ({count})" for name, count in zip(names, counts[order], strict=True))


def _picture(image_HWC: np.ndarray, text: str) -> dict[str, str]:
    """An image in [0, 1] as a data URI: small ones as they are, large ones made smaller."""
    values = np.clip(np.rint(255 * image_HWC), 0, 255).astype(np.uint8)
    if values.shape[2] not in (1, 3):
        values = values.mean(axis=2, keepdims=True).astype(np.uint8)
    picture = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
    kind = "png"
    if max(picture.size) > _PIXELATED_BELOW:
        kind = "jpeg"
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    picture.save(written, kind.upper(), **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
    encoded = base64.b64encode(written.getvalue()).decode("ascii")
    return {"uri": f"data:image/{kind};base64,{encoded}", "text": text}

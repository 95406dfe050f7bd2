"""Figures of what networks do on test images: calibration, cost, diversity, classes, confusions, corruptions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensdistill.report.folder import TEACHERS, number
from ensdistill.report.group import Group, measure
from ensdistill.report.numbers import (
    changed_confusions,
    class_accuracies,
    diversity_of,
    reliabilities,
    spread,
)
from ensdistill.report.svg import MARK, Canvas, Drawn, Figure, Key, plain

MAX_CLASSES, MAX_CONFUSIONS = 20, 12
"""Lines of the figures of classes and of confusions, at most."""
MANY = 10
"""Images from which on the accuracy of a bin is no mere chance."""


def reliability(canvas: Canvas) -> Figure | None:
    """Reliability diagrams before and after the temperature."""
    panels = []
    for name in canvas.group.main_names:
        found = reliabilities(canvas.group, name)
        if found is None:
            continue
        before, after = found
        T = canvas.group.mean(name, measure("temperature"))
        text = (
            f"Accuracy by confidence of {canvas.group.label_of(name)}. Calibration error {before.ece:.3f}, and "
            f"{after.ece:.3f} after the temperature {T:.2f}."
        )
        with canvas.panel(plain(canvas.group.label_of(name), 44), text, height=4.0) as panel:
            axes = panel.axes
            axes.plot([0, 1], [0, 1], color=MARK["rule"], linewidth=1)
            for one, mark, symbol, dash in ((before, "c2", "s", (0, (4, 2))), (after, "c1", "o", "solid")):
                known = np.isfinite(one.acc_b)
                x_b, y_b, share_b = one.confidence_b[known], one.acc_b[known], one.share_b[known]
                many = share_b * one.images >= MANY
                axes.plot(x_b[many], y_b[many], color=MARK[mark], linestyle=dash, linewidth=1.4)
                for those, alpha in ((many, 0.9), (~many, 0.3)):
                    how = {"color": MARK[mark], "marker": symbol, "alpha": alpha, "linewidths": 0}
                    axes.scatter(x_b[those], y_b[those], s=14 + 130 * np.sqrt(share_b[those]), **how)
            axes.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.06), xlabel="confidence, and upwards accuracy")
            axes.text(0.02, 0.97, f"ECE {before.ece:.3f} → {after.ece:.3f}", va="top", color=MARK["soft"])
        panels.append(panel.drawn())
    if not panels:
        return None
    return Figure(
        title="Reliability",
        caption="Test images in 15 bins by the probability of the predicted class: how often that class is right. On "
        "the diagonal a network means what it says. Points grow with the share of images in the bin, and are faint "
        f"where it holds fewer than {MANY}; ECE is the mean distance from the diagonal, weighted by the share. The "
        "temperature was fitted on the validation images.",
        panels=tuple(panels),
        legend=(Key("as it is", "c2", "dash", "■"), Key("after its temperature", "c1", "solid", "●")),
    )


def cost(canvas: Canvas) -> Figure | None:
    """Accuracy against what a prediction costs."""
    inference = canvas.group.first.results.get("inference")
    if not isinstance(inference, Mapping):
        return None
    panels, seen = [], []
    for key, title, label in (
        ("macs", "Accuracy, % against arithmetic", "million multiply-accumulates an image"),
        ("images_per_s", "Accuracy, % against speed", "images a second"),
    ):
        points = {}
        for name in canvas.group.names:
            found = inference.get(name)
            x = number(found.get(key)) if isinstance(found, Mapping) else math.nan
            acc = [100 * value for value in canvas.group.known(name, measure("acc"))]
            if math.isfinite(x) and x > 0 and acc:
                points[name] = (x / 1e6 if key == "macs" else x), acc
        if not points:
            continue
        text = "; ".join(
            f"{canvas.group.label_of(n)}: {np.mean(acc):.2f} % at {x:,.4g}" for n, (x, acc) in points.items()
        )
        with canvas.panel(title, f"{title} ({label}). {text}.") as panel:
            for name, (x, acc) in points.items():
                how = {"color": canvas.marks.colour(name), "marker": canvas.marks.symbol(name), "linestyle": "none"}
                half = spread(acc)
                panel.axes.errorbar(
                    x, np.mean(acc), yerr=half if math.isfinite(half) else None, markersize=8, capsize=0, **how
                )
                seen.append(name)
            panel.axes.set_xlabel(label)
            _room(panel.axes, [x for x, _ in points.values()])
        panels.append(panel.drawn())
    if not panels:
        return None
    return Figure(
        title="Accuracy against cost",
        caption="What one prediction takes, on test images. Arithmetic is counted, the speed was measured by PyTorch's "
        "modules on the run's device with one batch; networks of one architecture were timed once. Bars: ± one "
        "standard deviation over seeds, where there are several.",
        panels=tuple(panels),
        legend=canvas.legend(list(dict.fromkeys(seen)), of="points"),
    )


def diversity(canvas: Canvas) -> Figure | None:
    """How much the teachers differ from each other, and the members of each student."""
    found = {}
    for name in canvas.group.names:
        rows = [diversity_of(row) for row in canvas.group.rows(name) if "," not in name]
        if rows and all(rows):
            found[name] = {key: [row[key] for row in rows] for key in rows[0]}
    if not found:
        return None
    panels, labels = [], [plain(_members(name), 30) for name in found]
    for key, title in (
        ("kld", "Divergence KL(p_i ‖ p_j), nats"),
        ("disagreement", "Share of images named differently"),
        ("cka", "Linear CKA of logits (1: alike)"),
    ):
        text = "; ".join(f"{_members(name)}: {np.mean(values[key]):.3g}" for name, values in found.items())
        with canvas.panel(
            title, f"{title}. {text}.", height=0.45 + 0.42 * len(found), labels=labels, bottom=8
        ) as panel:
            axes = panel.axes
            for place, (name, values) in enumerate(found.items()):
                mean = float(np.mean(values[key]))
                axes.barh(place, mean, height=0.52, color=canvas.marks.colour(name))
                axes.annotate(
                    f"{mean:.3f}", (max(mean, 0), place), (4, 0), textcoords="offset points", va="center",
                    color=MARK["soft"], fontsize=10,
                )  # fmt: skip
            axes.set_yticks(range(len(found)), labels)
            axes.invert_yaxis()
            axes.grid(False)
            highest = max(
                [float(np.mean(values[key])) for values in found.values() if np.isfinite(values[key]).all()] or [1]
            )
            axes.set_xlim(0, max(highest, 1e-6) * 1.22)
            axes.set_xticks([])
        panels.append(panel.drawn())
    return Figure(
        title="Diversity",
        caption="Means over ordered pairs of teachers, and over pairs of a student's members, on the test images: how "
        "much of their teachers' diversity the members keep.",
        panels=tuple(panels),
    )


def classes(canvas: Canvas) -> Figure | None:
    """Accuracy by class of the target and of what it is compared with last."""
    target, other = canvas.group.target, next(iter(reversed(canvas.group.baselines)), None)
    if target is None or other is None:
        return None
    before_K, after_K = class_accuracies(canvas.group, other), class_accuracies(canvas.group, target)
    if before_K is None or after_K is None:
        return None
    K, known = len(before_K), np.flatnonzero(np.isfinite(before_K) & np.isfinite(after_K))
    chosen = known
    if len(known) > MAX_CLASSES:
        change = (after_K - before_K)[known]
        order = known[np.argsort(change, kind="stable")]
        chosen = np.r_[order[-MAX_CLASSES // 2 :][::-1], order[: MAX_CLASSES // 2][::-1]]
    lines = [(plain(canvas.group.first.class_name(int(k)), 24), 100 * before_K[k], 100 * after_K[k]) for k in chosen]
    which = f"the {MAX_CLASSES} of {K:,} classes that changed the most" if len(known) > MAX_CLASSES else "every class"
    absent = K - len(known)
    title = "Accuracy by class, %"
    panel = _dumbbells(canvas, title, lines, other, target)
    return Figure(
        title="Class by class",
        caption=f"Accuracy on the test images of {which}, by {canvas.group.label_of(other)} and by "
        f"{canvas.group.label_of(target)}{'; means over seeds' if len(canvas.group.rows(target)) > 1 else ''}."
        + (
            f" {absent} classes have no test image."
            if absent > 1
            else " One class has no test image."
            if absent
            else ""
        ),
        panels=(panel,),
        legend=canvas.legend([other, target], of="points"),
    )


def confusions(canvas: Canvas) -> Figure | None:
    """The confusions that changed the most."""
    target, other = canvas.group.target, next(iter(reversed(canvas.group.baselines)), None)
    if target is None or other is None:
        return None
    changed = changed_confusions(canvas.group, other, target, MAX_CONFUSIONS)
    if not changed:
        return None
    name = canvas.group.first.class_name
    lines = [
        (f"{plain(name(one.label), 14)} → {plain(name(one.predicted), 14)}", one.before, one.after) for one in changed
    ]
    panel = _dumbbells(canvas, "Test images confused", lines, other, target)
    return Figure(
        title="Confusions that changed",
        caption=f"“a → b”: test images of class a that are taken for b, by {canvas.group.label_of(other)} and by "
        f"{canvas.group.label_of(target)}; the {len(lines)} with the largest change"
        f"{', means over seeds' if len(canvas.group.rows(target)) > 1 else ''}. Further left is better.",
        panels=(panel,),
        legend=canvas.legend([other, target], of="points"),
    )


def _dumbbells(canvas: Canvas, title: str, lines: Sequence[tuple[str, float, float]], before: str, after: str) -> Drawn:
    """One line a name: two values and what lies between them."""
    text = "; ".join(f"{name}: {a:.3g}, {b:.3g}" for name, a, b in lines)
    labels = [name for name, *_ in lines]
    alternative = f"{title}, by {canvas.group.label_of(before)} and by {canvas.group.label_of(after)}. {text}."
    with canvas.panel(title, alternative, height=0.75 + 0.29 * len(lines), labels=labels, bottom=24) as panel:
        axes = panel.axes
        for place, (_, a, b) in enumerate(lines):
            axes.plot([a, b], [place, place], color=MARK["rule"], linewidth=2.5, zorder=1)
        for name, values, size in ((before, [a for _, a, _ in lines], 7), (after, [b for *_, b in lines], 8)):
            axes.plot(
                values, range(len(lines)), linestyle="none", color=canvas.marks.colour(name),
                marker=canvas.marks.symbol(name), markersize=size,
            )  # fmt: skip
        axes.set_yticks(range(len(lines)), labels)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
    return panel.drawn()


def corruptions(canvas: Canvas) -> Figure | None:
    """Measures by severity of the corruption, mean over corruptions."""
    away = canvas.group.first.away or {}
    found = away.get("corruptions")
    if not isinstance(found, Mapping) or not isinstance(found.get("networks"), Mapping):
        return None
    severities = [number(value) for value in found.get("severities") or []]
    panels, seen = [], []
    for key, title, scale in (("accuracy", "Accuracy, %", 100), ("nll", "NLL, nats", 1), ("ece", "ECE", 1)):
        curves = {}
        for name, values in found["networks"].items():
            values = values if isinstance(values, Mapping) else {}
            table = _by_severity(values.get(key), len(severities))
            if table is not None:
                clean = values.get("clean")
                before = number(clean.get(key)) if isinstance(clean, Mapping) else math.nan
                curves[str(name)] = scale * np.r_[before, table]
        if not curves:
            continue
        text = "; ".join(f"{n}: {v[1]:.3g} to {v[-1]:.3g}" for n, v in curves.items())
        with canvas.panel(title, f"{title} from the mildest corruption to the strongest. {text}.") as panel:
            for name, values in curves.items():
                how = {"color": canvas.marks.colour(name), "linestyle": canvas.marks.dash(name)}
                panel.axes.plot([0, *severities], values, marker=canvas.marks.symbol(name), markersize=5, **how)
                seen.append(name)
            panel.axes.set_xticks([0, *severities])
            panel.axes.set_xlabel("severity")
        panels.append(panel.drawn())
    if not panels:
        return None
    names = [str(name) for name in found.get("names") or []]
    return Figure(
        title="Away from the training data",
        caption=f"Means over {len(names)} corruptions of the test images, by severity; 0: the images themselves. "
        f"{plain(', '.join(names))}.",
        panels=tuple(panels),
        legend=canvas.legend(list(dict.fromkeys(seen)), of="both"),
    )


def side_by_side(canvas: Canvas, groups: Sequence[Group]) -> Figure:
    """Measures of every network of several groups: one line a group."""
    panels, labels = [], [plain(group.label, 26) for group in groups]
    names = list(dict.fromkeys(name for group in groups for name in group.names if "," not in name))
    for key, title, scale in (("acc", "Accuracy, %", 100), ("nll", "NLL, nats", 1), ("cnll", "cNLL, nats", 1)):
        shown = [
            (place, group, name, [scale * value for value in group.known(name, measure(key))])
            for place, group in enumerate(groups)
            for name in names
            if name in group.names
        ]
        text = "; ".join(
            f"{group.label}: {canvas.group.label_of(name)} {np.mean(values):.4g}"
            for _, group, name, values in shown
            if values
        )
        with canvas.panel(
            title, f"{title}. {text}.", height=0.8 + 0.5 * len(groups), labels=labels, bottom=24
        ) as panel:
            for place, _, name, values in shown:
                how = {"color": canvas.marks.colour(name), "marker": canvas.marks.symbol(name), "linestyle": "none"}
                panel.axes.plot(values, [place] * len(values), markersize=7, alpha=0.85, **how)
            panel.axes.set_yticks(range(len(groups)), labels)
            panel.axes.set_ylim(len(groups) - 0.5, -0.5)
        panels.append(panel.drawn())
    return Figure(
        title="Side by side",
        caption="Every network on its run's test images: a point each.",
        panels=tuple(panels),
        legend=canvas.legend(names, of="points"),
    )


def _members(name: str) -> str:
    return "teachers" if name in TEACHERS else f"{name}'s members"


def _by_severity(table: object, severities: int) -> np.ndarray | None:
    """Means over corruptions of a table (corruption, severity)."""
    try:
        values = np.array(table, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if values.ndim != 2 or not values.shape[0] or values.shape[1] != severities:
        return None
    return np.nanmean(values, axis=0)


def _room(axes: Any, values: Sequence[float]) -> None:
    """Give points at the edges room, on a scale of factors."""
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    wide = max(values) / min(values) > 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))
    axes.margins(y=0.18)

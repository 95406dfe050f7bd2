"""Figures of the training: learning curves, members and what is made of them, the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ensdistill.report.numbers import device_use, mean_curve
from ensdistill.report.svg import MARK, Canvas, Figure, Key

_WORDS = {"utilisation": "this process", "machine_utilisation": "the whole machine"}


def curves(canvas: Canvas) -> Figure | None:
    """Validation and training loss of every kind of network."""
    panels, seen = [], []
    for kind, value, title, scale in (
        ("valid", "acc", "Validation accuracy, %", 100),
        ("valid", "nll", "Validation NLL, nats", 1),
        ("train", "loss_kd", "Distillation loss, relative to its last", 1),
    ):
        curves = {}
        for name in (*canvas.group.students, "single teacher"):
            at, values = mean_curve(canvas.group.trainings(name), kind, value)
            if len(at) > 1:
                curves[name] = at, scale * values
        if value == "loss_kd":
            curves = {name: (at, _smooth(values)) for name, (at, values) in curves.items()}
            curves = {name: (at, values / values[-1]) for name, (at, values) in curves.items() if values[-1] > 0}
        if not curves:
            continue
        text = "; ".join(
            f"{canvas.group.label_of(name)}: {values[-1]:.4g} at epoch {at[-1]:.0f}"
            for name, (at, values) in curves.items()
        )
        with canvas.panel(title, f"{title} by epoch. At the end: {text}.") as panel:
            for name, (at, values) in curves.items():
                panel.axes.plot(at, values, color=canvas.marks.colour(name), linestyle=canvas.marks.dash(name))
                seen.append(name)
            panel.axes.set_xlabel("epoch")
            _frame_end(panel.axes, list(curves.values()))
        panels.append(panel.drawn())
    if not panels:
        return None
    n = max(len(canvas.group.trainings(name)) for name in seen)
    means = f" Means over networks of one kind, up to {n}." if n > 1 else ""
    return Figure(
        title="Learning",
        caption="Measured on the validation images after the epochs at which a run validates; the frame shows where "
        f"curves end, and may leave out where they begin.{means} Of a student with members it is what ships.",
        panels=tuple(panels),
        legend=canvas.legend(list(dict.fromkeys(seen))),
    )


def members(canvas: Canvas) -> Figure | None:
    """Members, their ensemble and what ships, of every student that has members."""
    panels = []
    views = (
        ("members_acc", "members' mean", "c2"),
        ("ensemble_acc", "their ensemble", "c3"),
        ("acc", "ships", "c1"),
    )
    for name in canvas.group.students:
        trainings = canvas.group.trainings(name)
        curves = [(mean_curve(trainings, "valid", key), label, mark) for key, label, mark in views]
        if any(len(at) < 2 for (at, _), _, _ in curves):
            continue
        text = ", ".join(f"{label} {100 * values[-1]:.2f} %" for (_, values), label, _ in curves)
        title = f"{name}: validation accuracy, %"
        with canvas.panel(title, f"{title}. At the end: {text}.") as panel:
            for (at, values), _, mark in curves:
                dash = {"c2": (0, (5, 2)), "c3": (0, (1.5, 1.5)), "c1": "solid"}[mark]
                panel.axes.plot(at, 100 * values, color=MARK[mark], linestyle=dash)
            panel.axes.set_xlabel("epoch")
            _frame_end(panel.axes, [(at, 100 * values) for (at, values), _, _ in curves])
        panels.append(panel.drawn())
    if not panels:
        return None
    return Figure(
        title="Members and what is made of them",
        caption="The members of a student each by itself (their mean), the mean of their probabilities, and what "
        "ships: of latentbe the one network with averaged factors. Averaging has worked where that is not below "
        "the members.",
        panels=tuple(panels),
        legend=(
            Key("members, mean", "c2", "dash"),
            Key("their ensemble", "c3", "dot"),
            Key("what ships", "c1", "solid"),
        ),
    )


def device(canvas: Canvas) -> Figure | None:
    """Use of the device over the trainings of the first run."""
    use = device_use(canvas.group.first.trainings)
    if use is None:
        return None
    panels = []
    for keys, title, scale in (
        (("machine_utilisation", "utilisation"), "Utilisation, %", 100),
        (("power_w",), "Power, W", 1),
        (("clock_mhz",), "Clock, MHz", 1),
        (("memory_gb",), "Memory, GB", 1),
    ):
        known = [key for key in keys if key in use.values]
        if not known:
            continue
        means = ", ".join(f"{_WORDS.get(key, title)} {scale * np.nanmean(use.values[key]):.3g}" for key in known)
        with canvas.panel(title, f"{title} over {use.minutes_T[-1]:.1f} minutes of training. Means: {means}.") as panel:
            axes = panel.axes
            for start, _ in use.starts[1:]:
                axes.axvline(start, color=MARK["rule"], linewidth=0.6)
            for key in known:
                mark = "c6" if key == "machine_utilisation" else "c1"
                axes.plot(use.minutes_T, scale * use.values[key], color=MARK[mark], linewidth=1.1)
            axes.set_xlabel("minutes of training")
            axes.set_ylim(bottom=0)
        panels.append(panel.drawn())
    legend = [Key("this process", "c1", "solid")]
    if "machine_utilisation" in use.values:
        legend.append(Key("the whole machine", "c6", "solid"))
    return Figure(
        title="The device",
        caption="Readings while networks train, one training after another (vertical lines: where the next begins); "
        "the time is that of the steps, by the log's images a second. Validation and evaluation are left out.",
        panels=tuple(panels),
        legend=tuple(legend),
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running means over a twelfth of a curve."""
    width = max(1, len(values) // 12)
    return np.convolve(np.pad(values, (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")


def _frame_end(axes: Any, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Let the frame show the last two thirds of the epochs of every curve."""
    ends = np.concatenate([values[at >= at[-1] / 3] for at, values in curves])
    low, high = float(ends.min()), float(ends.max())
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    axes.set_ylim(low - room, high + room)

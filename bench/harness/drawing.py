"""Drawing of bars and lines, whatever they show: panels are plain data, `make_figure` draws them.

A provider has one colour everywhere, of Okabe and Ito's palette, which the colour-blind can tell apart: blue and green
for this program, orange for PyTorch's own means.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ensdistill.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = {
    "auto": "#0072B2",
    "triton": "#56B4E9",
    "library": "#009E73",
    "pruned": "#CC79A7",
    "compiled": "#E69F00",
    "compiled-vmap": "#D55E00",
    "resident": "#0072B2",
    "ffcv-cached": "#56B4E9",
    "ffcv": "#009E73",
    "dataloader": "#E69F00",
    "warm": "#0072B2",
    "ahead-of-time": "#56B4E9",
    "student": "#0072B2",
    "data": "#009E73",
}
"""Colour of each provider; `dataloader-2` is a `dataloader`. Who is not here is grey."""
GREY, INK, FAINT = "#8C8C8C", "#333333", "#BBBBBB"
ROW_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.3, 1.5, 9.0
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of a bar chart: a bar, or parts end to end."""

    label: str
    """Name to the left of the bar."""
    parts: Mapping[str, float]
    """Length by provider, who gives the colour; empty where nothing was timed."""
    text: str
    """Text at the end of the bar."""
    spread: tuple[float, float] | None = None
    """Ends of the whisker, where there is one."""
    floor: float | None = None
    """Length that nothing could be less than."""

    @property
    def end(self) -> float:
        """End of the bar with its whisker."""
        return max(sum(self.parts.values()), self.spread[1] if self.spread else 0.0)


@dataclass(frozen=True)
class Line:
    """Points that are drawn alike, a text beside the first of them, or both."""

    x: Sequence[float]
    """Places of the points along x."""
    y: Sequence[float]
    """Places of the points along y."""
    style: str = ""
    """Marker and line, as matplotlib writes them: `o-`, `--`; empty draws the text alone."""
    look: Mapping[str, Any] = field(default_factory=dict)
    """More that `Axes.plot` takes: colour, size, label."""
    band: Sequence[tuple[float, float]] = ()
    """Lower and upper edge of a band, at each x."""
    text: str = ""
    """Text beside the first point."""
    offset: int = 0
    """Points from there to the text: to the right, to the left, or (0) centred on it."""
    share: Literal["", "x", "y"] = ""
    """Coordinate that is a share of the panel, not a value."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: bars or lines; switched off where it has neither."""

    title: str = ""
    """Title above the axes."""
    xlabel: str = ""
    """Name of the x axis."""
    ylabel: str = ""
    """Name of the y axis."""
    bars: Sequence[Bar] = ()
    """Bars, the first on top."""
    room: float = 0.2
    """Room for the texts at the bars' ends, in lengths of the longest."""
    reference: float | None = None
    """Place of a line through all bars."""
    lines: Sequence[Line] = ()
    """Lines, in the order of drawing."""
    names: Sequence[str] = ()
    """Names of y = 0, 1, …, the first on top, in place of numbers."""
    ticks: Sequence[int] = ()
    """Places along x that have a number; matplotlib's choice where empty."""
    logarithmic: str = ""
    """Axes with a logarithmic scale: `x` or `xy`."""


def make_figure(
    title: str,
    panels: Sequence[Panel],
    caption: Iterable[str],
    *,
    across: int = 1,
    high: int = 0,
    legend: Mapping[str, Any] | None = None,
) -> Figure | None:
    """Draw panels with a title above and a caption below; None where there are no panels.

    Args:
        across: panels side by side.
        high: height of a panel, in lines of a bar chart (default: as many as it has).
        legend: the place of the first panel's legend, as `Axes.legend` takes it.
    """
    from matplotlib.figure import Figure

    if not panels:
        return None
    down = math.ceil(len(panels) / across)
    high = high or max(max(len(panel.bars), len(panel.names)) for panel in panels)
    figure = Figure(figsize=(WIDTH_INCHES, down * (HEAD_INCHES + ROW_INCHES * high)), layout="constrained")
    flat = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in flat[len(panels) :]:
        spare.remove()
    known: dict[str, Any] = {}
    for axes, panel in zip(flat, panels, strict=False):
        (bars if panel.bars else lines)(axes, panel)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    if known:
        flat[0].legend(known.values(), known.keys(), **(legend or {}))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    wrapped = [part for line in caption for part in textwrap.wrap(line, 130)]
    figure.supxlabel("\n".join(wrapped), x=0.01, ha="left", fontsize=7.5, color=GREY)
    return figure


def bars(axes: Axes, panel: Panel) -> None:
    """Draw one line a bar: its parts, its whisker, the floor as a dashed line, and its text."""
    longest = max((bar.end for bar in panel.bars if bar.parts), default=1.0)
    for i, bar in enumerate(panel.bars):
        start = 0.0
        for name, length in bar.parts.items():
            label = name if len(bar.parts) > 1 else None
            axes.barh(i, length, left=start, height=0.62, color=colour(name), label=label)
            start += length
        if bar.spread is not None:
            axes.plot(bar.spread, [i, i], color=INK, linewidth=1, marker="|", markersize=4)
        if bar.floor is not None:
            axes.plot([bar.floor] * 2, [i - 0.45, i + 0.45], color=INK, linewidth=1.2, linestyle=(0, (2, 1.5)))
        ink = INK if bar.parts else GREY
        axes.text(bar.end + 0.015 * longest, i, bar.text, va="center", fontsize=8, color=ink)
    if panel.reference is not None:
        axes.axvline(panel.reference, color=GREY, linewidth=0.8)
    _name_rows(axes, [bar.label for bar in panel.bars])
    axes.set_xlim(0, (1 + panel.room) * longest)
    axes.grid(visible=False, axis="y")


def lines(axes: Axes, panel: Panel) -> None:
    """Draw points, the lines and bands through them, and their texts."""
    places = {"": axes.transData, "x": axes.get_yaxis_transform(), "y": axes.get_xaxis_transform()}
    for line in panel.lines:
        look: dict[str, Any] = {"color": INK, "linewidth": 1, "markersize": 4, **line.look}
        if line.style:
            axes.plot(line.x, line.y, line.style, transform=places[line.share], **look)
        if line.band:
            axes.fill_between(line.x, *zip(*line.band, strict=True), color=look["color"], alpha=0.25, linewidth=0)
        if line.text:
            axes.annotate(
                line.text,
                (line.x[0], line.y[0]),
                xycoords=places[line.share],
                xytext=(line.offset, 0),
                textcoords="offset points",
                ha="left" if line.offset > 0 else "right" if line.offset else "center",
                va="center",
                fontsize=8,
                color=look["color"],
            )
    for name in panel.logarithmic:
        axes.set(**{f"{name}scale": "log"})
        _plain_decades(getattr(axes, f"{name}axis"), {"x": count, "y": "{:g}".format}[name])
    if panel.names:
        _name_rows(axes, panel.names)
    if panel.ticks:
        axes.set_xticks(panel.ticks, [str(tick) for tick in panel.ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(panel.ticks[0] / 1.25, panel.ticks[-1] * 1.25)
    else:
        axes.margins(0.12)
    if not panel.lines:
        axes.set_axis_off()


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Write a name at y = 0, 1, …, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _plain_decades(axis: Axis, text: Callable[[float], str]) -> None:
    """Write 1, 2, 5, 10, 20, … on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


def colour(provider: str) -> str:
    """Give a provider's colour, the same in every plot."""
    return COLOURS.get(provider) or COLOURS.get(re.sub(r"-\d+$", "", provider), GREY)


def count(number: float) -> str:
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a PNG and an SVG, the same bytes for the same rows."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in files:
        kind = path.suffix[1:]
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return files

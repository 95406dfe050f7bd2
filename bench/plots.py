"""Plots of a comparison, drawn from its CSVs alone: `draw(folder, out)`.

| file | from | what |
|---|---|---|
| `step` | step.csv | a step's time by provider, with its floor |
| `methods` | methods.csv | time, memory and energy of every method's step over those of a plain `ce` step |
| `job` | methods.csv | the whole job by method: data, teachers, student |
| `scaling` | scaling.csv | a step's time along one axis at a time, its floor, and where memory ends |
| `feed` | feed.csv | images/s, the machine's and a core's |
| `startup` | startup.csv | seconds to the first step |
| `nll` | nll.csv | what a network costs against its NLL |

Each is a PNG and an SVG. Marks stand at the median, whiskers and bands reach from the 20th to the 80th percentile. A
provider has one colour everywhere, of Okabe and Ito's palette, which the colour-blind can tell apart: blue and green
for this program, orange for PyTorch's own means. Below each plot stands what it was measured on, and how often.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness.rows import Row, read_rows
from ensdistill.config.methods import SHOWN, STUDENTS, Method
from ensdistill.runtime.errors import UserError
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
"""By provider; `dataloader-2` is a `dataloader`. Who is not here is grey."""
GREY, INK, FAINT = "#8C8C8C", "#333333", "#BBBBBB"
UNITS = ((3.6e6, "h"), (6e4, "min"), (1e3, "s"))
"""Milliseconds of a unit of time."""
ROW_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.3, 1.5, 9.0
NOTE_LENGTH = 60
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
    """A line of a bar chart."""

    label: str
    """Its name."""
    value: float | None
    """How long it is; None where there is none."""
    text: str
    """What stands at its end."""
    provider: str
    """Whose colour it has."""
    spread: tuple[float, float] | None = None
    """Where its whisker begins and ends."""
    floor: float | None = None
    """Where nothing could be less."""


def draw(folder: Path, out: Path) -> list[Path]:
    """Draw what the CSVs in `folder` hold.

    Returns:
        the files, in `out`.

    Raises:
        UserError: matplotlib is not installed, there is nothing to draw, or a file is no CSV of a comparison.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise UserError(
            "plots: matplotlib is not installed; install it with `pip install matplotlib` (it is in the extra `test`)"
        ) from error
    figures = []
    with rc_context(SETTINGS):
        for stem, makers in MAKERS.items():
            if (path := folder / f"{stem}.csv").is_file():
                rows = read_rows(path)
                figures += [(name, make([row for row in rows if row.part == part])) for name, part, make in makers]
        if (path := folder / "nll.csv").is_file():
            figures.append(("nll", nll_figure(path)))
        files = [_saved(figure, out / name) for name, figure in figures if figure is not None]
    if not files:
        known = ", ".join(f"{stem}.csv" for stem in (*MAKERS, "nll"))
        raise UserError(f"{folder}: nothing to draw; expected some of {known} with times: run `python -m bench` first")
    return [path for pair in files for path in pair]


def _saved(figure: Figure, stem: Path) -> list[Path]:
    """The same bytes for the same rows."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in files:
        kind = path.suffix[1:]
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return files


def _figure(panels: int, rows: float, *, across: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, `across` side by side, each as high as so many lines of a bar chart."""
    from matplotlib.figure import Figure

    down = math.ceil(panels / across)
    figure = Figure(figsize=(WIDTH_INCHES, down * (HEAD_INCHES + ROW_INCHES * rows)), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    flat = list(grid.flat)
    for spare in flat[panels:]:
        spare.remove()
    return figure, flat[:panels]


def _finished(figure: Figure, title: str, rows: Sequence[Row]) -> Figure:
    """With what it shows above, and what it was measured on below."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    timed = [row for row in rows if row.p50_ms is not None] or rows
    origins = dict.fromkeys(f"{row.device} · {row.versions} · commit {row.commit}" for row in timed)
    counts = sorted({row.n for row in timed})
    times = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    throttled = max((row.throttled or 0 for row in timed), default=0)
    warning = f" · throttled in up to {throttled:.0%} of the readings" if throttled else ""
    lines = [*origins, f"{times}, whiskers and bands: 20th to 80th percentile{warning}"]
    _caption(figure, lines)
    return figure


def _caption(figure: Figure, lines: Iterable[str]) -> None:
    wrapped = [part for line in lines for part in textwrap.wrap(line, 130)]
    figure.supxlabel("\n".join(wrapped), x=0.01, ha="left", fontsize=7.5, color=GREY)


def colour(provider: str) -> str:
    """Of a provider, the same in every plot."""
    return COLOURS.get(provider) or COLOURS.get(re.sub(r"-\d+$", "", provider), GREY)


def _bars(axes: Axes, bars: Sequence[Bar], label: str, room: float = 0.2) -> None:
    """One line a bar, the first on top; `room` for the texts at their ends, in lengths of the longest."""
    ends = [max(bar.value, bar.spread[1] if bar.spread else 0) for bar in bars if bar.value is not None]
    longest = max(ends, default=1)
    for i, bar in enumerate(bars):
        end = 0.0
        if bar.value is not None:
            axes.barh(i, bar.value, height=0.62, color=colour(bar.provider))
            end = bar.value
            if bar.spread is not None:
                low, high = bar.spread
                axes.plot([low, high], [i, i], color=INK, linewidth=1, marker="|", markersize=4)
                end = max(end, high)
            if bar.floor is not None:
                axes.plot([bar.floor] * 2, [i - 0.45, i + 0.45], color=INK, linewidth=1.2, linestyle=(0, (2, 1.5)))
        axes.text(end + 0.015 * longest, i, bar.text, va="center", fontsize=8, color=GREY if bar.value is None else INK)
    _lines_of_bars(axes, [bar.label for bar in bars], (1 + room) * longest)
    axes.set_xlabel(label)


def _lines_of_bars(axes: Axes, labels: Sequence[str], right: float) -> None:
    """The first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, right)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _not_timed(row: Row) -> str:
    return textwrap.shorten(row.note, NOTE_LENGTH, placeholder=" …") or "not timed"


def _spread(row: Row, scale: float = 1.0) -> tuple[float, float] | None:
    if row.p20_ms is None or row.p80_ms is None:
        return None
    return row.p20_ms * scale, row.p80_ms * scale


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _where(row: Row) -> str:
    """Network and sizes."""
    facts = [row.network, f"E {row.E}" if row.E else "", f"B {row.B}" if row.B else ""]
    return ", ".join(fact for fact in [*facts, f"{row.size} px" if row.size else ""] if fact)


def _problem(row: Row) -> str:
    """With the method."""
    return f"{row.method}, {_where(row)}"


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


# ---- step ---------------------------------------------------------------------------------------------------------


def step_figure(rows: Sequence[Row]) -> Figure | None:
    """Bars by provider, slowest first; a dashed line a bar where the device's floor is."""
    groups = _groups(rows, _problem)
    if not groups:
        return None
    figure, panels = _figure(len(groups), max(map(len, groups.values())))
    for axes, (problem, group) in zip(panels, groups.items(), strict=True):
        timed = sorted((row for row in group if row.p50_ms is not None), key=lambda row: -(row.p50_ms or 0))
        _bars(
            axes,
            [_step_bar(row) for row in (*timed, *(row for row in group if row.p50_ms is None))],
            "ms a step",
            room=0.3,
        )
        axes.set_title(problem)
    return _finished(figure, "One training step, by provider (dashed: the device's floor)", rows)


def _step_bar(row: Row) -> Bar:
    label = f"{row.provider} {row.precision}"
    if row.p50_ms is None:
        return Bar(label=label, value=None, text=_not_timed(row), provider=row.provider)
    share, floor = "", None
    if row.floor_share is not None:
        share, floor = f"  ({1 / row.floor_share:.3g} × the floor)", row.floor_share * row.p50_ms
    text = _milliseconds(row.p50_ms) + share
    return Bar(label=label, value=row.p50_ms, text=text, provider=row.provider, spread=_spread(row), floor=floor)


# ---- methods ------------------------------------------------------------------------------------------------------


KINDS: dict[str, Callable[[Row], float | None]] = {
    "time": lambda row: row.vs_ce,
    "memory": lambda row: row.peak_gb,
    "energy": lambda row: row.wh_per_million,
}


def methods_figure(rows: Sequence[Row]) -> Figure | None:
    """A line of panels a problem, each bars by method for one thing that is known, in units of what `ce` takes."""
    groups = [(base, group) for group in _groups(rows, _where).values() if (base := _base(group)) is not None]
    known = [kind for kind, of in KINDS.items() if any(of(base) for base, _ in groups)]
    if not known:
        return None
    figure, panels = _figure(len(groups) * len(known), max(len(group) for _, group in groups), across=len(known))
    places = [(base, group, kind) for base, group in groups for kind in known]
    for axes, (base, group, kind) in zip(panels, places, strict=True):
        if unit := KINDS[kind](base):
            _bars(axes, [_method_bar(row, unit, kind) for row in group], f"{kind} / that of ce")
            axes.axvline(1, color=GREY, linewidth=0.8)
            axes.set_title(f"{kind} (ce: {_amount(base, kind)})")
            if kind != known[0]:
                axes.set_yticklabels([])
        else:
            axes.set_axis_off()
    title = "One step of every method, relative to a plain ce step\n"
    return _finished(figure, title + "; ".join(_where(base) for base, _ in groups), rows)


def _base(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.method == "ce" and row.vs_ce is not None), None)


def _amount(row: Row, kind: str) -> str:
    if kind == "time":
        return _milliseconds(row.p50_ms or 0)
    if kind == "energy":
        return f"{row.wh_per_million:.3g} Wh / M images"
    size = row.peak_gb or 0
    return f"{size:.3g} GB" if size >= 0.1 else f"{1e3 * size:.3g} MB"


def _method_bar(row: Row, unit: float, kind: str) -> Bar:
    value = KINDS[kind](row)
    if value is None:
        return Bar(label=row.method, value=None, text="–", provider=row.provider)
    spread = _spread(row, value / row.p50_ms) if kind == "time" and row.p50_ms else None
    text = f"{value / unit:.3g}"
    return Bar(label=row.method, value=value / unit, text=text, provider=row.provider, spread=spread)


# ---- the whole job ------------------------------------------------------------------------------------------------

STAGES = ("data", "teachers", "student")


def job_figure(rows: Sequence[Row]) -> Figure | None:
    """A panel a problem, a bar a method, of what comes one after the other."""
    groups = {
        where: group
        for where, group in _groups(rows, _where).items()
        if any(row.provider == "job" and row.p50_ms is not None for row in group)
    }
    if not groups:
        return None
    figure, panels = _figure(len(groups), max(sum(row.provider == "job" for row in group) for group in groups.values()))
    for axes, (where, group) in zip(panels, groups.items(), strict=True):
        _jobs(axes, group)
        axes.set_title(f"{where}; {next(row.note for row in group if row.provider == 'job')}")
    panels[0].legend(loc="upper right", ncols=len(STAGES))
    return _finished(figure, "The whole job by method, from the speeds of its parts", rows)


def _jobs(axes: Axes, rows: Sequence[Row]) -> None:
    by_stage = {(row.provider, row.method): row.p50_ms or 0 for row in rows}
    jobs = [row for row in rows if row.provider == "job" and row.p50_ms is not None]
    longest = max(row.p80_ms or row.p50_ms or 0 for row in jobs)
    unit, name = next((unit, name) for unit, name in UNITS if longest >= unit or unit == UNITS[-1][0])
    for i, job in enumerate(jobs):
        methods = {"data": "", "teachers": "ce", "student": job.method}
        if not Method.parse(job.method).needs_teachers:
            del methods["teachers"]
        total, start = (job.p50_ms or 0) / unit, 0.0
        for stage in STAGES:
            length = by_stage.get((stage, methods[stage]), 0) / unit if stage in methods else 0.0
            axes.barh(i, length, left=start, height=0.62, color=colour(stage), label=stage if i == 0 else None)
            start += length
        low, high = _spread(job, 1 / unit) or (total, total)
        axes.plot([low, high], [i, i], color=INK, linewidth=1, marker="|", markersize=4)
        axes.text(high + 0.015 * longest / unit, i, f"{total:.3g} {name}", va="center", fontsize=8)
    _lines_of_bars(axes, [job.method for job in jobs], 1.2 * longest / unit)
    axes.set_xlabel(name)


# ---- scaling ------------------------------------------------------------------------------------------------------


def _width(row: Row) -> int:
    wide = re.fullmatch(r"wrn\d+x(\d+)", row.network)
    return int(wide[1]) if wide else 0


def _depth(row: Row) -> str:
    return row.network.partition("x")[0]


AXES: dict[str, tuple[str, Callable[[Row], int], Callable[[Row], Any]]] = {
    "E": ("members E", lambda row: row.E or 0, lambda row: (row.network, row.B, row.size)),
    "B": ("images a step B", lambda row: row.B or 0, lambda row: (row.network, row.E, row.size)),
    "size": ("side of an image, pixels", lambda row: row.size or 0, lambda row: (row.network, row.E, row.B)),
    "width": ("width of the network", _width, lambda row: (_depth(row), row.E, row.B, row.size)),
}
"""By axis: its name, where a row is on it (0: nowhere), and what rows on one line share."""


def lines_of(rows: Sequence[Row], axis: str) -> list[list[Row]]:
    """Rows that differ along `axis` alone, in its order: of each problem those that were timed or do not fit."""
    _, at, shared = AXES[axis]
    points = [row for row in rows if at(row) and (row.p50_ms is not None or ends_memory(row))]
    groups = _groups(points, lambda row: (row.provider, row.precision, shared(row)))
    lines = [sorted(group, key=at) for group in groups.values()]
    return [line for line in lines if len({at(row) for row in line}) > 1]


def ends_memory(row: Row) -> bool:
    """Whether it has no time because it does not fit: then its memory is what it would need."""
    return row.p50_ms is None and row.peak_gb is not None


def scaling_figure(rows: Sequence[Row]) -> Figure | None:
    """A panel an axis, both scales logarithmic."""
    found = {axis: lines for axis in AXES if (lines := lines_of(rows, axis))}
    if not found:
        return None
    figure, panels = _figure(len(found), 6, across=min(2, len(found)))
    for axes, (axis, lines) in zip(panels, found.items(), strict=True):
        for line in lines:
            _scaling_line(axes, line, AXES[axis][1])
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({AXES[axis][1](row) for line in lines for row in line})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        _plain_decades(axes.yaxis, "{:g}".format)
        axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
        axes.set_xlabel(AXES[axis][0])
        axes.set_ylabel("ms a step")
        axes.set_title("\n".join(textwrap.wrap(_line_title(lines, axis), 60)))
    _scaling_legend(panels[0], [row for lines in found.values() for line in lines for row in line])
    return _finished(figure, "How a training step grows, along one axis at a time", rows)


def _line_title(lines: Sequence[Sequence[Row]], axis: str) -> str:
    """What the rows share."""
    row = lines[0][-1]
    facts = {"E": f"E {row.E}", "B": f"B {row.B}", "size": f"{row.size} px"}
    network = _depth(row) if axis == "width" else row.network
    shared = [network, *(fact for name, fact in facts.items() if name != axis)]
    return ", ".join([row.method, *shared] if len(lines) == 1 else [row.method])


def _scaling_line(axes: Axes, line: Sequence[Row], at: Callable[[Row], int]) -> None:
    """Rows of another method than the last one's stand by themselves."""
    timed = [row for row in line if row.p50_ms is not None]
    main, ink = [row for row in timed if row.method == line[-1].method], colour(line[-1].provider)
    x, middle = [at(row) for row in main], [row.p50_ms or 0 for row in main]
    axes.plot(x, middle, color=ink, marker="o", markersize=4)
    spread = [_spread(row) or (row.p50_ms or 0,) * 2 for row in main]
    axes.fill_between(x, [low for low, _ in spread], [high for _, high in spread], color=ink, alpha=0.25, linewidth=0)
    floors = [(at(row), row.floor_share * (row.p50_ms or 0)) for row in main if row.floor_share is not None]
    axes.plot([x for x, _ in floors], [y for _, y in floors], color=INK, linestyle="--", linewidth=1)
    for row in (row for row in timed if row not in main):
        place, time = at(row), row.p50_ms or 0
        axes.plot([place] * 2, _spread(row) or (time, time), color=ink, linewidth=1)
        axes.plot([place], [time], color=ink, marker="o", markersize=5, markerfacecolor="white")
        if row.floor_share is not None:
            axes.plot([place], [row.floor_share * time], color=INK, marker="_", markersize=8)
    ends = [row for row in line if ends_memory(row)]
    for i, row in enumerate(ends):
        axes.plot([at(row)], [0.94], transform=axes.get_xaxis_transform(), color=INK, marker="x", linestyle="none")
        if i == 0:
            text = f"needs {row.peak_gb:.3g} GB"
            axes.text(at(row), 0.86, text, transform=axes.get_xaxis_transform(), ha="center", fontsize=7.5)


def _scaling_legend(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    main, ink = rows[-1].method, colour(rows[-1].provider)
    providers = dict.fromkeys(row.provider for row in rows)
    handles = [Line2D([], [], color=colour(name), marker="o", markersize=4, label=name) for name in providers]
    handles += [
        Line2D([], [], color=ink, marker="o", markersize=5, markerfacecolor="white", linestyle="none", label=method)
        for method in dict.fromkeys(f"{row.method} alone" for row in rows if row.method != main)
    ]
    if any(row.floor_share is not None for row in rows):
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1, label="the device's floor"))
    if any(map(ends_memory, rows)):
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="none", label="does not fit into memory"))
    axes.legend(handles=handles, loc="best", fontsize=7.5)


def _plain_decades(axis: Axis, text: Callable[[float], str]) -> None:
    """1, 2, 5, 10, 20, … on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(NullFormatter())


# ---- feed and start-up --------------------------------------------------------------------------------------------


def feed_figure(rows: Sequence[Row]) -> Figure | None:
    """A panel a size: the machine's images/s and a core's, on a logarithmic scale."""
    groups = _groups(rows, lambda row: row.size)
    if not groups:
        return None
    figure, panels = _figure(len(groups), max(map(len, groups.values())))
    for axes, (size, group) in zip(panels, groups.items(), strict=True):
        for i, row in enumerate(group):
            _feed_line(axes, i, row)
        axes.set_xscale("log")
        axes.set_yticks(range(len(group)), [row.provider for row in group])
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.margins(x=0.12)
        _plain_decades(axes.xaxis, _count)
        axes.set_xlabel("images/s")
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{size} px, batches of {group[0].B}")
    return _finished(figure, "Images that arrive, by loader (filled: the machine; hollow: a core in use)", rows)


def _feed_line(axes: Axes, i: int, row: Row) -> None:
    if row.p50_ms is None or row.images_per_s is None:
        axes.text(0.01, i, _not_timed(row), transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
        return
    ink, number = colour(row.provider), row.images_per_s
    axes.plot([number], [i], color=ink, marker="o", markersize=7, linestyle="none")
    ends = [number * row.p50_ms / time for time in _spread(row) or ()]
    if ends:
        axes.plot(ends, [i, i], color=INK, linewidth=1, marker="|", markersize=5)
    marks = [(number, min([number, *ends]), max([number, *ends]))]
    if (a_core := row.images_per_s_core) is not None:
        axes.plot([a_core], [i], marker="D", markersize=6, markerfacecolor="white", markeredgecolor=ink)
        marks.append((a_core, a_core, a_core))
    marks.sort()
    for value, low, high in marks:
        is_left = len(marks) > 1 and (value, low, high) == marks[0]
        axes.annotate(
            _count(value),
            (low if is_left else high, i),
            xytext=(-7 if is_left else 7, 0),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="center",
            fontsize=8,
        )


def _count(number: float) -> str:
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def startup_figure(rows: Sequence[Row]) -> Figure | None:
    """Bars by how much was there before."""
    groups = _groups(rows, _problem)
    if not groups:
        return None
    figure, panels = _figure(len(groups), max(map(len, groups.values())))
    for axes, (problem, group) in zip(panels, groups.items(), strict=True):
        _bars(axes, [_startup_bar(row) for row in group], "seconds")
        axes.set_title(problem)
    return _finished(figure, "From the command to the end of the first training step", rows)


def _startup_bar(row: Row) -> Bar:
    if row.p50_ms is None:
        return Bar(label=row.provider, value=None, text=_not_timed(row), provider=row.provider)
    seconds = row.p50_ms / 1e3
    return Bar(
        label=row.provider, value=seconds, text=f"{seconds:.3g} s", provider=row.provider, spread=_spread(row, 1e-3)
    )


# ---- cost against NLL ---------------------------------------------------------------------------------------------

STUDENT_COLOURS = dict(zip(STUDENTS, ("#333333", "#CC79A7", "#0072B2", "#009E73", "#E69F00"), strict=True))
SHOWN_MARKERS = dict(zip(SHOWN, "osv^DP", strict=True))


def nll_figure(path: Path) -> Figure | None:
    """A point a method: the mean over its seeds, with lines to the extremes. Columns: method, nll, cost, and others.

    Raises:
        UserError: it has not these columns, or something else in them.
    """
    seeds: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["cost"] and row["nll"]:
                    seeds.setdefault(row["method"], []).append((float(row["cost"]), float(row["nll"])))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected a CSV with the columns method, nll and cost ({error!r})") from error
    if not seeds:
        return None
    figure, (axes,) = _figure(1, 12)
    methods = {name: method for name in seeds if (method := _method(name)) is not None}
    for name, points in seeds.items():
        method = methods.get(name)
        ink = GREY if method is None else STUDENT_COLOURS[method.student]
        _seeds(axes, points, ink, "*" if method is None else SHOWN_MARKERS[method.shown])
        if method is None:
            place = statistics.fmean(cost for cost, _ in points), statistics.fmean(nll for _, nll in points)
            axes.annotate(name, place, xytext=(7, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("cost of training, one teacher's being 1")
    axes.set_ylabel("NLL on test images (lower is better)")
    axes.margins(0.12)
    axes.set_title("What a network costs to train, and how good it is", fontweight="bold", fontsize=11)
    _nll_legend(axes, list(methods.values()))
    counts = sorted({len(points) for points in seeds.values()})
    times = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    _caption(figure, [f"{path.name}: n = {times}, means; lines: smallest to largest"])
    return figure


def _method(name: str) -> Method | None:
    """None: it is no student, but teachers."""
    try:
        return Method.parse(name)
    except UserError:
        return None


def _seeds(axes: Axes, points: Sequence[tuple[float, float]], ink: str, marker: str) -> None:
    costs, nlls = zip(*points, strict=True)
    x, y = statistics.fmean(costs), statistics.fmean(nlls)
    axes.plot([min(costs), max(costs)], [y, y], color=ink, linewidth=0.8)
    axes.plot([x, x], [min(nlls), max(nlls)], color=ink, linewidth=0.8)
    axes.plot([x], [y], color=ink, marker=marker, markersize=6, linestyle="none")


def _nll_legend(axes: Axes, methods: Sequence[Method]) -> None:
    """Colours by student, markers by data shown."""
    from matplotlib.lines import Line2D

    students = [name for name in STUDENTS if any(method.student == name for method in methods)]
    shown = [name for name in SHOWN if any(method.shown == name for method in methods)]
    squares = [
        Line2D([], [], color=STUDENT_COLOURS[name], linestyle="none", marker="s", markersize=8, label=name)
        for name in students
    ]
    marks = [
        Line2D([], [], color=GREY, linestyle="none", marker=SHOWN_MARKERS[name], markersize=6, label=name)
        for name in shown
    ]
    axes.legend(handles=[*squares, *marks], loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)


MAKERS: dict[str, tuple[tuple[str, str, Callable[[Sequence[Row]], Figure | None]], ...]] = {
    "step": (("step", "step", step_figure),),
    "methods": (("methods", "methods", methods_figure), ("job", "job", job_figure)),
    "scaling": (("scaling", "scaling", scaling_figure),),
    "feed": (("feed", "feed", feed_figure),),
    "startup": (("startup", "start-up", startup_figure),),
}
"""By CSV: name of the plot, part of the rows, and what draws them."""

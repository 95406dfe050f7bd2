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

Each is a PNG and an SVG. Marks stand at the median, whiskers and bands reach from the 20th to the 80th percentile.
Below each plot stands what it was measured on, and how often. Here rows become panels of bars or lines, which are plain
data; harness/drawing.py draws them.
"""

from __future__ import annotations

import csv
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness.drawing import GREY, SETTINGS, Bar, Line, Panel, colour, count, make_figure, save
from bench.harness.rows import Row, read_rows
from ensdistill.config.methods import SHOWN, STUDENTS, Method
from ensdistill.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = ((3.6e6, "h"), (6e4, "min"), (1e3, "s"))
"""Milliseconds of each unit of time, and its name."""
NOTE_LENGTH = 60
STUDENT_COLOURS = dict(zip(STUDENTS, ("#333333", "#CC79A7", "#0072B2", "#009E73", "#E69F00"), strict=True))
SHOWN_MARKERS = dict(zip(SHOWN, "osv^DP", strict=True))


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
    with rc_context(SETTINGS):
        figures = {}
        for name, (stem, part, figure_of) in PICTURES.items():
            if (path := folder / f"{stem}.csv").is_file():
                figures[name] = figure_of([row for row in read_rows(path) if row.part == part])
        if (path := folder / "nll.csv").is_file():
            figures["nll"] = nll_figure(path)
        files = [save(figure, out / name) for name, figure in figures.items() if figure is not None]
    if not files:
        known = ", ".join(f"{stem}.csv" for stem in dict.fromkeys([stem for stem, *_ in PICTURES.values()] + ["nll"]))
        raise UserError(f"{folder}: nothing to draw; expected some of {known} with times: run `python -m bench` first")
    return [path for pair in files for path in pair]


# ---- words and groups -----------------------------------------------------------------------------------------------


def _origin(rows: Sequence[Row]) -> list[str]:
    """Say what the rows were measured on, and how often."""
    timed = [row for row in rows if row.p50_ms is not None] or rows
    origins = dict.fromkeys(f"{row.device} · {row.versions} · commit {row.commit}" for row in timed)
    throttled = max((row.throttled or 0 for row in timed), default=0)
    warning = f" · throttled in up to {throttled:.0%} of the readings" if throttled else ""
    return [*origins, f"{_times(row.n for row in timed)}, whiskers and bands: 20th to 80th percentile{warning}"]


def _times(counts: Iterable[int]) -> str:
    """Write `n = 3`, or `n = 3 to 15`."""
    found = sorted(set(counts))
    return "n = " + " to ".join(map(str, dict.fromkeys([*found[:1], *found[-1:]])))


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _where(row: Row) -> str:
    """Write network and sizes: `wrn28x4, E 4, B 128, 32 px`."""
    facts = [row.network, f"E {row.E}" if row.E else "", f"B {row.B}" if row.B else ""]
    return ", ".join(fact for fact in [*facts, f"{row.size} px" if row.size else ""] if fact)


def _problem(row: Row) -> str:
    return f"{row.method}, {_where(row)}"


def _not_timed(row: Row) -> str:
    return textwrap.shorten(row.note, NOTE_LENGTH, placeholder=" …") or "not timed"


def _spread(row: Row, scale: float = 1.0) -> tuple[float, float] | None:
    if row.p20_ms is None or row.p80_ms is None:
        return None
    return row.p20_ms * scale, row.p80_ms * scale


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


# ---- bars -----------------------------------------------------------------------------------------------------------


def step_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw a panel a problem, a bar a provider, slowest first."""
    ordered = sorted(rows, key=lambda row: (row.p50_ms is None, -(row.p50_ms or 0)))
    bars = [(row, _time_bar(row, f"{row.provider} {row.precision}", 1.0, _milliseconds)) for row in ordered]
    title = "One training step, by provider (dashed: the device's floor)"
    return _times_figure(title, "ms a step", rows, bars, room=0.3)


def startup_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw a panel a problem, a bar for each amount of what was there before."""
    bars = [(row, _time_bar(row, row.provider, 1e3, "{:.3g} s".format)) for row in rows]
    return _times_figure("From the command to the end of the first training step", "seconds", rows, bars)


def _times_figure(
    title: str, unit: str, rows: Sequence[Row], bars: Sequence[tuple[Row, Bar]], room: float = 0.2
) -> Figure | None:
    problems = dict.fromkeys(map(_problem, rows))
    panels = [
        Panel(title=problem, xlabel=unit, bars=[bar for row, bar in bars if _problem(row) == problem], room=room)
        for problem in problems
    ]
    return make_figure(title, panels, _origin(rows))


def _time_bar(row: Row, label: str, unit_ms: float, text: Callable[[float], str]) -> Bar:
    """Make a bar of a row's time, in units of `unit_ms`, with its floor where that is known."""
    if row.p50_ms is None:
        return Bar(label=label, parts={}, text=_not_timed(row))
    value, share = row.p50_ms / unit_ms, row.floor_share
    return Bar(
        label=label,
        parts={row.provider: value},
        text=text(value) + (f"  ({1 / share:.3g} × the floor)" if share else ""),
        spread=_spread(row, 1 / unit_ms),
        floor=share and share * value,
    )


KINDS: dict[str, tuple[Callable[[Row], float | None], Callable[[Row], str]]] = {
    "time": (lambda row: row.vs_ce, lambda row: _milliseconds(row.p50_ms or 0)),
    "memory": (lambda row: row.peak_gb, lambda row: _gigabytes(row.peak_gb or 0)),
    "energy": (lambda row: row.wh_per_million, lambda row: f"{row.wh_per_million:.3g} Wh / M images"),
}
"""Things that a method takes: how much that is, and how it is written."""


def _gigabytes(size: float) -> str:
    return f"{size:.3g} GB" if size >= 0.1 else f"{1e3 * size:.3g} MB"


def methods_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw a line of panels a problem, each bars by method for one thing that is known, in units of what `ce` takes."""
    problems = []
    for group in _groups(rows, _where).values():
        base = next((row for row in group if row.method == "ce" and row.vs_ce is not None), None)
        if base is not None:
            problems.append((base, group))
    known = [kind for kind, (amount, _) in KINDS.items() if any(amount(base) for base, _ in problems)]
    panels = [_methods_panel(base, group, kind, kind == known[0]) for base, group in problems for kind in known]
    title = "One step of every method, relative to a plain ce step\n" + "; ".join(_where(base) for base, _ in problems)
    return make_figure(title, panels, _origin(rows), across=len(known))


def _methods_panel(base: Row, rows: Sequence[Row], kind: str, is_first: bool) -> Panel:
    amount, text = KINDS[kind]
    unit = amount(base)
    if not unit:
        return Panel()
    bars = []
    for row in rows:
        value = amount(row)
        bars.append(
            Bar(
                label=row.method if is_first else "",
                parts={} if value is None else {row.provider: value / unit},
                text="–" if value is None else f"{value / unit:.3g}",
                spread=_spread(row, value / row.p50_ms) if kind == "time" and value and row.p50_ms else None,
            )
        )
    return Panel(title=f"{kind} (ce: {text(base)})", xlabel=f"{kind} / that of ce", bars=bars, reference=1)


def job_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw a panel a problem, a bar a method, of what comes one after the other."""
    panels = []
    for where, group in _groups(rows, _where).items():
        times = {(row.provider, row.method): row.p50_ms for row in group}
        jobs = [row for row in group if row.provider == "job" and row.p50_ms is not None]
        if not jobs:
            continue
        longest = max(row.p80_ms or row.p50_ms or 0 for row in jobs)
        unit, name = next((unit, name) for unit, name in UNITS if longest >= unit or unit == UNITS[-1][0])
        bars = [_job_bar(job, times, unit, name) for job in jobs]
        panels.append(Panel(title=f"{where}; {jobs[0].note}", xlabel=name, bars=bars))
    title, legend = "The whole job by method, from the speeds of its parts", {"loc": "upper right", "ncols": 3}
    return make_figure(title, panels, _origin(rows), legend=legend)


def _job_bar(job: Row, times: Mapping[tuple[str, str], float | None], unit_ms: float, unit: str) -> Bar:
    keys = {"data": ("data", ""), "teachers": ("teachers", "ce"), "student": ("student", job.method)}
    if not Method.parse(job.method).needs_teachers:
        keys["teachers"] = ("", "")
    return Bar(
        label=job.method,
        parts={stage: (times.get(key) or 0) / unit_ms for stage, key in keys.items()},
        text=f"{(job.p50_ms or 0) / unit_ms:.3g} {unit}",
        spread=_spread(job, 1 / unit_ms),
    )


# ---- lines ----------------------------------------------------------------------------------------------------------


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
"""Axes of the scaling: name, where a row is on it (0: nowhere), and what rows on one line share."""


def lines_of(rows: Sequence[Row], axis: str) -> list[list[Row]]:
    """Find rows that differ along `axis` alone, in its order: of each problem those that were timed or do not fit."""
    _, at, shared = AXES[axis]
    points = [row for row in rows if at(row) and (row.p50_ms is not None or ends_memory(row))]
    groups = _groups(points, lambda row: (row.provider, row.precision, shared(row)))
    found = [sorted(group, key=at) for group in groups.values()]
    return [line for line in found if len({at(row) for row in line}) > 1]


def ends_memory(row: Row) -> bool:
    """Tell whether a row has no time because it does not fit: then its memory is what it would need."""
    return row.p50_ms is None and row.peak_gb is not None


def scaling_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw a panel an axis, both scales logarithmic."""
    panels = [
        Panel(
            title="\n".join(textwrap.wrap(_line_title(found, axis), 60)),
            xlabel=name,
            ylabel="ms a step",
            lines=[line for one in found for line in _scaling_lines(one, at)],
            ticks=sorted({at(row) for one in found for row in one}),
            logarithmic="xy",
        )
        for axis, (name, at, _) in AXES.items()
        if (found := lines_of(rows, axis))
    ]
    title, legend = "How a training step grows, along one axis at a time", {"loc": "best", "fontsize": 7.5}
    return make_figure(title, panels, _origin(rows), across=min(2, len(panels)), high=6, legend=legend)


def _line_title(found: Sequence[Sequence[Row]], axis: str) -> str:
    """Say what the rows share."""
    row = found[0][-1]
    facts = {"E": f"E {row.E}", "B": f"B {row.B}", "size": f"{row.size} px"}
    network = _depth(row) if axis == "width" else row.network
    shared = [network, *(fact for name, fact in facts.items() if name != axis)]
    return ", ".join([row.method, *shared] if len(found) == 1 else [row.method])


def _scaling_lines(rows: Sequence[Row], at: Callable[[Row], int]) -> Iterator[Line]:
    """Make a line with its band and floor; rows of another method than the last one's stand by themselves."""
    ink = {"color": colour(rows[-1].provider)}
    timed = [(at(row), row.p50_ms, row) for row in rows if row.p50_ms is not None]
    main = [point for point in timed if point[-1].method == rows[-1].method]
    x, y = [x for x, _, _ in main], [time for _, time, _ in main]
    band = [_spread(row) or (time, time) for _, time, row in main]
    yield Line(x, y, "o-", {**ink, "linewidth": 1.5, "label": rows[-1].provider}, band)
    floors = {x: time * row.floor_share for x, time, row in main if row.floor_share is not None}
    yield Line([*floors], [*floors.values()], "--", {"label": "the device's floor" if floors else None})
    for x, time, row in (point for point in timed if point not in main):
        yield Line([x, x], _spread(row) or (time, time), "-", ink)
        look = {"markersize": 5, "markerfacecolor": "white", "label": f"{row.method} alone"}
        yield Line([x], [time], "o", ink | look)
        if row.floor_share is not None:
            yield Line([x], [row.floor_share * time], "_", {"markersize": 8})
    ends = [row for row in rows if ends_memory(row)]
    for row in ends:
        yield Line([at(row)], [0.94], "x", {"markersize": 6, "label": "does not fit into memory"}, share="y")
    for row in ends[:1]:
        yield Line([at(row)], [0.88], text=f"needs {row.peak_gb:.3g} GB", share="y")


def feed_figure(rows: Sequence[Row]) -> Figure | None:
    """Draw a panel a size: the machine's images/s and a core's, on a logarithmic scale."""
    panels = [
        Panel(
            title=f"{size} px, batches of {group[0].B}",
            xlabel="images/s",
            lines=[line for i, row in enumerate(group) for line in _feed_lines(i, row)],
            names=[row.provider for row in group],
            logarithmic="x",
        )
        for size, group in _groups(rows, lambda row: row.size).items()
    ]
    title = "Images that arrive, by loader (filled: the machine; hollow: a core in use)"
    return make_figure(title, panels, _origin(rows))


def _feed_lines(i: int, row: Row) -> Iterator[Line]:
    """Make the machine's mark with its whisker and a core's, and a number on the outer side of each."""
    if row.p50_ms is None or row.images_per_s is None:
        yield Line([0.01], [i], look={"color": GREY}, text=_not_timed(row), offset=1, share="x")
        return
    ink, number = {"color": colour(row.provider)}, row.images_per_s
    yield Line([number], [i], "o", ink | {"markersize": 7})
    ends = [number * row.p50_ms / time for time in _spread(row) or ()]
    if ends:
        yield Line(ends, [i, i], "|-", {"markersize": 5})
    marks = [(number, min([number, *ends]), max([number, *ends]))]
    if (a_core := row.images_per_s_core) is not None:
        yield Line([a_core], [i], "D", ink | {"markersize": 6, "markerfacecolor": "white"})
        marks.append((a_core, a_core, a_core))
    for mark in marks:
        value, low, high = mark
        is_left = len(marks) > 1 and mark == min(marks)
        yield Line([low if is_left else high], [i], text=count(value), offset=-7 if is_left else 7)


def nll_figure(path: Path) -> Figure | None:
    """Draw a point a method: the mean over its seeds, with lines to the extremes. Columns: method, nll, cost, others.

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
    methods = {name: _method(name) for name in seeds}
    points: list[Line] = []
    for name, found in seeds.items():
        method = methods[name]
        ink = {"color": STUDENT_COLOURS[method.student] if method else GREY}
        costs, nlls = zip(*found, strict=True)
        x, y = statistics.fmean(costs), statistics.fmean(nlls)
        points += [
            Line([min(costs), max(costs)], [y, y], "-", ink),
            Line([x, x], [min(nlls), max(nlls)], "-", ink),
            Line([x], [y], SHOWN_MARKERS[method.shown] if method else "*", ink | {"markersize": 6}),
        ]
        if method is None:
            points.append(Line([x], [y], text=name, offset=7))
    students, shown = ({getattr(method, kind, "") for method in methods.values()} for kind in ("student", "shown"))
    points += [
        Line([], [], "s", {"color": ink, "markersize": 8, "label": name})
        for name, ink in STUDENT_COLOURS.items()
        if name in students
    ]
    points += [
        Line([], [], marker, {"color": GREY, "markersize": 6, "label": name})
        for name, marker in SHOWN_MARKERS.items()
        if name in shown
    ]
    panel = Panel(
        xlabel="cost of training, one teacher's being 1", ylabel="NLL on test images (lower is better)", lines=points
    )
    return make_figure(
        "What a network costs to train, and how good it is",
        [panel],
        [f"{path.name}: {_times(map(len, seeds.values()))}, means; lines: smallest to largest"],
        high=12,
        legend={"loc": "upper left", "bbox_to_anchor": (1.01, 1), "fontsize": 8},
    )


def _method(name: str) -> Method | None:
    """Read a student's method; None of teachers."""
    try:
        return Method.parse(name)
    except UserError:
        return None


PICTURES: dict[str, tuple[str, str, Callable[[Sequence[Row]], Figure | None]]] = {
    "step": ("step", "step", step_figure),
    "methods": ("methods", "methods", methods_figure),
    "job": ("methods", "job", job_figure),
    "scaling": ("scaling", "scaling", scaling_figure),
    "feed": ("feed", "feed", feed_figure),
    "startup": ("startup", "start-up", startup_figure),
}
"""Plots by name: the CSV, the part of its rows that is shown, and what makes them a figure."""

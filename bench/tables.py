"""Rows as tables on a terminal: who took how long, how sure that is, and how far it is from the floor.

`ms` is the median, `20..80` the spread between those percentiles of the turns. `x first` is how many times faster than
the first of those who did the same a row is; `tie` where their spreads overlap, or one was measured less than `LEAST`
times: then neither is called the faster.
`floor` is the share of the device's floor in the median. Columns that no row has are left out, and what all rows share
stands in the title.

Two CSVs of one kind, before and after, are compared row by row: one of the same part, provider and problem each. It is
a tie where the spreads overlap, where one was measured less than `LEAST` times, or where the medians differ by less
than `THRESHOLD`: a spread within one run knows nothing of what differs from run to run. A row that had a time and now
has none, such as a provider whose numbers became wrong, is lost. What only one of the files has is listed, and judged
as nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from bench.harness.rows import Row
from ensdistill.config.methods import Method
from ensdistill.costs.plan import format_seconds

JOB = "job"
LEAST = 3
"""Times that something has to be measured before it is called faster or slower than something else."""
THRESHOLD = 0.02
"""Relative difference of medians below which nothing is said of two files."""
Verdict = Literal["faster", "slower", "tie", "lost", "new", "not timed", "only before", "only after"]
REGRESSIONS: tuple[Verdict, ...] = ("slower", "lost")
_PROBLEM = ("network", "method", "E", "B", "size", "precision")


def render(rows: Sequence[Row]) -> Group:
    """Make a table a part, in the order of the rows, with the notes of its rows below."""
    parts = list(dict.fromkeys(row.part for row in rows))
    shown: list[Any] = []
    for part in parts:
        own = [row for row in rows if row.part == part]
        shown += [job_table(own) if part == JOB else part_table(own), *_note_lines(own), ""]
    return Group(*shown)


def part_table(rows: Sequence[Row]) -> Table:
    """Make a table of one part: a line a row."""
    table, shared = _table(rows)
    varying = [name for name in _PROBLEM if name not in shared and any(getattr(row, name) for row in rows)]
    first, ce, numbers = _firsts(rows), _plain_steps(rows), _note_numbers(rows)
    columns: dict[str, Callable[[Row], str]] = {
        "n": lambda row: str(row.n) if row.n else "",
        "ms": lambda row: number(row.p50_ms),
        "20..80": spread,
        "x first": lambda row: _against(row, first),
        "x ce": lambda row: number(row.vs_ce),
        "memory x ce": lambda row: _relative(row, ce, "peak_gb"),
        "energy x ce": lambda row: _relative(row, ce, "wh_per_million"),
        "images/s": lambda row: number(row.images_per_s),
        "TFLOP/s": lambda row: number(row.tflops),
        "GB/s": lambda row: number(row.gbps),
        "floor": lambda row: _percent(row.floor_share),
        "peak GB": lambda row: number(row.peak_gb),
        "Wh/M": lambda row: number(row.wh_per_million),
        "MHz": lambda row: number(row.clock_mhz),
        "throttled": lambda row: _percent(row.throttled),
        "note": lambda row: f"({numbers[row.note]})" if row.note else "",
    }
    cells = {name: [column(row) for row in rows] for name, column in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    table.add_column("provider", no_wrap=True)
    for name in varying:
        table.add_column("px" if name == "size" else name, no_wrap=True)
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        problem = ["" if getattr(row, name) is None else str(getattr(row, name)) for name in varying]
        table.add_row(row.provider, *problem, *(column[i] for column in cells.values()))
    return table


def job_table(rows: Sequence[Row]) -> Table:
    """Make a table of whole jobs: a line a method, a column a part of the job."""
    table, shared = _table(rows)
    varies = "network" not in shared
    for name in (["network"] if varies else []) + ["method"]:
        table.add_column(name, no_wrap=True)
    for name in ("data", "teachers", "student", "whole job", "20..80", "x ce"):
        table.add_column(name, justify="right", no_wrap=True)
    by_key = {(row.network, row.provider, row.method): row for row in rows}

    def milliseconds(network: str, provider: str, method: str) -> float | None:
        row = by_key.get((network, provider, method))
        return None if row is None else row.p50_ms

    for row in rows:
        if row.provider != JOB or row.p20_ms is None or row.p50_ms is None or row.p80_ms is None:
            continue
        network, ce = row.network, milliseconds(row.network, JOB, "ce")
        taught = Method.parse(row.method).needs_teachers
        teachers = milliseconds(network, "teachers", "ce") if taught else None
        parts = milliseconds(network, "data", ""), teachers, milliseconds(network, "student", row.method)
        table.add_row(
            *([network] if varies else []),
            row.method,
            *("" if part is None else format_seconds(part / 1e3) for part in parts),
            format_seconds(row.p50_ms / 1e3),
            f"{format_seconds(row.p20_ms / 1e3)} .. {format_seconds(row.p80_ms / 1e3)}",
            "" if ce is None else number(row.p50_ms / ce),
        )
    return table


def _note_numbers(rows: Iterable[Row]) -> dict[str, int]:
    """Number the notes of the rows, each once, from 1 on."""
    texts = dict.fromkeys(row.note for row in rows if row.note)
    return {note: number for number, note in enumerate(texts, start=1)}


def _note_lines(rows: Sequence[Row]) -> list[Text]:
    """Write what stands below the table: a note by its number, in the table of jobs by what it is of."""
    if rows[0].part != JOB:
        return [Text(f"({number}) {note}") for note, number in _note_numbers(rows).items()]
    return [Text(f"{provider}: {note}") for provider, note in dict.fromkeys((row.provider, row.note) for row in rows)]


def ties(one: Row, other: Row) -> bool:
    """Tell whether the spreads of two rows overlap, or one was timed too seldom to have one; both have a time."""
    if min(one.n, other.n) < LEAST:
        return True
    assert one.p20_ms is not None and one.p80_ms is not None, "timed rows only"
    assert other.p20_ms is not None and other.p80_ms is not None, "timed rows only"
    return max(one.p20_ms, other.p20_ms) <= min(one.p80_ms, other.p80_ms)


def number(value: float | None) -> str:
    """Write three digits or more: `0.0123`, `1.23`, `12.3`, `1,234`; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def spread(row: Row) -> str:
    """Write the spread in milliseconds: `12.1..12.9`."""
    return "" if row.p20_ms is None else f"{number(row.p20_ms)}..{number(row.p80_ms)}"


def _table(rows: Sequence[Row]) -> tuple[Table, list[str]]:
    """Start a table, and name the fields that all rows share, which its title says."""
    shared = [name for name in _PROBLEM if len({getattr(row, name) for row in rows}) == 1]
    texts = {"E": "E {}", "B": "B {}", "size": "{} px"}
    said = [texts.get(name, "{}").format(value) for name in shared if (value := getattr(rows[0], name))]
    table = Table(title=", ".join([rows[0].part, *said]), title_justify="left", box=None, header_style="bold")
    return table, shared


def _same(row: Row) -> tuple[Any, ...]:
    """Make a key that is equal for rows of providers that did the same."""
    return (row.part, row.network, row.method, row.E, row.B, row.size)


def _firsts(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """Find the first timed row of each thing that several did."""
    firsts: dict[tuple[Any, ...], Row] = {}
    several = set()
    for row in rows:
        if row.p50_ms is None:
            continue
        if _same(row) in firsts:
            several.add(_same(row))
        firsts.setdefault(_same(row), row)
    return {key: row for key, row in firsts.items() if key in several}


def _plain_steps(rows: Sequence[Row]) -> dict[str, Row]:
    """Find the `ce` step of each network."""
    return {row.network: row for row in rows if row.part == "methods" and row.method == "ce"}


def _against(row: Row, firsts: dict[tuple[Any, ...], Row]) -> str:
    first = firsts.get(_same(row))
    if first is None or row is first or row.p50_ms is None or first.p50_ms is None:
        return ""
    return "tie" if ties(row, first) else number(first.p50_ms / row.p50_ms)


def _relative(row: Row, ce: dict[str, Row], name: str) -> str:
    mine, plain = getattr(row, name), getattr(ce.get(row.network), name, None)
    return number(mine / plain) if mine is not None and plain else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


# ---- before and after -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing in both files, or in one."""

    before: Row | None
    """Row of the first file."""
    after: Row | None
    """Row of the second file."""

    @property
    def verdict(self) -> Verdict:
        """Judge what became of it; `new`: it has a time now and had none."""
        if self.before is None or self.after is None:
            return "only after" if self.before is None else "only before"
        if self.before.p50_ms is None or self.after.p50_ms is None:
            if self.before.p50_ms is None and self.after.p50_ms is None:
                return "not timed"
            return "new" if self.before.p50_ms is None else "lost"
        ratio = self.after.p50_ms / self.before.p50_ms
        if ties(self.before, self.after) or abs(ratio - 1) < THRESHOLD:
            return "tie"
        return "slower" if ratio > 1 else "faster"


def compare(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Pair the rows of both files, those of `before` in their order first. Rows of one key are paired in order."""
    old, new = _by_key(before), _by_key(after)
    return [Change(before=old.get(key), after=new.get(key)) for key in {**old, **new}]


def _by_key(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for row in rows:
        found[(*row.key, seen[row.key])] = row
        seen[row.key] += 1
    return found


def change_table(changes: Sequence[Change]) -> Table:
    """Make a table of changes: a line each."""
    table = Table(box=None, header_style="bold")
    for name in ("part", "provider", "problem"):
        table.add_column(name, overflow="fold")
    for name in ("before ms", "20..80", "after ms", "20..80", "x"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    colours = {"faster": "green", "slower": "red", "lost": "red"}
    for change in changes:
        row = change.before or change.after
        assert row is not None, "a change is of something"
        sides = [cell for side in (change.before, change.after) for cell in _side(side)]
        table.add_row(
            row.part,
            row.provider,
            _problem(row),
            *sides,
            _ratio(change),
            change.verdict,
            style=colours.get(change.verdict, ""),
        )
    return table


def differing(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """List what is not the same in the two files and may be why times differ: `device: A there, B here`."""
    lines = []
    for name in ("device", "versions"):
        values = [", ".join(dict.fromkeys(getattr(row, name) for row in rows)) for rows in (before, after)]
        if values[0] != values[1]:
            lines.append(f"{name}: {values[0]} before, {values[1]} after")
    return lines


def _side(row: Row | None) -> tuple[str, str]:
    return ("", "") if row is None else (number(row.p50_ms), spread(row))


def _ratio(change: Change) -> str:
    """Write how many times faster it is."""
    before, after = change.before and change.before.p50_ms, change.after and change.after.p50_ms
    return number(before / after) if before and after else ""


def _problem(row: Row) -> str:
    texts = [row.method, row.network, row.E and f"E {row.E}", row.B and f"B {row.B}", row.size and f"{row.size} px"]
    return " ".join(text for text in (*texts, row.precision) if text)

"""Two CSVs of one kind, before and after: what became faster, what slower, and what cannot be told apart.

A row is compared with the row of the same part, provider and problem. It is a tie where the spreads, 20th to 80th
percentile, overlap, where one of them was measured less than three times, or where the medians differ by less than
`THRESHOLD`: a spread within one run knows nothing of what differs from run to run. A row that had a time and now has
none, such as a provider whose numbers became wrong, is lost. What only one of the files has is listed, and judged as
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from bench.harness.rows import Row
from bench.tables import number, spread, ties

THRESHOLD = 0.02
"""Relative difference of medians below which nothing is said."""

Verdict = Literal["faster", "slower", "tie", "lost", "new", "not timed", "only before", "only after"]
REGRESSIONS: tuple[Verdict, ...] = ("slower", "lost")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing in both files, or in one."""

    before: Row | None
    """In the first."""
    after: Row | None
    """In the second."""

    @property
    def verdict(self) -> Verdict:
        """What became of it; `new`: it has a time now and had none."""
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
    """Every row of both, those of `before` in their order first. Rows of one key are paired in order."""
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
    """One line a change."""
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
    """What is not the same in the two files and may be why times differ: `device: A there, B here`."""
    lines = []
    for name in ("device", "versions"):
        values = [", ".join(dict.fromkeys(getattr(row, name) for row in rows)) for rows in (before, after)]
        if values[0] != values[1]:
            lines.append(f"{name}: {values[0]} before, {values[1]} after")
    return lines


def _side(row: Row | None) -> tuple[str, str]:
    return ("", "") if row is None else (number(row.p50_ms), spread(row))


def _ratio(change: Change) -> str:
    """How many times faster it is."""
    before, after = change.before and change.before.p50_ms, change.after and change.after.p50_ms
    return number(before / after) if before and after else ""


def _problem(row: Row) -> str:
    texts = [row.method, row.network, row.E and f"E {row.E}", row.B and f"B {row.B}", row.size and f"{row.size} px"]
    return " ".join(text for text in (*texts, row.precision) if text)

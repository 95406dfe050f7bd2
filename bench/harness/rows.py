"""What a comparison measures: rows of one kind for every part, in one CSV that is whole after each row.

Everything else is made of the file: tables on the terminal, plots, comparisons, the README's claims.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was timed. None: not known, or no such thing."""

    part: str
    """step, methods, job, scaling, feed or start-up."""
    provider: str
    """Provider: a name of bench/rivals, or what the part calls it."""
    network: str = ""
    """Network of teachers and student."""
    method: str = ""
    """Method, written student[+data shown]."""
    E: int | None = None
    """Number of members E."""
    B: int | None = None
    """Images in a training step."""
    size: int | None = None
    """Side of an image in pixels."""
    precision: str = ""
    """Precision of the convolutions' arithmetic."""
    device: str = ""
    """Device, as PyTorch or the system calls it, with the CPU threads where it is one."""
    versions: str = ""
    """`python 3.12.3, torch 2.11.0, triton 3.6.0, driver …`."""
    commit: str = ""
    """Commit of the checkout; `+` where it has uncommitted changes."""
    n: int = 0
    """Times that it was measured."""
    p20_ms: float | None = None
    """20th percentile of a call's time over the turns."""
    p50_ms: float | None = None
    """Median: of a step, a batch, or the start."""
    p80_ms: float | None = None
    """80th percentile of a call's time over the turns."""
    images_per_s: float | None = None
    """Images a second, by the median."""
    images_per_s_core: float | None = None
    """Images over the CPU seconds that were spent on them."""
    tflops: float | None = None
    """TFLOP/s of the work that the method needs, whatever the provider spends."""
    gbps: float | None = None
    """GB/s of the bytes that it needs to move."""
    floor_share: float | None = None
    """The device's floor divided by the median."""
    peak_gb: float | None = None
    """Peak memory of tensors, measured on a GPU, predicted on a CPU."""
    wh_per_million: float | None = None
    """Energy of a million images, where the device tells it."""
    vs_ce: float | None = None
    """Median relative to that of a plain `ce` step that was timed in turns with it."""
    clock_mhz: float | None = None
    """Mean SM clock while it was timed."""
    throttled: float | None = None
    """Share of the readings in which the GPU was throttled."""
    note: str = ""
    """Remark, such as why there is no time."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Key by which rows of two files are compared."""
        return (self.part, self.provider, self.network, self.method, self.E, self.B, self.size, self.precision)


class Book:
    """Rows that are on disk as soon as they are added; `path` is None for none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Add `row` and write the file."""
        self.rows.append(row)
        if self.path is not None:
            write_rows(self.path, self.rows)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV with a column for every field, numbers with six digits."""
    columns = [field.name for field in fields(Row)]
    _write(path, columns, ({name: _cell(value) for name, value in asdict(row).items()} for row in rows))


def write_table(
    path: Path, rows: Sequence[Mapping[str, Any]], *, keep: Callable[[Mapping[str, str]], bool] | None = None
) -> None:
    """Write rows of a table of its own columns, those of the first row; nothing without rows.

    Args:
        keep: tells which rows of an older file stay, before the new ones (default: none).
    """
    if not rows:
        return
    kept: list[Mapping[str, Any]] = []
    if keep is not None and path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if keep(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, list(rows[0]), [*kept, *rows])


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote.

    Raises:
        UserError: it is not that.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_row(cells) for cells in csv.DictReader(file)]
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a CSV that `python -m bench` wrote ({error}); expected its columns") from error


def _row(cells: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for field in fields(Row):
        if field.name not in cells and field.default is not MISSING:
            continue  # older than the column
        text, kind = cells[field.name], str(field.type)
        if kind == "str":
            values[field.name] = text
        elif text != "":
            values[field.name] = float(text) if "float" in kind else int(text)
    return Row(**values)

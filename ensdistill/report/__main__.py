"""Drawing the report of finished runs: `python -m ensdistill.report RUN…`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.errors import UserError, run_main


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Draw the report of a run, from its folder alone; of several, side by side.

    Runs of one configuration and different seeds become one report whose networks are seeds of each other.

    For example: python -m ensdistill.report runs/digits
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs."""
    to: Path | None = None
    """The file to write. Default: report.html in the run's folder; of several runs comparison.html here."""


def main() -> None:
    """Draw the report and say where it is."""
    command = parse_arguments(ReportCommand, "ensdistill.report")
    if not command.runs:
        raise UserError("no run given; expected the folders of one or more finished runs, such as runs/digits")
    from ensdistill.report.page import write_report

    path = command.to or (command.runs[0] / "report.html" if len(command.runs) == 1 else Path("comparison.html"))
    if path.is_dir():
        raise UserError(f"--to {path}: a folder; give the name of the file, {path / 'report.html'} for example")
    console = plain_console(stderr=True, soft_wrap=True)
    for note in write_report(command.runs, path):
        console.print(f"left out: {note}")
    print(path)


if __name__ == "__main__":
    raise SystemExit(run_main(main))

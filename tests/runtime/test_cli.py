"""What commands print: text as it is, in every encoding, and empty values refused."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest
from rich.table import Table

from ensdistill.roofline import RooflineCommand
from ensdistill.run.display import Screen
from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.errors import UserError, run_main

PATH = "runs/[red]a[/red]/[x]/:smile:/best.safetensors"


def test_brackets_and_colons_are_printed_as_they_are():
    out = io.StringIO()
    screen = Screen(plain_console(file=out))
    table = Table(title=f"title {PATH}")
    table.add_column(f"column {PATH}")
    table.add_row(f"row {PATH}")
    screen.say(f"line {PATH}")
    screen.warn(f"loud {PATH}")
    screen.show(table)
    for where in ("title", "column", "row", "line", "loud"):
        assert f"{where} {PATH}" in out.getvalue(), where


def test_a_bar_shows_brackets_as_they_are():
    out = io.StringIO()
    with Screen(plain_console(file=out, force_terminal=True, width=140)).counting(PATH) as counter:
        counter(1, 2)
    assert PATH in out.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "cp1252", "utf-8"])
def test_no_encoding_ends_a_command(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))

    def main() -> int:
        print("96.2 ±0.3 – µ ∘ \N{SNOWMAN} \udcff")
        plain_console().print("96.2 ±0.3 – µ ∘ \N{SNOWMAN}")
        sys.stdout.flush()
        return 0

    assert run_main(main) == 0 and raw.getvalue().count(b"96.2 ") == 2


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_mistake_is_one_line_in_every_encoding(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    for arguments, message in (
        (["--members", "[bold]x"], r"--members: .*'\[bold\]x'; --help lists the options"),
        (
            ["--memers", "3"],
            r"Unrecognized options: --memers, 3 \(did you mean '--members'\?\); --help lists .*",
        ),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            parse_arguments(RooflineCommand, "ensdistill.roofline", arguments)


def test_a_reader_that_ends_is_an_error_that_can_be_caught(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    with pytest.raises(BrokenPipeError):
        plain_console(file=stream).print("text")
    with contextlib.suppress(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_closed_descriptors_are_taken_by_nothing(closed, tmp_path):
    """Else a file that is written gets them, and what is printed."""
    code = (
        f"import os, sys; [os.close(int(d)) for d in {closed.split()}]\n"
        "from ensdistill.runtime.errors import run_main\n"
        f"def main():\n    print('printed'); open({str(tmp_path / 'd')!r}, 'w').write(str(os.open('/', 0)))\n"
        "raise SystemExit(run_main(main))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert int((tmp_path / "d").read_text()) > 2

"""Command lines of typed dataclasses: tyro reads them and prints the help, and a mistake is one line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from ensdistill.runtime.errors import UserError

T = TypeVar("T")


def parse_arguments(cls: type[T], module: str, arguments: Sequence[str] | None = None, **options: Any) -> T:
    """The `cls` that `arguments` (default: the process's) ask for; `--help` prints and exits.

    Args:
        module: whose command it is, for `python -m MODULE`.
        options: for `tyro.cli`, such as `default` and `description`.

    Raises:
        UserError: an unknown option, with the nearest name, or a value that a field cannot have.
    """
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(
                cls, prog=f"python -m {module}", args=list(sys.argv[1:] if arguments is None else arguments), **options
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UserError(_one_line(boxed.getvalue())) from None


def _one_line(box: str) -> str:
    """tyro's box: sections between horizontal lines, of which the first says what, and a later one the nearest name."""
    rows = [row.strip("│╭╮╰╯ ") for row in box.splitlines()]
    sections = [section.strip() for section in re.split(r"\n─{3,}\n", "\n".join(rows[1:-1]))]
    message = re.sub(r"^Error parsing (config\.?)?", "", " ".join(sections[0].split())).lstrip(": ").rstrip(".")
    if "Perhaps you meant:" in box and (option := re.search(r"Perhaps you meant:\s*(--[\w.-]+)", " ".join(rows))):
        message += f" (did you mean '{option[1]}'?)"
    return f"{message}; --help lists the options"

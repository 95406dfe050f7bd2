"""Command lines of typed dataclasses: tyro reads them and prints the help, and a mistake is one line.

What a command prints goes to a `plain_console`.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console

from ensdistill.runtime.errors import UserError

T = TypeVar("T")


def parse_arguments(cls: type[T], module: str, arguments: Sequence[str] | None = None, **options: Any) -> T:
    """The `cls` that `arguments` (default: the process's) ask for; `--help` prints and exits.

    Args:
        module: whose command it is, for `python -m MODULE`.
        options: for `tyro.cli`, such as `default` and `description`.

    Raises:
        UserError: an unknown option, with the nearest name, an empty value, or a value that a field cannot have.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _refuse_empty(given)
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed):
            return tyro.cli(cls, prog=_program(module), args=given, **options)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UserError(_one_line(boxed.getvalue())) from None


def _program(module: str) -> str:
    """Words by which the process was called: those of the console script, which sets them, or `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith("ensdistill ") else f"python -m {module}"


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty value, such as an unset variable of a shell leaves: as a path it is the current folder."""
    option = "the first argument"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = name
        if not argument.strip() or (argument.startswith("--") and equals and not value.strip()):
            raise UserError(f"{option}: got an empty text, expected a value; give one, or leave the option out")


def plain_console(**options: Any) -> Console:
    """Make a console that prints text as it is: brackets and colons in a path are neither markup nor pictures."""
    return _PlainConsole(highlight=False, markup=False, emoji=False, **options)


class _PlainConsole(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the process without a word


def _one_line(box: str) -> str:
    """tyro's box: sections between horizontal lines, of which the first says what, and a later one the nearest name.

    Where the terminal's encoding has no lines, dashes are drawn.
    """
    rows = [row.strip("│╭╮╰╯ ") for row in box.splitlines()]
    sections = re.split(r"^[─-]{3,}$", "\n".join(rows[1:]), flags=re.MULTILINE)
    first = next((section for section in sections if section.strip()), box)
    message = re.sub(r"^Error parsing (config\.?)?", "", " ".join(first.split())).lstrip(": ").rstrip(".")
    if "Perhaps you meant:" in box and (option := re.search(r"Perhaps you meant:\s*(--[\w.-]+)", " ".join(rows))):
        message += f" (did you mean '{option[1]}'?)"
    return f"{message}; --help lists the options"

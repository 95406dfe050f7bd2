"""The console script `ensdistill`: `ensdistill train …` is `python -m ensdistill.fast_train …`, and so on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from ensdistill.runtime.errors import UserError, nearest, run_main

COMMANDS = {
    "train": ("ensdistill.fast_train", "the whole job: data, teachers, students, one table"),
    "evaluate": ("ensdistill.evaluate", "measure networks in files on data"),
    "predict": ("ensdistill.predict", "classify pictures with a network in a file"),
    "export": ("ensdistill.export", "write a network for other programs"),
    "report": ("ensdistill.report", "draw the report of run folders again"),
    "verify": ("ensdistill.verify", "replay the official code's golden numbers"),
    "tune": ("ensdistill.tune", "measure which kernels compute a network's layers fastest"),
    "roofline": ("ensdistill.roofline", "what a step takes at least, part by part"),
    "bench": ("bench", "compare with other ways to compute it, from a checkout"),
}
"""Module and summary of every command."""


def main() -> int:
    """Run the command that the process's first argument names; returns its exit code."""
    return run_main(_main)


def _main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *arguments = sys.argv[1:]
    if name == "--version":
        print(importlib.import_module("ensdistill").__version__)
        return 0
    if name not in COMMANDS:
        raise UserError(f"ensdistill: no command '{name}'{nearest(name, COMMANDS)}; expected {', '.join(COMMANDS)}")
    sys.argv = [f"ensdistill {name}", *arguments]  # what its usage calls it
    return run_main(_command(name))


def _command(name: str) -> Callable[[], int | None]:
    module = COMMANDS[name][0]
    if name == "bench":
        root = Path(__file__).resolve().parents[1]
        if not (root / "bench" / "__main__.py").exists() or not (root / "pyproject.toml").exists():
            raise UserError("bench: the benchmarks are no part of the package; run `python -m bench` in a checkout")
        sys.path.insert(0, str(root))
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(f"{name}: this installation has no {module}; install a whole ensdistill")
    is_package = spec.submodule_search_locations is not None
    found: Callable[[], int | None] = importlib.import_module(f"{module}.__main__" if is_package else module).main
    return found


def _usage() -> str:
    rows = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: ensdistill COMMAND …", "", *rows, "", "ensdistill COMMAND --help lists its options."])


if __name__ == "__main__":
    raise SystemExit(main())

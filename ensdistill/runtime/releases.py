"""Releases of PyTorch and Triton that the kernels were tested with, and what is said where others are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings

SUPPORTED = {"torch": ((2, 11), (2, 14)), "triton": ((3, 6), (3, 8))}
"""First and last release of each package, major and minor, that passed the tests."""


def found_releases() -> dict[str, str | None]:
    """Versions of the packages of `SUPPORTED`, without an import: None where one is missing.

    A package whose version nobody noted (a build on PYTHONPATH) is left out.
    """
    found: dict[str, str | None] = {}
    for package in SUPPORTED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(package) is None:
                found[package] = None
    return found


def faults(found: dict[str, str | None]) -> tuple[str, str]:
    """(what makes `found` unusable, what is newer than anything tested), a line each, empty where nothing is.

    Older releases lack what the kernels call. Newer ones mostly work, so they are named and used: who has one has a
    reason, and the tests tell whether it holds.
    """
    unusable, untested = [], []
    for package, version in found.items():
        first, last = SUPPORTED[package]
        tested = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
        mend = f"pip install '{package}>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}'"
        if version is None:
            unusable.append(f"{package} is not installed; expected {tested}: {mend}")
        elif numbers := re.match(r"(\d+)\.(\d+)", version):
            release = (int(numbers[1]), int(numbers[2]))
            if release < first:
                unusable.append(f"{package} {version} is too old; expected {tested}: {mend}")
            elif release > last:
                untested.append(f"{package} {version} is newer than what was tested, {tested}; should it fail: {mend}")
    return "; ".join(unusable), "; ".join(untested)


def check_releases() -> None:
    """End a command of ours with one line, on releases that cannot work; name untested ones, once a job.

    Raises:
        ImportError: the same line, to a program that imports the package.
    """
    unusable, untested = faults(found_releases())
    if unusable and _is_command():
        print(f"error: {unusable}", file=sys.stderr)
        raise SystemExit(2)
    if unusable:
        raise ImportError(unusable)
    # the processes that a job starts inherit the note that it was said
    if untested and os.environ.get("ENSDISTILL_UNTESTED") != untested:
        os.environ["ENSDISTILL_UNTESTED"] = untested
        if not _is_command():
            warnings.warn(untested, stacklevel=3)
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"warning: {untested}", file=sys.stderr)


def _is_command() -> bool:
    """Tell whether this process is `python -m` one of ours, or the console script."""
    words = sys.orig_argv
    if len(words) > 1 and os.path.basename(words[1]) == "ensdistill":
        return True
    return "-m" in words[:-1] and words[words.index("-m") + 1].split(".")[0] in ("ensdistill", "bench")

"""Running the parts of a check: commands one after the other under one time limit, all that they say in a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

Status = Literal["ok", "failed", "cut off"]

GRACE = 8.0
"""Seconds at most, at the end of a limit, that an interrupted command has to write what it has (pytest its reports)."""


@dataclass(frozen=True)
class Command:
    """One process of a part."""

    argv: tuple[str, ...]
    """What runs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set in its environment, beside what is there."""
    good: frozenset[int] = frozenset({0})
    """Exit codes that are no failure."""


@dataclass(frozen=True)
class Found:
    """What a part left."""

    headline: str
    """The most telling number."""
    lines: tuple[str, ...] = ()
    """What must be seen at once, such as the tests that failed."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that is checked."""

    name: str
    """What it is called."""
    about: str
    """What it does, in a line."""
    limit: float
    """Seconds for all of its commands, what they need to stop included."""
    commands: Callable[[], Iterator[Command]]
    """Its processes; each is asked for when the one before has ended, so that it may depend on what that left."""
    collect: Callable[[], Found]
    """Writes the tables from what the commands left, after a cut as well. ValueError: they left nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended."""

    part: str
    """Its name."""
    status: Status
    """`failed`: a command did, or nothing was left to collect; `cut off`: at its limit."""
    seconds: float
    """What it took."""
    limit: float
    """What it might have taken."""
    headline: str
    """The most telling number, or why there is none."""
    lines: tuple[str, ...] = ()
    """What must be seen at once; of a part that failed and has no such lines, the end of its log."""


def run_part(part: Part, log: Path, *, cwd: Path) -> Outcome:
    """Run `part` to its end or its limit. A command that fails does not keep the next ones from running.

    Args:
        log: gets each command and all that it prints.
        cwd: where they run.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    status: Status = "ok"
    with log.open("w", encoding="utf-8") as output:
        for command in part.commands():
            left = part.limit - (time.monotonic() - start)
            code = _run(command, output, left, cwd) if left > 0 else None
            if code is None:
                status = "cut off"
                break
            if code not in command.good:
                status = "failed"
    seconds = time.monotonic() - start
    try:
        found = part.collect()
    except ValueError as error:
        found, status = Found(str(error)), "failed" if status == "ok" else status
    return Outcome(
        part=part.name,
        status=status,
        seconds=round(seconds, 1),
        limit=part.limit,
        headline=found.headline,
        lines=found.lines or (() if status == "ok" else _tail(log)),
    )


def _tail(log: Path, lines: int = 12) -> tuple[str, ...]:
    return tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _heed_interrupts() -> None:
    """In the child: a shell that starts a job in the background has it ignore SIGINT, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(command: Command, output: IO[str], seconds: float, cwd: Path) -> int | None:
    """The exit code, None if the time was up; nothing of the process's group is left."""
    settings = " ".join(f"{name}={value}" for name, value in command.environment.items())
    print(f"$ {settings} {' '.join(command.argv)}".replace("$  ", "$ "), file=output, flush=True)
    try:
        process = subprocess.Popen(
            command.argv,
            cwd=cwd,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to be ended as one
            preexec_fn=_heed_interrupts,
        )
    except OSError as error:
        print(f"cannot be started: {error}", file=output)
        return 127
    grace = min(GRACE, 0.2 * seconds)
    try:
        try:
            return process.wait(seconds - grace)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    except KeyboardInterrupt:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        _signal(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps even the killed
            process.wait(GRACE)
        print(f"[exit code {process.returncode}]", file=output, flush=True)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the whole group, which outlives its first process where that leaves children behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)

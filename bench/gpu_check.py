"""What anyone runs first on a new GPU: `make gpu-check`, or `python -m bench.gpu_check --help`.

Parts, each of processes of its own under a time limit of its own; what a part that is cut off had done is kept. Tables
are CSV and JSON in bench/results/DEVICE, logs in the folder `logs` there. The defaults check WRN-28-4 and end within 9
minutes by their limits. Exit code 0: every part passed; 1: not so; 2: there is no GPU, or an argument is wrong.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.check_parts import LIMITS, OPTIONAL, PROVIDERS, Setting, make_part
from bench.check_results import write_table
from bench.check_runner import Outcome, Part, run_part
from ensdistill.cli import parse_arguments
from ensdistill.errors import UserError, nearest, run_main

ROOT = Path(__file__).resolve().parents[1]
IDENTITY = ("device", "driver", "cuda", "torch", "triton", "python", "commit")
"""Columns of every row."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check a GPU: tests, ahead-of-time cache, tuning, benchmarks, a real run. Lists are separated by commas."""

    parts: str = ",".join(name for name in LIMITS if name not in OPTIONAL)
    """What to run, in this order; beside the default also speed and kernel-tests. Environment comes first always."""
    networks: str = "wrn28x4"
    """Networks to tune, to benchmark and to train."""
    providers: str = ",".join(PROVIDERS)
    """Who is timed by benchmarks; `all`: everyone that they know, such as compiled, which takes minutes."""
    limits: str = ""
    """Seconds of parts, PART=SECONDS,…; see bench/README.md for the defaults."""
    out: Path | None = None
    """Where results go. Default: bench/results/DEVICE."""
    data: Path | None = None
    """What the real run trains on, as its --data. Default: 50,000 images of random pixels, 32x32x3, and 100 classes."""
    commit: str = ""
    """What the rows say where there is no .git. Default: what git says."""


def split(text: str, option: str, known: Sequence[str] = ()) -> list[str]:
    """The names in a list, each one of `known` if that is given.

    Raises:
        UserError: none, or an unknown one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option}: got {text!r}, expected names separated by commas; leave it out for the default")
    for name in names:
        if known and name not in known:
            raise UserError(
                f"{option}: there is no '{name}'{nearest(name, known)}; expected some of {', '.join(known)}"
            )
    return list(dict.fromkeys(names))


def read_limits(text: str) -> dict[str, float]:
    """`tests=120,run=90` over the defaults.

    Raises:
        UserError: an unknown part, or no positive number of seconds.
    """
    limits = dict(LIMITS)
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        name, _, seconds = entry.partition("=")
        split(name, "--limits", tuple(LIMITS))
        try:
            limits[name] = float(seconds)
        except ValueError:
            limits[name] = 0.0
        if not 0 < limits[name] < float("inf"):
            raise UserError(f"--limits {entry}: expected PART=SECONDS, such as {name}=120; give a positive number")
    return limits


def slug(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` as the name of a folder: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def find_facts(limit: float) -> tuple[dict[str, Any], float]:
    """What `bench.gpu_facts` found, and how many seconds that took.

    Raises:
        UserError: there is no GPU, or it did not answer.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "bench.gpu_facts"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise UserError(f"gpu-check: the GPU did not answer within {limit:.0f} s; does nvidia-smi?") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"bench.gpu_facts: exit code {done.returncode}"]
        raise UserError(lines[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - start


def environment_outcome(facts: Mapping[str, Any], seconds: float, limit: float) -> Outcome:
    """The first part, which has been: the rest needs to know the device."""
    settings = [f"driver {facts['driver']}", f"CUDA {facts['cuda']}", f"torch {facts['torch']}"]
    known: list[tuple[str, str]] = [("power_limit_w", "{:.0f} W"), ("sm_max_mhz", "{:.0f} MHz")]
    settings += [form.format(facts[name]) for name, form in known if facts.get(name) is not None]
    if facts.get("other_processes"):
        settings.append(f"{facts['other_processes']} other processes on it")
    if facts.get("clock_limits"):
        settings.append(f"clocks held down: {facts['clock_limits']}")
    headline = f"{facts['device']}: {', '.join(settings)}"
    return Outcome(part="environment", status="ok", seconds=round(seconds, 1), limit=limit, headline=headline)


def check(
    parts: Sequence[Part], before: Sequence[Outcome], out: Path, identity: Mapping[str, Any], console: Console
) -> int:
    """Run `parts`, print and write how each ended as it ends, and print the table of all, `before` included.

    Returns:
        The exit code: 0 where every part is ok.
    """
    outcomes: list[Outcome] = []

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        say(f"  {outcome.status}, {outcome.seconds:.0f} s: {outcome.headline}")
        for line in outcome.lines:
            say(f"  | {line}")
        row = {name: value for name, value in asdict(outcome).items() if name != "lines"}
        write_table(
            out, "summary", [row | {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}], identity, ["part"]
        )

    try:
        for outcome in before:
            console.print(f"[{len(outcomes) + 1}/{len(before) + len(parts)}] {outcome.part}", markup=False)
            ended(outcome)
        for part in parts:
            log = out / "logs" / f"{part.name}.log"
            place = f"[{len(outcomes) + 1}/{len(before) + len(parts)}]"
            console.print(
                f"{place} {part.name}: {part.about}; at most {part.limit:.0f} s, {log}", markup=False, soft_wrap=True
            )
            ended(run_part(part, log, cwd=ROOT))
    finally:
        console.print(summary(outcomes))
    return int(any(outcome.status != "ok" for outcome in outcomes))


def summary(outcomes: Sequence[Outcome]) -> Table:
    """One line a part."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    table.add_column("found", overflow="fold")
    colours = {"ok": "green", "failed": "red", "cut off": "yellow"}
    for one in outcomes:
        status = f"[{colours[one.status]}]{one.status}[/]"
        table.add_row(one.part, status, f"{one.seconds:.0f}", f"{one.limit:.0f}", one.headline.replace("[", r"\["))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    arguments = parse_arguments(Arguments, "bench.gpu_check", argv)
    names = [name for name in split(arguments.parts, "--parts", tuple(LIMITS)) if name != "environment"]
    networks, providers = split(arguments.networks, "--networks"), split(arguments.providers, "--providers")
    limits = read_limits(arguments.limits)
    os.environ.pop("TRITON_INTERPRET", None)  # the kernels shall run on the GPU
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `timeout` around us: end as Ctrl-C does
    facts, seconds = find_facts(limits["environment"])
    if arguments.commit:
        facts["commit"] = arguments.commit
    identity = {name: facts.get(name) or "" for name in IDENTITY}
    out = (arguments.out or ROOT / "bench" / "results" / slug(facts["device"])).absolute()
    setting = Setting(
        root=ROOT,
        out=out,
        work=ROOT / "build" / "gpu-check",
        identity=identity,
        capability=facts["capability"],
        networks=tuple(networks),
        providers=tuple(providers),
        data=None if arguments.data is None else arguments.data.absolute(),
    )
    write_table(
        out, "environment", [{name: value for name, value in facts.items() if name not in identity}], identity, []
    )
    parts = [make_part(name, setting, limits[name]) for name in names]
    console = Console(highlight=False)
    code = check(parts, [environment_outcome(facts, seconds, limits["environment"])], out, identity, console)
    console.print(f"results: {out}", soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(run_main(main))

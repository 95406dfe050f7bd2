"""The whole comparison: `python -m bench` from the root of the checkout; `--quick` takes under 5 minutes on a CPU.

Parts are measured one after the other; each row is on disk, in OUT/PART.csv, as soon as it is there. Tables and plots
are made of the rows. Each part's module says how its numbers are made and what they do not say.

    python -m bench --parts step --providers official-order,auto
    python -m bench --compare before/step.csv after/step.csv     exit code 1 where something became slower
    python -m bench --plots                                      draws OUT's CSVs again and measures nothing

Exit code 1: a provider computed something else than the definition, or failed; 2: an argument is wrong.
"""

from __future__ import annotations

import importlib
import os
import platform
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Threads that spin while they wait take the cores from those that work; read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from bench.gpu_check import slug, split
from bench.gpu_facts import board_settings
from bench.harness.context import FAILED, ROOT, WRONG, Context, cost_of
from bench.harness.rows import Book, Row, read_rows
from bench.tables import REGRESSIONS, change_table, compare, differing, render
from ensdistill.models import build
from ensdistill.monitor.gpu import GpuNames
from ensdistill.run.display import Screen
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.devices import rates_of
from ensdistill.runtime.environment import (
    choose_device,
    choose_precision,
    choose_threads,
    commit,
    device_name,
    versions,
)
from ensdistill.runtime.errors import UserError, run_main

PARTS = {
    "step": "bench.parts.step",
    "methods": "bench.parts.methods",
    "scaling": "bench.parts.scaling",
    "feed": "bench.parts.feed",
    "startup": "bench.parts.startup",
    "modules": "bench.parts.modules",
    "threads": "bench.parts.threads",
}
"""Module of each part, which has a function `rows(context)`."""
ASKED_FOR = ("modules", "threads")
"""Parts that are measured where they are named alone: what few want, or takes timm and a compiler's minutes."""
OF_A_NETWORK = ("step", "methods")
"""Parts that are measured for every network; the others for the first."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Problem and budget where nothing else is asked for."""

    network: str
    """Network of teachers and student."""
    B: int
    """Images in a training step."""
    size: int
    """Side of an image in pixels."""
    rounds: int
    """Turns of each thing that is timed."""
    seconds: float
    """Seconds after which a measurement ends."""


QUICK = Size(network="wrn10x1", B=8, size=16, rounds=5, seconds=5.0)
ON_CPU = Size(network="wrn16x2", B=32, size=32, rounds=7, seconds=60.0)
ON_GPU = Size(network="wrn28x4", B=128, size=32, rounds=30, seconds=20.0)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare ways to compute the training step, methods, sizes, feeds and starts. Lists are separated by commas."""

    quick: bool = False
    """Small sizes and few rounds."""
    parts: str = ",".join(name for name in PARTS if name not in ASKED_FOR)
    """Parts of the comparison, in the order of measuring. By name alone: modules, timm's networks, which have no
    kernels; threads, of a CPU: the step on one thread, on all, and on all beside a busy neighbour."""
    networks: str = ""
    """Networks of teachers and student, each in turn. Default: wrn28x4 on a GPU, wrn16x2 on a CPU, wrn10x1 with
    --quick."""
    providers: str = ""
    """Providers of the step, names of bench/rivals; the others are compared with the first. Default: everyone who runs
    on the device; on a CPU without those that compile for minutes."""
    batch: int | None = None
    """Images in a training step. Default: 128 on a GPU, 32 on a CPU, 8 with --quick."""
    size: int | None = None
    """Side of an image in pixels. Default: 32, 16 with --quick."""
    members: int = 4
    """Members E: teachers, and the student's."""
    rounds: int | None = None
    """Turns of each thing that is timed, at least 3. Default: 30 on a GPU, 7 on a CPU, 5 with --quick."""
    device: str | None = None
    """Device that computes: cpu, cuda, cuda:1. Default: a GPU where there is one."""
    threads: int | None = None
    """CPU threads. Default: as many as a training would take."""
    out: Path | None = None
    """Folder of the CSVs and plots. Default: bench/results/DEVICE, a CPU's with cpu- in front."""
    runs: Path | None = None
    """Folder of a run, such as runs/digits, whose quality is put beside the costs."""
    compare: tuple[Path, Path] | None = None
    """Two CSVs, before and after: say what became faster or slower, and end."""
    plots: bool = False
    """Draw the plots of the CSVs that are there, and end."""
    draw: bool = True
    """Draw plots of what was measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parse_arguments(Arguments, "bench", argv)
    screen = Screen()
    if arguments.compare is not None:
        return _compare(*arguments.compare, screen)
    parts = split(arguments.parts, "--parts", tuple(PARTS))
    device = choose_device(arguments.device)
    out = arguments.out or ROOT / "bench" / "results" / _folder(device)
    if arguments.plots:
        _draw(out, screen)
        return 0
    contexts = _contexts(arguments, device, out, screen)
    screen.say(", ".join(contexts[0].identity.values()) + f", load {os.getloadavg()[0]:.2f}")
    rows: list[Row] = []
    try:
        for name in parts:
            book = Book(out / f"{name}.csv")
            for row in _measured(name, contexts):
                book.add(row)
                rows.append(row)
    finally:  # what was measured until Ctrl-C counts
        screen.console.print(render(rows))
    if arguments.runs is not None:
        importlib.import_module(PARTS["methods"]).write_quality(arguments.runs, rows, out / "nll.csv")
    try:
        if arguments.draw:
            _draw(out, screen)
    except UserError as error:  # nobody has to have matplotlib
        screen.say(str(error))
    screen.say(f"results: {out}")
    wrong = [row.provider for row in rows if row.note.startswith((WRONG, FAILED))]
    return int(bool(wrong))


def _measured(part: str, contexts: Sequence[Context]) -> Iterator[Row]:
    rows: Callable[[Context], Iterator[Row]] = importlib.import_module(PARTS[part]).rows
    for context in contexts if part in OF_A_NETWORK else contexts[:1]:
        yield from rows(context)


def _contexts(arguments: Arguments, device: torch.device, out: Path, screen: Screen) -> list[Context]:
    """Make a context for each network.

    Raises:
        UserError: an argument is wrong.
    """
    precision = choose_precision("auto", device)
    default = QUICK if arguments.quick else ON_GPU if device.type == "cuda" else ON_CPU
    values = {
        "batch": default.B if arguments.batch is None else arguments.batch,
        "size": default.size if arguments.size is None else arguments.size,
        "members": arguments.members,
        "rounds": default.rounds if arguments.rounds is None else arguments.rounds,
        "threads": 1 if arguments.threads is None else arguments.threads,
    }
    least = {"batch": 2, "size": 8, "members": 2, "rounds": 3, "threads": 1}
    for name, value in values.items():
        if value < least[name]:
            raise UserError(f"--{name}: got {value}, expected at least {least[name]}; give a larger number")
    if arguments.runs is not None and not (arguments.runs / "results.json").is_file():
        raise UserError(f"--runs {arguments.runs}: holds no results.json; expected the folder of a finished run")
    networks = split(arguments.networks or default.network, "--networks")
    for network in networks:
        build(network, num_classes=2)
    base = Context(
        device=device,
        quick=arguments.quick,
        precision=precision,
        threads=values["threads"],
        network=networks[0],
        E=arguments.members,
        B=values["batch"],
        size=values["size"],
        providers=_providers(arguments.providers, device),
        rounds=values["rounds"],
        seconds=default.seconds,
        identity={},
        runs=arguments.runs,
        out=out,
        say=screen.say,
    )
    threads = choose_threads(arguments.threads, layer_macs=base.B * cost_of(base).macs_a_layer)
    torch.set_num_threads(threads)
    base = replace(
        base,
        threads=threads,
        identity=_identity(device, threads),
        rates=rates_of(device, precision),
    )
    return [replace(base, network=network) for network in networks]


def _providers(text: str, device: torch.device) -> tuple[str, ...]:
    from bench.rivals import (
        PROVIDERS,  # not while the command reads its arguments: torch.compile's imports take a second
    )

    if text:
        return tuple(split(text, "--providers", tuple(PROVIDERS)))
    return tuple(
        name
        for name, provider in PROVIDERS.items()
        if device.type == "cuda" or not (provider.needs_gpu or provider.compiles)
    )


def _folder(device: torch.device) -> str:
    name = slug(device_name(device))
    return name if device.type == "cuda" else f"cpu-{name}"


def _identity(device: torch.device, threads: int) -> dict[str, str]:
    """Describe device, software and commit, as every row does."""
    found = versions()
    software = [f"python {platform.python_version()}", *(f"{name} {found[name]}" for name in ("torch", "triton"))]
    name = device_name(device)
    if device.type == "cuda":
        driver = board_settings(GpuNames.of(device))["driver"] or "unknown"
        software += [f"CUDA {torch.version.cuda}", f"driver {driver}"]
    else:
        name += f", {threads} thread{'s' if threads > 1 else ''}"
    return {"device": name, "versions": ", ".join(software), "commit": commit()}


def _compare(before: Path, after: Path, screen: Screen) -> int:
    rows = read_rows(before), read_rows(after)
    changes = compare(*rows)
    screen.show(change_table(changes))
    for line in differing(*rows):
        screen.say(line)
    counts = Counter(change.verdict for change in changes)
    screen.say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "no rows")
    return int(any(change.verdict in REGRESSIONS for change in changes))


def _draw(out: Path, screen: Screen) -> None:
    from bench.plots import draw  # imports matplotlib, which not everybody has

    for path in draw(out, out):
        screen.say(f"drawn: {path}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `timeout` around us: end as Ctrl-C does
    sys.exit(run_main(main))

"""What anyone runs first on a new GPU: `make gpu-check`, or `python -m bench.gpu_check --help`.

A list of stages, most telling first. Each is a shell command under a limit of its own, and the whole has a deadline:
what is over its time is interrupted, then killed, what it had done is kept, and the rest goes on with the time that is
left. Each is printed, and written to OUT, as it ends. Exit code 0: every stage passed; 1: not so; 2: there is no GPU,
or an argument is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.harness.rows import write_table
from ensdistill.config.recipes import RECIPES, find_recipe
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.errors import UserError, nearest, run_main

ROOT = Path(__file__).resolve().parents[1]
GRACE = 6.0
"""Seconds at most, at the end of a limit, that an interrupted stage has to write what it has."""
LEAST = 10.0
"""Seconds below which no stage is begun."""
IDENTITY = ("device", "driver", "cuda", "torch", "triton", "python", "commit")
"""Columns that every row of every table has."""


@dataclass(frozen=True)
class Stage:
    """A command, its limit, and where its result is found."""

    name: str
    """Name that `--parts` takes."""
    limit: float
    """Seconds that it may take."""
    about: str
    """Purpose, in a line."""
    command: str
    """For bash, from the root of the checkout. LIMIT holds its seconds, OUT, WORK, NETWORK, … what they say."""
    found: str = r"\S"
    """The last line that has this pattern is its result."""
    lines: int = 12
    """Lines of its output that are shown, the last ones."""
    elastic: bool = False
    """True: it gets what earlier stages left of their time, and gives what they took too much."""


_STEP = "python -m bench.step_profile --network $NETWORK --out $OUT --backend"
_TURNS = "python -m bench --parts step --networks $NETWORK --rounds 9 --no-draw --providers"
_COMPILED = f"COMPILE_MODE=default {_TURNS}"
_TEST = "OMP_NUM_THREADS=2 python -m pytest -m gpu -q -p no:cacheprovider --tb=line -n $PROCESSES"
_FULL_SIZE = "tests/gpu/test_captured_on_gpu.py tests/gpu/test_networks_on_gpu.py tests/kernels"
_NOT = "-k 'not library and not auto and not (forms and fp32)'"  # half of the time, and the least of the news
_CIFAR10 = "--name cifar10-jpeg --network wrn28x1 --methods kd latentbe latentbe+tdiv-sdiv"

# fmt: off
STAGES = (
    Stage("facts", 35, "the GPU, its settings, what it gives at best",
          "python -m bench.gpu_facts $WORK/facts.json", lines=1),
    Stage("cache", 40, "every variant of the ahead-of-time cache launched",
          '[ "$CACHE" ] || python -m ensdistill.aot --archs $ARCH --cache $TRITON_CACHE_DIR --recipes $RECIPES; '
          "python -m ensdistill.aot --check $TRITON_CACHE_DIR --recipes $RECIPES", lines=3),
    Stage("step", 55, "the captured step on default tiles, by kernel", f"{_STEP} triton"),
    Stage("tests", 100, "correct at real sizes; beside it torch.compile works for a later stage, for nothing is timed",
          f"{_COMPILED} compiled --out $WORK/compiling > $WORK/compiling.txt 2>&1 & "
          f"{_TEST} --junitxml=$WORK/tests.xml {_FULL_SIZE} {_NOT}", " in [0-9.]+s", lines=1),
    Stage("tuning", 110, "tiles by their share of the floor, our kernels first",
          "python -m ensdistill.tune --network $NETWORK --seconds $((LIMIT - 20)) --csv $OUT/tuning.csv",
          "all convolutions", elastic=True),
    Stage("best", 40, "the captured step on the best tiles so far", f"{_STEP} tuned"),
    Stage("plans", 50, "the captured step on default tiles: norms in passes of their own; one launch after the other",
          f"ENSDISTILL_FOLDED_NORMS=0 {_STEP} triton --label norms-apart; code=$?; "
          f"ENSDISTILL_DEPENDENT_LAUNCH=0 {_STEP} triton --label one-by-one && exit $code",
          "(norms-apart|one-by-one): "),
    Stage("rivals", 50, "the step beside the official order of work, in turns",
          f"{_TURNS} official-order,official-order-tf32,official-order-amp,pruned,tuned --out $WORK/rivals; "
          "code=$?; cp $WORK/rivals/step.csv $OUT/step.csv; exit $code", "tuned  "),
    Stage("run", 50, "a run fed by FFCV: how busy, how long it waits for data",
          "python -m bench.gpu_run --seconds $((LIMIT - 8)) --network $NETWORK --out $OUT --work $WORK",
          "images/s,", 2),
    Stage("compiled", 75, "the step beside torch.compile in its default mode, in turns",
          f"{_COMPILED} tuned,compiled --out $WORK/compiled; "
          "code=$?; grep compiled, $WORK/compiled/step.csv >> $OUT/step.csv; exit $code", "compiled  "),
    Stage("counters", 40, "hardware counters of the two convolutions that lose most",
          "python -m bench.gpu_counters --network $NETWORK --out $OUT/counters.csv"),
    Stage("cifar10", 500, "CIFAR-10 trained and measured, from the archive DATA",
          f"python -m bench.gpu_run --data $DATA {_CIFAR10} --seconds $((LIMIT - 10)) --out $OUT --work $WORK",
          "epochs: ", lines=40, elastic=True),
    Stage("all-tests", 540, "every test that needs a GPU, those of speed too: many minutes",
          f"{_TEST} --junitxml=$WORK/all-tests.xml tests", " in [0-9.]+s", lines=1),
)
# fmt: on
"""Everything that can be asked for; the first is always run."""
OPTIONAL = ("cifar10", "all-tests")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check a GPU: facts, cache, step, tests, tuning, rivals, a run, counters. Lists are separated by commas."""

    parts: str = ",".join(stage.name for stage in STAGES if stage.name not in OPTIONAL)
    """Stages to run, in the order given; beside the default also cifar10 and all-tests."""
    seconds: float = 560.0
    """Seconds for all stages together."""
    scale: float = 1.0
    """Factor on every limit, for slow machines; the deadline is as it is given."""
    network: str = "wrn28x4"
    """Network that is timed, tuned and trained."""
    out: Path | None = None
    """Folder of the results. Default: bench/results/DEVICE."""
    cache: Path | None = None
    """Ahead-of-time cache, a folder or an archive of it. Default: it is compiled first."""
    data: Path | None = None
    """Archive of `cifar10`: train/CLASS/*.jpg and test/CLASS/*.jpg."""
    commit: str = ""
    """Commit that the rows name where there is no .git. Default: what git says."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage ended: a row of check.csv."""

    part: str
    """Name of the stage."""
    status: str
    """ok, failed, cut off or skipped."""
    seconds: float
    """Seconds that it took."""
    limit: float
    """Seconds that it might have taken."""
    found: str
    """Most telling line of its output."""


def split(text: str, option: str, known: Sequence[str] = ()) -> list[str]:
    """Split a list into its names, each one of `known` if that is given.

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


def slug(device: str) -> str:
    """Make a folder's name of a device's: h100-80gb-hbm3 of `NVIDIA H100 80GB HBM3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-").removeprefix("nvidia-")


# ---- running --------------------------------------------------------------------------------------------------------


def run_stage(stage: Stage, limit: float, log: IO[str], environment: Mapping[str, str]) -> tuple[Outcome, list[str]]:
    """Run a stage to its end or for `limit` seconds; all that it says is appended to `log`, and returned in lines."""
    print(f"\n==== {stage.name}: {stage.command}", file=log, flush=True)
    begin, start = log.tell(), time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", stage.command.replace("python -m", f"{shlex.quote(sys.executable)} -m")],
        cwd=ROOT,
        env={**os.environ, **environment, "LIMIT": f"{limit:.0f}"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own, to be ended as one
        preexec_fn=_heed_interrupts,
    )
    grace = min(GRACE, 0.2 * limit)
    try:
        status = "ok" if process.wait(limit - grace) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "cut off"
    finally:
        _end(process, grace)
    log.flush()
    said = Path(log.name).read_bytes()[begin:].decode("utf-8", errors="replace").splitlines()
    telling = [line.strip() for line in said if re.search(stage.found, line)]
    found = telling[-1] if telling else next((line.strip() for line in reversed(said) if line.strip()), "said nothing")
    seconds = round(time.monotonic() - start, 1)
    return Outcome(part=stage.name, status=status, seconds=seconds, limit=round(limit), found=found[:300]), said


def _heed_interrupts() -> None:
    """Let a child heed SIGINT: a shell that starts a job in the background has it ignore it, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Interrupt a stage that still runs, its children too; kill what is left of its group after `grace` seconds."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if number == signal.SIGKILL or process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs keeps even the killed
            process.wait(grace)


def limit_of(stages: Sequence[Stage], left: float, scale: float) -> float:
    """Compute the seconds for the first of the `stages` that are still to come, 0 where too little is left to begin it.

    A stage that takes what is left gives the later ones their limits, and keeps a third of its own at least.
    """
    first, later = stages[0], scale * sum(stage.limit for stage in stages[1:])
    wanted = scale * first.limit
    if first.elastic:
        wanted = max(wanted / 3, left - later)
    limit = min(wanted, left)
    return limit if limit >= min(LEAST, wanted) else 0.0


def run_all(stages: Sequence[Stage], deadline: float, check: Check) -> list[Outcome]:
    """Run `stages` until the `deadline` of the monotonic clock, and show and write each as it ends.

    Raises:
        UserError: the first, which finds out what the GPU is, found none.
    """
    outcomes: list[Outcome] = []
    try:
        for i, stage in enumerate(stages):
            left = deadline - time.monotonic()
            limit = limit_of(stages[i:], left, check.scale)
            check.say(f"[{i + 1}/{len(stages)}] {stage.name}: {stage.about}; at most {limit:.0f} s of {left:.0f} s")
            if limit:
                outcome, said = run_stage(stage, limit, check.log, check.environment)
            else:
                text = f"no time was left: {max(left, 0):.0f} s of {check.scale * stage.limit:.0f} s"
                outcome, said = Outcome(part=stage.name, status="skipped", seconds=0, limit=0, found=text), []
            outcomes.append(outcome)
            check.ended(outcome, said[-stage.lines :])
            if check.out is None or not check.facts:
                raise UserError(outcome.found.removeprefix("error: "))
    finally:
        check.console.print(summary(outcomes))
    return outcomes


class Check:
    """Prints what a check finds, and writes it."""

    def __init__(self, out: Path | None, work: Path, scale: float, environment: Mapping[str, str]) -> None:
        """`out` None: a folder of the device's name; `scale`: factor on every stage's limit."""
        self.out, self.work, self.scale = out, work, scale
        self.environment = {**environment, "WORK": str(work)}
        self.console = Console(highlight=False)
        self.console.width = max(self.console.width, 150)
        self.facts: dict[str, Any] = {}
        work.mkdir(parents=True, exist_ok=True)
        for old in (*work.glob("*.xml"), work / "facts.json"):
            old.unlink(missing_ok=True)
        self.log = (work / "log.txt").open("w+", encoding="utf-8")

    def say(self, text: str) -> None:
        """Print a line, as it is."""
        self.console.print(text, markup=False, soft_wrap=True)

    def ended(self, outcome: Outcome, last: Sequence[str]) -> None:
        """Show the last lines of a stage, and write its row, its tests and the log."""
        if (self.work / "facts.json").exists() and not self.facts:
            self._read_facts()
        for line in last:
            self.say(f"  | {line[:200]}")
        self.say(f"  {outcome.status}, {outcome.seconds:.0f} s: {outcome.found}")
        if not self.facts or self.out is None:
            return
        row = asdict(outcome) | {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.write("check", [row | {name: value for name, value in self.facts.items() if name not in IDENTITY}], "part")
        if tests := test_rows(self.work / f"{outcome.part}.xml"):
            self.write(outcome.part, tests, "test")
            for test in tests:
                if test["outcome"] in ("failed", "error"):
                    self.say(f"  {test['outcome']}: {test['test']}: {test['message'][:120]}")
        shutil.copy(self.log.name, self.out / "log.txt")

    def _read_facts(self) -> None:
        self.facts = json.loads((self.work / "facts.json").read_text(encoding="utf-8"))
        self.out = (self.out or ROOT / "bench" / "results" / slug(self.facts["device"])).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        # as many tests at a time as there are cores to launch them, and memory
        processes = min(8, self.facts["cores"] // 2, int(self.facts["memory_gb"] // 10))
        self.environment["PROCESSES"] = str(max(1, processes))
        self.environment |= {"OUT": str(self.out), "ARCH": str(self.facts["capability"])}

    def write(self, name: str, rows: Sequence[Mapping[str, Any]], key: str) -> None:
        """Add rows to OUT/name.csv; those with the same `key`, or of another device, version or commit, go."""
        assert self.out is not None
        identity = {column: str(self.facts.get(column) or "") for column in IDENTITY}
        new = [identity | row for row in rows]
        replaced = {row[key] for row in new}

        def keep(row: Mapping[str, str]) -> bool:
            return identity.items() <= row.items() and row[key] not in replaced

        write_table(self.out / f"{name}.csv", new, keep=keep)


def test_rows(junit: Path) -> list[dict[str, str]]:
    """A row a test of a JUnit report; none where there is no whole one."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    rows = []
    for case in cases:
        bad = next((one for one in case if one.tag in ("skipped", "error", "failure")), None)
        message = "" if bad is None else next(iter((bad.get("message") or "").strip().splitlines()), "")[:300]
        outcome = {"failure": "failed"}.get(bad.tag, bad.tag) if bad is not None else "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        rows.append({"test": name, "outcome": outcome, "seconds": case.get("time") or "", "message": message})
    return rows


def summary(outcomes: Sequence[Outcome]) -> Table:
    """Make a table of the outcomes, a line a stage."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("part", "status", "s", "of", "found"):
        table.add_column(name, no_wrap=name != "found", justify="right" if name in ("s", "of") else "left")
    colours = {"ok": "green", "failed": "red"}
    for one in outcomes:
        status = f"[{colours.get(one.status, 'yellow')}]{one.status}[/]"
        table.add_row(one.part, status, f"{one.seconds:.0f}", f"{one.limit:.0f}", one.found.replace("[", r"\["))
    return table


# ---- the command ----------------------------------------------------------------------------------------------------


def use_cache(cache: Path, folder: Path) -> None:
    """Put an ahead-of-time cache, a folder or an archive, in the place of `folder`.

    Raises:
        UserError: it is not there.
    """
    if not cache.exists():
        raise UserError(
            f"--cache {cache}: not there; expected a folder that `python -m ensdistill.aot` filled, or a tar"
        )
    shutil.rmtree(folder, ignore_errors=True)
    copy = shutil.copytree if cache.is_dir() else shutil.unpack_archive
    copy(cache, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments, start = parse_arguments(Arguments, "bench.gpu_check", argv), time.monotonic()
    by_name = {stage.name: stage for stage in STAGES}
    names = [name for name in split(arguments.parts, "--parts", tuple(by_name)) if name != STAGES[0].name]
    if not 0 < arguments.seconds < float("inf") or not 0 < arguments.scale < float("inf"):
        raise UserError("--seconds, --scale: expected positive numbers")
    if "cifar10" in names and not (arguments.data and arguments.data.exists()):
        raise UserError(f"--data {arguments.data}: not there; `cifar10` needs the archive of its images")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a `timeout` around us: end as Ctrl-C does
    work = ROOT / "build" / "gpu-check"
    if arguments.cache:
        use_cache(arguments.cache, work / "cache")
    recipes = [name for name in RECIPES if find_recipe(name).network == arguments.network]
    if not recipes:
        raise UserError(f"--network {arguments.network}: no recipe has it, so nothing is compiled ahead of time for it")
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "cache"),
        "ENSDISTILL_CACHE": str(work / "ensdistill"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "NETWORK": arguments.network,
        "RECIPES": " ".join(recipes),
        "CACHE": str(arguments.cache or ""),
        "DATA": str(arguments.data.absolute() if arguments.data else ""),
        **({"ENSDISTILL_COMMIT": arguments.commit} if arguments.commit else {}),
    }
    os.environ.pop("TRITON_INTERPRET", None)  # the kernels shall run on the GPU
    check = Check(arguments.out, work, arguments.scale, environment)
    outcomes = run_all([STAGES[0], *(by_name[name] for name in names)], start + arguments.seconds, check)
    check.say(f"results: {check.out}; {time.monotonic() - start:.0f} s")
    return int(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(run_main(main))

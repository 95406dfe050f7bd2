"""Damaged, forged and random files of every kind are refused in one line, or read as what they were.

Never a traceback, a signal, a hang, a gigabyte of memory, nor other numbers where a checksum tells. `--chaos N` tries
some 10 N inputs; `make chaos` 10,000, and prints the table of docs/faults.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from corruption import Kind
from corruption_worker import KINDS, Campaign, Case, judge

from ensdistill.runtime.errors import UserError

DEADLINE, MAKING = 60.0, 300.0
"""Seconds of the clock for a case, and for making the whole input, which compiles FFCV's decoder."""
SHORT = 16
"""Trials by default, whose table nobody wants to see."""
HEAD = """| input | refused | read the same | read as other numbers | faults | seconds | longest | MiB |
|---|---:|---:|---:|---:|---:|---:|---:|"""
OUTCOMES = ("refused", "same", "other", "fault")


class Worker:
    """The process that reads; one that died or hung is replaced by the next question."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self._made: set[str] = set()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        here = Path(__file__).parent
        root = here.parents[1]
        path = [str(here / "corruption"), str(root / "tests" / "helpers"), str(root), os.environ.get("PYTHONPATH", "")]
        program = f"import corruption_worker; corruption_worker.serve({theirs.fileno()}, {str(self.root)!r})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL,  # what libraries of C say of damaged files
            )
        self._made = set()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
        self._process = None

    def case(self, kind: str, number: int) -> Case:
        """What becomes of a case; a signal and a hang are faults."""
        if self._process is None:
            self._start()
        if kind not in self._made:
            made = self._ask(kind, None, MAKING)
            assert isinstance(made, str), f"{kind}: the whole input: {made}"
            self._made.add(kind)
        return self._ask(kind, number, DEADLINE)

    def _ask(self, kind: str, number: int | None, deadline: float) -> Any:
        assert self._process is not None
        begin = time.perf_counter()
        detail = f"hang: no answer in {deadline:.0f} s"
        try:
            self._connection.send((kind, number))
            if self._connection.poll(deadline):
                return self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            detail = f"signal: {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
        self.close()
        return Case(outcome="fault", damage=f"case {number}", detail=detail, seconds=time.perf_counter() - begin)


@dataclass
class Row:
    """A kind's line of the table."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    longest: float = 0.0
    rise: int = 0

    def add(self, case: Case) -> None:
        self.outcomes[case.outcome] += 1
        self.seconds += case.seconds
        self.longest, self.rise = max(self.longest, case.seconds), max(self.rise, case.rise)

    def line(self, name: str) -> str:
        counts = [str(self.outcomes[outcome]) for outcome in OUTCOMES]
        columns = [name, *counts, f"{self.seconds:.0f}", f"{self.longest:.1f}", f"{self.rise / (1 << 20):.0f}"]
        return "| " + " | ".join(columns) + " |"


def table(rows: dict[str, Row]) -> str:
    """Markdown: a line a kind, and their sum."""
    total = Row()
    for row in rows.values():
        total.outcomes += row.outcomes
        total.seconds += row.seconds
        total.longest, total.rise = max(total.longest, row.longest), max(total.rise, row.rise)
    return "\n".join([HEAD, *(row.line(name) for name, row in {**rows, "all": total}.items())])


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The worker, with a folder in memory where there is one: a file that is synced need not reach a disk there."""
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="corruption-", dir=place) as root:
        one = Worker(Path(root))
        yield one
        one.close()


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[dict[str, Row]]:
    """Lines of the table, which is printed at the end of a long run."""
    found: dict[str, Row] = {}
    yield found
    _show(request, f"\n\n{table(found)}\n")


def _show(request: pytest.FixtureRequest, text: str) -> None:
    """Print `text` in a long run."""
    if request.config.getoption("--chaos") > SHORT:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(text, flush=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_damaged_input(kind: str, worker: Worker, rows: dict[str, Row], request: pytest.FixtureRequest) -> None:
    row = rows.setdefault(kind, Row())
    faults = []
    for number in range(max(1, round(10 * request.config.getoption("--chaos") / len(KINDS)))):
        case = worker.case(kind, number)
        row.add(case)
        if case.outcome == "fault":
            faults.append(f"case {number}, {case.damage}: {case.detail}")
    _show(request, f"\n{row.line(kind)}")
    assert not faults, "\n".join(faults)


# ---- the campaign itself ---------------------------------------------------------------------------------------------


def _always_same(folder: Path) -> int:
    return 1


def _allocates(folder: Path) -> None:
    try:
        bytearray(1 << 40)
    except MemoryError as error:
        raise UserError(f"{folder}/x: cannot be read") from error


def _raises(error: Exception) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        if (folder / "x").read_bytes() != b"whole":
            raise error
        return 1

    return read


def _says_more(folder: Path) -> int:
    if (folder / "x").read_bytes() != b"whole":
        print("that is strange", file=sys.stderr)
        raise UserError(f"{folder}/x: bad")
    return 1


@pytest.mark.parametrize(
    ("read", "has_digest", "expected"),
    [
        (_always_same, True, "same"),
        (lambda folder: (folder / "x").read_bytes(), False, "other"),
        (lambda folder: (folder / "x").read_bytes(), True, "silent"),
        (_raises(ValueError("x")), True, "traceback: ValueError: x"),
        (_raises(UserError("bad; mend it")), True, "names no file"),
        (lambda folder: _raises(UserError(f"{folder}/x: bad"))(folder), True, "refused"),
        (_says_more, True, "not one line"),
    ],
)
def test_what_is_a_fault(read: Callable[[Path], Any], has_digest: bool, expected: str, tmp_path: Path) -> None:
    kind = Kind(files={"x": b"whole"}, damaged=("x",), read=read, has_digest=has_digest)
    campaign = Campaign(tmp_path, {"x": lambda folder: kind})
    found = {f"{case.outcome} {case.detail}" for case in (campaign.case("x", number) for number in range(9))}
    assert any(expected in one for one in found), found


def test_memory_that_the_limit_refused_is_a_fault(tmp_path: Path) -> None:
    kind = Kind(files={}, damaged=(), read=_allocates, has_digest=False)
    assert judge(kind, tmp_path, None, "x").detail.startswith("memory: MemoryError")


def test_signals_and_hangs_are_seen(tmp_path: Path) -> None:
    worker = Worker(tmp_path)
    for program, expected in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal: SIGSEGV"),
        ("import time; time.sleep(60)", "hang"),
        ("raise SystemExit(3)", "the process ended with 3"),
    ):
        worker._connection, theirs = Pipe()
        with theirs:
            worker._process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()])
        assert expected in worker._ask("x", 0, 3.0).detail

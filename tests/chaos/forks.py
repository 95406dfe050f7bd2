"""Processes that are forked from a warm one: everything is imported and compiled, and a job takes a second.

As a program (`python forks.py IMAGES FOLDER`) it is the warm process: it does the small job once, and then forks one
that does it again for each request, a line of JSON, and answers with how that ended.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from faults import Fault, Journal, install
from small_job import ALL, command

TESTS = Path(__file__).parent
PATIENCE = 600.0
"""Seconds after which a process that still runs is a fault."""


def environment(cache: Path) -> dict[str, str]:
    """Environment of the processes: one thread, for two that spin on a busy core take ten times as long."""
    path = os.pathsep.join([str(TESTS.parent.parent), str(TESTS), *sys.path])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ENSDISTILL_CACHE": str(cache)}


@dataclass(frozen=True, kw_only=True)
class Life:
    """One process from its start to its end."""

    code: int
    """Exit status, or the negative number of the signal that ended it."""
    printed: str
    """What it said."""
    journal: Journal | None
    """What it noted; None where it could not, killed from outside."""
    seconds: float
    """Time that it computed for."""


class Forks:
    """The warm process, as a test sees it."""

    def __init__(self, images: Path, folder: Path) -> None:
        self.images, self._folder = images, folder
        folder.mkdir(parents=True)
        self._lives = 0
        self._errors = (folder / "errors").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(images), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment(folder / "cache"),
            text=True,
            start_new_session=True,  # Ctrl-C ends the test, which ends it
        )
        self._answer()

    def run(
        self,
        out: Path,
        *more: str,
        fault: Fault | None = None,
        kill_after: float | None = None,
        largest_file: int | None = None,
    ) -> Life:
        """Do the job in `out` in a process of its own.

        Args:
            more: `FEW` or `ALL`, and more arguments.
            fault: what happens to it on the inside.
            kill_after: seconds of its own time (`wait`) after which it is killed from outside.
            largest_file: bytes above which the system lets no file of it grow.
        """
        self._lives += 1
        place = self._folder / str(self._lives)
        place.mkdir()
        request = {
            "arguments": command(self.images, out, *more),
            "fault": None if fault is None else asdict(fault),
            "kill_after": kill_after,
            "largest_file": largest_file,
            "place": str(place),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        journal = place / "journal.json"
        return Life(
            code=answer["code"],
            printed=(place / "printed").read_text(),
            journal=Journal.read(journal) if journal.exists() else None,
            seconds=answer["seconds"],
        )

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self._folder / "errors").read_text()
        return json.loads(line)

    def close(self) -> None:
        """End the warm process."""
        self._process.kill()  # a process with FFCV that has forked may wait for ever at its exit
        self._process.communicate()
        self._errors.close()


def wait(pid: int, kill_after: float | None = None) -> tuple[int, float]:
    """Wait for a child, or kill it once it has computed for so many seconds, whatever else the machine does.

    Returns: its exit status, or less the number of the signal that ended it; the seconds that it computed for.
    """
    descriptor, deadline = os.pidfd_open(pid), time.monotonic() + PATIENCE
    while not select.select([descriptor], [], [], 0.002)[0]:
        if time.monotonic() > deadline or (kill_after is not None and _computed(pid) >= kill_after):
            os.kill(pid, signal.SIGKILL)
            break
    os.close(descriptor)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _computed(pid: int) -> float:
    """Seconds that a process has computed for, from its scheduler: to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _main(images: Path, folder: Path) -> NoReturn:
    from ensdistill import fast_train
    from ensdistill.costs import memory
    from ensdistill.run import report
    from ensdistill.runtime.errors import run_main

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    # Half of the small job's time, and always the same: what it predicts and measures is remembered by those to come.
    known: dict[Any, Any] = {}
    predict, rates_of = memory.predict, report.rates_of

    def predict_once(workload: Any, B: int) -> Any:
        key = str(workload.method), B, workload.teachers is None
        if key not in known:
            known[key] = predict(workload, B)
        return known[key]

    def rates_once(*args: Any) -> Any:
        if "rates" not in known:
            known["rates"] = rates_of(*args)
        return known["rates"]

    memory.predict, report.rates_of = predict_once, rates_once

    def job(arguments: list[str]) -> int:
        sys.argv = ["fast_train", *arguments]
        return run_main(fast_train.main)

    def child(request: Any) -> None:
        place = Path(request["place"])
        descriptor = os.open(place / "printed", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        end = install(None if request["fault"] is None else Fault(**request["fault"]), *_places(place))
        if (size := request["largest_file"]) is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        code = job(request["arguments"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.stdout.flush()
        end()
        os._exit(code)

    code = job(command(images, folder / "warm" / "run", *ALL))
    sys.stdout.flush()
    gc.freeze()  # a child that looks at all of it would copy it
    print(json.dumps({"code": code}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if not (pid := os.fork()):
            try:
                child(request)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(99)
        code, seconds = wait(pid, request["kill_after"])
        print(json.dumps({"code": code, "seconds": seconds}), file=answers, flush=True)
    os._exit(0)


def _places(place: Path) -> tuple[Path, Path]:
    return place / "journal.json", place / "links"


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))

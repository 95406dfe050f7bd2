"""Process that measures candidates for another one, which it may not take with it.

    python -m ensdistill.engine.tuning.measuring_process FD DEVICE

is started by `MeasuringProcess` alone; FD is its connection.

A new interpreter, neither a fork (CUDA does not survive one) nor multiprocessing's spawn (which runs the caller's
script again). It has a CUDA context of its own and, while it measures, inputs larger than the L2 cache: where the
device has no memory left for them nothing is measured, which the user is told. Without work for half a minute it ends,
and the next key starts another.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch

from ensdistill.engine.launch_key import Key, NormKey
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.measuring import COMPILE_SECONDS, DeviceLost, Outcome, measure

START_SECONDS = 300.0
"""Limit of its imports and its CUDA context."""
_IDLE_SECONDS = 30.0


class Lost(RuntimeError):
    """Raised where the process ended or did not answer; `candidate` is to blame, or None where several ran."""

    def __init__(self, candidate: Candidate | None, reason: str) -> None:
        super().__init__(reason)
        self.candidate, self.reason = candidate, reason


class NotMeasured(RuntimeError):
    """Raised where the process cannot measure, through no fault of a candidate: no memory, no device."""


class TimeUp(RuntimeError):
    """Raised where the deadline came first; nothing is known of the candidates."""


class MeasuringProcess:
    """Handle of the process, for the one that asks. The first question or `start` starts it."""

    def __init__(self, device: torch.device, *, run_seconds: float | None = None) -> None:
        """`run_seconds`: for a candidate to run in, instead of what measuring.py allows."""
        self.device, self.run_seconds = device, run_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def start(self) -> None:
        """Start the process and return at once, where it does not run already."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        if self.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what is cached here is not free there
        device = str(self.device)
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        self._connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ensdistill.engine.tuning.measuring_process", str(theirs.fileno()), device],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        self._is_ready = False
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            atexit.unregister(self.stop)
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._log.close()
            self._process = None

    def measure(
        self,
        key: Key | NormKey,
        found: Sequence[Candidate],
        *,
        rounds: int,
        alone: bool = False,
        deadline: float | None = None,
    ) -> Outcome:
        """Measure as `measuring.measure` does; `deadline` is in seconds of `time.monotonic`.

        Raises:
            Lost, NotMeasured, TimeUp: see there.
        """
        self.start()
        running: Candidate | None = None
        has_begun = False
        try:
            if not self._is_ready:
                self._receive(START_SECONDS, deadline)
                self._is_ready = True
            self._connection.send((key, tuple(found), rounds, alone))
            allowed = COMPILE_SECONDS
            while True:
                kind, *content = self._receive(allowed, deadline)
                has_begun = True
                if kind == "running":
                    running, allowed = content
                    if running is not None and self.run_seconds is not None:
                        allowed = self.run_seconds
                elif kind == "lost":
                    running, reason = content
                    raise Lost(running, reason)
                elif kind == "not measured":
                    raise NotMeasured(content[0])
                else:
                    outcome: Outcome = content[0]
                    return outcome
        except TimeoutError as error:
            self.stop()
            raise Lost(running, str(error)) from None
        except (EOFError, OSError):
            assert self._process is not None
            had_idled = self._process.wait() == 0 and not has_begun
            reason, was_ready = self._epitaph(), self._is_ready
            self.stop()
            if not was_ready:
                raise NotMeasured(reason) from None
            if had_idled:  # while the question was on its way
                return self.measure(key, found, rounds=rounds, alone=alone, deadline=deadline)
            raise Lost(running, reason) from None
        except (Lost, NotMeasured, TimeUp):
            self.stop()
            raise

    def _receive(self, allowed: float, deadline: float | None) -> tuple[Any, ...]:
        left = allowed if deadline is None else min(allowed, max(0.0, deadline - time.monotonic()))
        if not self._connection.poll(left):
            if left < allowed:
                raise TimeUp
            raise TimeoutError(f"no answer in {allowed:.0f} s")
        message: tuple[Any, ...] = self._connection.recv()
        return message

    def _epitaph(self) -> str:
        """Say how the process ended, and the last line that it wrote."""
        assert self._process is not None
        code = self._process.wait()
        how = f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        lines = self._log.read().decode(errors="replace").split("\n")
        return ": ".join([how, *[line.strip()[:200] for line in lines if line.strip()][-1:]])


def _serve(connection: Connection, device: torch.device) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks: when it ends, so does this one
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.init()
    connection.send(("ready",))
    while connection.poll(_IDLE_SECONDS):
        try:
            key, found, rounds, alone = connection.recv()
        except EOFError:
            return

        def announce(candidate: Candidate | None, seconds: float) -> None:
            connection.send(("running", candidate, seconds))

        try:
            outcome = measure(key, found, device, rounds=rounds, alone=alone, announce=announce)
        except DeviceLost as lost:
            connection.send(("lost", lost.candidate, lost.reason))
            os._exit(1)
        except (RuntimeError, MemoryError) as error:
            connection.send(("not measured", (str(error).splitlines() or [type(error).__name__])[0]))
            os._exit(1)  # whatever broke is not trusted with the next key
        connection.send(("done", outcome))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), torch.device(sys.argv[2]))

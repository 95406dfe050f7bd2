"""Candidates that crash, hang, raise or are wrong, measured in a process of their own: the choice is right, and the
table knows what failed. On a CPU, by the library's two forms and candidates that fail.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from failing_candidates import Aborts, AbortsLater, Breaks, Full, Hangs, Raises, Wrong

from ensdistill.engine.launch_key import Key, NormKey
from ensdistill.engine.tuning import tuner as module
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.engine.tuning.measuring_process import MeasuringProcess, TimeUp
from ensdistill.engine.tuning.table import Choice, Failure, TuningTable
from ensdistill.engine.tuning.tuner import Tuner

CPU = torch.device("cpu")
LOOP, GROUPED = Candidate(provider="library"), Candidate(provider="library", grouped=True)


def make_key(**changes: object) -> Key:
    fields = {"E": 2, "M": 2, "B": 1, "H": 5, "W": 6, "CI": 16, "CO": 16, "k": 3, "stride": 1, "dtype": "fp32"}
    return Key(op="forward", out_dtype="fp32", **fields | changes)  # type: ignore[arg-type]


def tile(form: int, M: int = 64) -> tuple[int, ...]:
    return (form, M, 64, 64, 4, 3)


@pytest.fixture(scope="module")
def process() -> Iterator[MeasuringProcess]:
    """One for all tests: that it starts again after a crash is part of them."""
    one = MeasuringProcess(CPU)
    yield one
    one.stop()


def make_tuner(
    monkeypatch: pytest.MonkeyPatch, process: MeasuringProcess, path: Path | None, found: Sequence[Candidate]
) -> Tuner:
    monkeypatch.setattr(module, "candidates", lambda key, device: list(found))
    return Tuner(TuningTable(path, {}), CPU, process=process, rounds=2)


def measured(choice: Choice | None) -> set[Candidate]:
    assert choice is not None
    return {one.candidate for one in choice.measured}


FAILING = [
    (Aborts(provider="triton", tile=tile(1)), True, "its process ended with SIGABRT"),
    (Breaks(provider="triton", tile=tile(1)), True, "an illegal memory access was encountered"),
    (Raises(provider="triton", tile=tile(1)), False, "does not compile$"),
    (Wrong(provider="triton", tile=tile(1)), False, "relative error 0.1"),
]


@pytest.mark.parametrize(("bad", "crashed", "reason"), FAILING, ids=lambda value: type(value).__name__)
def test_what_fails_is_left_out_and_remembered(
    bad: Candidate,
    crashed: bool,
    reason: str,
    process: MeasuringProcess,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "table.json"
    tuner = make_tuner(monkeypatch, process, path, [bad, LOOP, GROUPED])
    with pytest.warns(UserWarning) as caught:
        choice = tuner.choice(make_key())
    (text,) = [str(one.message) for one in caught]
    assert re.fullmatch(rf"tuning: {re.escape(str(bad))} is left out for forward, .*: {reason}.*", text), text
    assert measured(choice) == {LOOP, GROUPED} and choice == tuner.table.get(make_key())
    assert choice.candidate == choice.measured[0].candidate  # type: ignore[union-attr]
    # another run: from the file, nothing is tried again
    again = make_tuner(monkeypatch, process, path, [bad, LOOP, GROUPED])
    failure = again.table.failure(make_key(), bad)
    assert failure is not None and failure.crashed == crashed and re.search(reason, failure.reason)
    monkeypatch.setattr(MeasuringProcess, "measure", None)
    assert again.choice(make_key()) == choice and again.left(make_key()) == []
    assert again.fallback(make_key()) == LOOP


def test_one_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad, process = Hangs(provider="triton", tile=tile(2)), MeasuringProcess(CPU, run_seconds=10)
    tuner = make_tuner(monkeypatch, process, tmp_path / "table.json", [LOOP, bad])
    with pytest.warns(UserWarning, match="triton rows .* is left out .*: no answer in 10 s"):
        choice = tuner.choice(make_key())
    tuner.close()
    assert measured(choice) == {LOOP}
    assert tuner.table.failure(make_key(), bad) == Failure(reason="no answer in 10 s", crashed=True)


def test_one_that_crashes_among_others_is_found(process: MeasuringProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that are timed in turn may be to blame; one at a time they are not."""
    bad = AbortsLater(provider="triton", tile=tile(1))
    tuner = make_tuner(monkeypatch, process, None, [LOOP, bad, GROUPED])
    with pytest.warns(UserWarning, match="triton boxes .* is left out .*: its process ended with SIGABRT"):
        choice = tuner.choice(make_key())
    assert measured(choice) == {LOOP, GROUPED}
    failure = tuner.table.failure(make_key(), bad)
    assert failure is not None and failure.crashed


def test_a_form_that_crashed_twice_is_not_tried_a_third_time(
    process: MeasuringProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = make_tuner(monkeypatch, process, None, [Aborts(provider="triton", tile=tile(1)), LOOP])
    for B in (1, 2):
        with pytest.warns(UserWarning, match="SIGABRT"):
            tuner.choice(make_key(B=B))
    monkeypatch.setattr(module, "candidates", lambda key, device: [Aborts(provider="triton", tile=tile(1, 128)), LOOP])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(tuner.choice(make_key(B=3))) == {LOOP}


def test_what_is_left_is_measured_later(
    process: MeasuringProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Providers one after the other; what found no memory stays to be measured; a deadline leaves all as it was."""
    full = Full(provider="library", tile=(1,))
    ours = Candidate(provider="triton")
    path = tmp_path / "table.json"
    tuner = make_tuner(monkeypatch, process, path, [ours, LOOP, full])
    assert measured(tuner.choice(make_key(), ("triton",))) == {ours}
    assert tuner.left(make_key()) == [LOOP, full]
    assert tuner.choice(make_key(), deadline=0.0) == tuner.table.get(make_key())
    later = make_tuner(monkeypatch, process, path, [ours, LOOP, full])
    assert measured(later.choice(make_key())) == {ours, LOOP}
    assert later.left(make_key()) == [full] and later.table.failure(make_key(), full) is None


def test_a_deadline_ends_a_key_in_the_middle(process: MeasuringProcess) -> None:
    import time

    process.measure(make_key(), [LOOP], rounds=1)  # started
    start = time.monotonic()
    with pytest.raises(TimeUp):
        process.measure(make_key(), [Hangs(provider="triton")], rounds=1, deadline=start + 2)
    assert 1.5 < time.monotonic() - start < 9
    assert len(process.measure(make_key(), [LOOP], rounds=1).measured) == 1  # another one starts


def test_norms_are_measured_there_too(process: MeasuringProcess) -> None:
    key = NormKey(M=2, B=1, H=4, W=4, C=16, dtype="fp32")
    choice = Tuner(TuningTable(None, {}), CPU, process=process, rounds=2).choice(key)
    assert choice is not None and choice.measured[0].microseconds > 0


def test_a_device_that_refuses_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU for a second process, no memory for its context: nothing is measured, and the fallback runs."""
    process = MeasuringProcess(torch.device("cuda:0"))
    tuner = Tuner(TuningTable(None, {}), CPU, process=process)
    with pytest.warns(UserWarning, match="nothing is measured from here on: its process ended with exit code 1: "):
        assert tuner.choice(make_key()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner.choice(make_key(B=2)) is None
    assert tuner.fallback(make_key()).provider == "triton"


def test_it_ends_with_the_process_that_asks() -> None:
    program = (
        "import torch; from ensdistill.engine.tuning.measuring_process import MeasuringProcess as M; "
        "from ensdistill.engine.tuning.table import Candidate; from test_tuner import make_key; "
        "p = M(torch.device('cpu')); p.measure(make_key(), [Candidate(provider='library')], rounds=1); "
        "print(p._process.pid)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(found.stdout), 0)

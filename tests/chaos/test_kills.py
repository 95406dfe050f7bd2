"""A whole run that is killed, at every call that changes a file and at random moments, ends as one that was not.

After each death: no half file under a final name, no finished epoch lost. After `--resume`: weights, logs, events and
results of the unbroken run, and nothing left over.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from campaign import Campaign
from faults import KINDS, Fault
from forks import Forks, environment
from small_job import ALL, FEW, NUM_NETWORKS, command, differences, finished_epochs, halves, outcome


def points(calls: Counter[str], count: int) -> list[Fault]:
    """So many calls at which to be killed, of all; of each kind as many as its share, and at least one."""
    every = [
        Fault(kind=kind, number=number, after=after)
        for kind in KINDS
        for number in range(1, calls[kind] + 1)
        for after in ((False, True) if kind == "replace" else (False,))  # the name is there, its folder not yet synced
    ]
    random.Random(1).shuffle(every)
    first = {fault.kind: fault for fault in reversed(every)}  # one of each kind, whatever the count
    rest = [fault for fault in every if fault is not first[fault.kind]]
    return [*first.values(), *rest][: max(count, len(first))]


def test_points_are_of_every_kind():
    calls = Counter(dict.fromkeys(KINDS, 30))
    few, all_of_them = points(calls, 3), points(calls, 10_000)
    assert {fault.kind for fault in few} == set(KINDS) and len(few) == len(KINDS)
    assert len(set(all_of_them)) == len(all_of_them) == 30 * (len(KINDS) + 1)


@pytest.fixture(scope="module")
def unbroken(forks: Forks, place: Path) -> dict[str, Any]:
    """What the job leaves in a process of its own that nobody disturbs, with all methods."""
    out = place / "unbroken" / "run"
    code, printed = real_process(command(forks.images, out, *ALL), place / "cache", None)
    assert code == 0, printed
    expected = outcome(out)
    assert len([name for name in expected if name.endswith("/best.safetensors")]) == NUM_NETWORKS
    return expected


@pytest.fixture(scope="module")
def counted(forks: Forks, place: Path, unbroken: dict[str, Any]) -> tuple[Counter[str], dict[str, Any]]:
    """Number of calls of an unbroken run with few methods, by kind, and what it leaves."""
    out = place / "counted" / "run"
    life = forks.run(out, *FEW)
    assert life.code == 0, life.printed
    assert life.journal is not None and all(life.journal.calls[kind] for kind in KINDS)
    expected = outcome(out)
    networks = [name for name in expected if name.endswith((".safetensors", ".jsonl", ".training", "outcome.json"))]
    assert len(networks) == 23 and all(expected[name] == unbroken[name] for name in networks)
    return life.journal.calls, expected


def wrong_after_death(out: Path, before: dict[str, int]) -> list[str]:
    """What a death has spoilt, and epochs that were finished `before` and are lost."""
    wrong = halves(out.parent)
    after = {} if wrong else finished_epochs(out)
    lost = [f"{name}: {epochs} epochs were finished" for name, epochs in before.items() if after.get(name, 0) < epochs]
    return wrong or lost


def wrong_at_the_end(out: Path, expected: dict[str, Any]) -> list[str]:
    """What differs from the unbroken run; files that are too many among it."""
    return differences(outcome(out), expected)


def test_killed_at_every_call(
    forks: Forks, place: Path, counted: tuple[Counter[str], dict[str, Any]], campaign: Campaign
) -> None:
    calls, expected = counted
    for number, fault in enumerate(points(calls, campaign.share(0.5))):
        out = place / f"call-{number}" / "run"
        life = forks.run(out, *FEW, fault=fault)
        assert life.code == -9 and life.journal is not None, (fault, life.printed)
        loses = number % 2 == 0  # the machine, not the process alone
        if loses:
            life.journal.lose_what_was_not_synced(out.parent)
        wrong = wrong_after_death(out, life.journal.saved)
        again = forks.run(out, *FEW, "--resume")
        wrong += wrong_at_the_end(out, expected) if again.code == 0 else [again.printed]
        campaign.count(fault.kind, f"{fault}{', machine lost' if loses else ''}", wrong, out.parent)
    campaign.end("killed at calls")


def test_killed_at_random_moments(forks: Forks, place: Path, unbroken: dict[str, Any], campaign: Campaign) -> None:
    moments = random.Random(2)
    whole = forks.run(place / "timed" / "run", *ALL).seconds
    kills = 0
    for number in itertools.count():
        if kills >= campaign.share(0.4):
            break
        out = place / f"moment-{number}" / "run"
        for left in reversed(range(9)):  # up to eight deaths, and then to the end
            before = finished_epochs(out)
            life = forks.run(out, *ALL, "--resume", kill_after=moments.uniform(0, 0.9 * whole) if left else None)
            if life.code == 0:
                campaign.check(f"moments, job {number}", wrong_at_the_end(out, unbroken), out.parent)
                break
            assert life.code == -9, life.printed
            kills += 1
            campaign.count("random moment", f"moments, job {number}", wrong_after_death(out, before))
        else:
            pytest.fail(f"{out}: not finished")
    campaign.end("killed at random moments")


def test_real_processes_killed_at_random_moments(
    forks: Forks, tmp_path: Path, unbroken: dict[str, Any], campaign: Campaign
) -> None:
    """Fresh ones, on a disk; some before they have imported anything."""
    moments = random.Random(3)
    kills, whole = 0, 12.0
    for number in itertools.count():
        if kills >= campaign.share(0.1):
            break
        out = tmp_path / str(number) / "run"
        code, left = -9, 5
        while code == -9:
            left -= 1
            before = finished_epochs(out)
            start = time.perf_counter()
            code, printed = real_process(
                command(forks.images, out, *ALL, "--resume"),
                tmp_path / "cache",
                moments.uniform(0.2, 1.2) * whole if left else None,
            )
            if code == 0:
                whole = time.perf_counter() - start if left == 4 else whole
                campaign.check(f"real processes, job {number}", wrong_at_the_end(out, unbroken), out.parent)
            else:
                assert code == -9, printed
                kills += 1
                campaign.count("real process", f"real processes, job {number}", wrong_after_death(out, before))
    campaign.end("real processes killed")


def real_process(arguments: list[str], cache: Path, kill_after: float | None) -> tuple[int, str]:
    """Run the command as its user does, and return its exit status and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ensdistill.fast_train", *arguments],
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=300 if kill_after is None else kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
    return process.returncode, printed

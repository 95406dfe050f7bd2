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
from faults import points
from forks import Forks, environment
from small_job import ALL, FEW, NUM_NETWORKS, command, differences, finished_epochs, halves, outcome


@pytest.fixture(scope="module")
def unbroken(forks: Forks, place: Path, few: tuple[Counter[str], dict[str, Any]]) -> dict[str, Any]:
    """What the job leaves in a process of its own that nobody disturbs, with all methods."""
    out = place / "unbroken" / "run"
    code, printed = real_process(command(forks.images, out, *ALL), place / "cache", None)
    assert code == 0, printed
    expected = outcome(out)
    assert len([name for name in expected if name.endswith("/best.safetensors")]) == NUM_NETWORKS
    names = [name for name in few[1] if name.endswith((".safetensors", ".jsonl", ".training", "outcome.json"))]
    assert len(names) == 23 and all(few[1][name] == expected[name] for name in names)  # forked ones do the same
    return expected


def wrong_after_death(out: Path, before: dict[str, int]) -> list[str]:
    """What a death has spoilt, and epochs that were finished `before` and are lost."""
    wrong = halves(out.parent)
    after = {} if wrong else finished_epochs(out)
    lost = [f"{name}: {epochs} epochs were finished" for name, epochs in before.items() if after.get(name, 0) < epochs]
    return wrong or lost


def test_killed_at_every_call(
    forks: Forks, place: Path, few: tuple[Counter[str], dict[str, Any]], campaign: Campaign
) -> None:
    calls, expected = few
    for number, fault in enumerate(points(calls, campaign.share(0.5))):
        out = place / f"call-{number}" / "run"
        life = forks.run(out, *FEW, fault=fault)
        if life.code == 0:  # a file less in the cache than where calls were counted
            campaign.check(f"{fault}, not reached", differences(outcome(out), expected), out.parent)
            continue
        assert life.code == -9 and life.journal is not None, (fault, life.printed)
        loses = number % 2 == 0  # the machine, not the process alone
        if loses:
            life.journal.lose_what_was_not_synced(out.parent)
        wrong = wrong_after_death(out, life.journal.saved)
        again = forks.run(out, *FEW, "--resume")
        wrong += differences(outcome(out), expected) if again.code == 0 else [again.printed]
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
                campaign.check(f"moments, job {number}", differences(outcome(out), unbroken), out.parent)
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
                campaign.check(f"real processes, job {number}", differences(outcome(out), unbroken), out.parent)
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

"""A whole run that is killed, at every call that changes a file and at random moments, ends as one that was not.

After each death: no half file under a final name, no finished epoch lost. After `--resume`: weights, logs, events and
results of the unbroken run, and nothing left over.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from campaign import Campaign
from faults import points
from forks import Forks, environment, wait
from small_job import ALL, FEW, NUM_NETWORKS, command, differences, finished_epochs, halves, outcome


@pytest.fixture(scope="module")
def unbroken(forks: Forks, place: Path, few: tuple[Counter[str], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What a real process that nobody disturbs leaves of the job with all methods, and the seconds that it computes."""
    out = place / "unbroken" / "run"
    code, seconds, printed = real_process(command(forks.images, out, *ALL), place / "real", None)
    assert code == 0, printed
    expected = outcome(out)
    assert len([name for name in expected if name.endswith("/best.safetensors")]) == NUM_NETWORKS
    names = [name for name in few[1] if name.endswith((".safetensors", ".jsonl", ".training", "outcome.json"))]
    assert len(names) == 23 and all(few[1][name] == expected[name] for name in names)  # forked ones do the same
    return expected, seconds


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


def test_killed_at_random_moments(
    forks: Forks, place: Path, unbroken: tuple[dict[str, Any], float], campaign: Campaign
) -> None:
    moments = random.Random(2)
    whole = forks.run(place / "timed" / "run", *ALL).seconds
    kills = 0
    for number in itertools.count():
        if kills >= campaign.share(0.4):
            break
        out = place / f"moment-{number}" / "run"
        for left in reversed(range(9)):  # up to eight deaths, and then to the end
            before = finished_epochs(out)
            life = forks.run(out, *ALL, "--resume", kill_after=moments.uniform(0, whole) if left else None)
            if life.code == 0:
                campaign.check(f"moments, job {number}", differences(outcome(out), unbroken[0]), out.parent)
                break
            assert life.code == -9, life.printed
            kills += 1
            campaign.count("random moment", f"moments, job {number}", wrong_after_death(out, before))
        else:
            pytest.fail(f"{out}: not finished")
    campaign.end("killed at random moments")


def test_real_processes_killed_at_random_moments(
    forks: Forks, tmp_path: Path, unbroken: tuple[dict[str, Any], float], campaign: Campaign
) -> None:
    """Fresh ones, on a disk; some before they have imported anything."""
    moments = random.Random(3)
    expected, whole = unbroken
    kills = 0
    for number in itertools.count():
        if kills >= campaign.share(0.1):
            break
        out = tmp_path / str(number) / "run"
        for left in reversed(range(5)):  # up to four deaths, and then to the end
            before = finished_epochs(out)
            kill_after = moments.uniform(0, whole) if left else None
            arguments = command(forks.images, out, *ALL, "--resume")
            code, _, printed = real_process(arguments, tmp_path / "real", kill_after)
            if code == 0:
                campaign.check(f"real processes, job {number}", differences(outcome(out), expected), out.parent)
                break
            assert code == -9, printed
            kills += 1
            campaign.count("real process", f"real processes, job {number}", wrong_after_death(out, before))
        else:
            pytest.fail(f"{out}: not finished")
    campaign.end("real processes killed")


def real_process(arguments: list[str], place: Path, kill_after: float | None) -> tuple[int, float, str]:
    """Run the command as its user does; `kill_after`, the exit status and the seconds: as for `wait`."""
    place.mkdir(exist_ok=True)
    with (place / "printed").open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ensdistill.fast_train", *arguments],
            env=environment(place / "cache"),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.returncode, seconds = wait(process.pid, kill_after)
    return process.returncode, seconds, (place / "printed").read_text()

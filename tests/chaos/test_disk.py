"""A disk that refuses a write, at any call of a run: one line that names the file, and `--resume` ends the same."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from campaign import Campaign
from faults import KINDS, Fault, points
from forks import Forks, Life
from small_job import FEW, differences, finished_epochs, halves, outcome

ERRORS = {
    "ENOSPC": "no space left on the disk",
    "EDQUOT": "no space left on the disk",
    "EFBIG": "larger than a file may be here",
    "EIO": "the disk failed",
    "EROFS": "cannot be written",
}


def test_points_are_of_every_kind():
    calls = Counter(dict.fromkeys(KINDS, 30))
    few, all_of_them = points(calls, 3), points(calls, 10_000)
    assert {fault.kind for fault in few} == set(KINDS) and len(few) == len(KINDS)
    assert len(set(all_of_them)) == len(all_of_them) == 30 * (len(KINDS) + 1)


def wrong_message(life: Life, folder: Path, words: str) -> list[str]:
    """What is wrong with how a process ended that was refused a write."""
    errors = [line for line in life.printed.splitlines() if line.startswith("error: ")]
    if life.code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {folder}/") and words in errors[0]:
        return [] if "Traceback" not in life.printed and ".tmp" not in errors[0] else [life.printed]
    return [f"exit status {life.code}, said {life.printed[-2000:]}"]


def test_a_disk_that_refuses_any_call(
    forks: Forks, place: Path, few: tuple[Counter[str], dict[str, Any]], campaign: Campaign
) -> None:
    calls, expected = few
    chosen = random.Random(4)
    for number, point in enumerate(points(calls, campaign.share(0.5))):
        out = place / f"refused-{number}" / "run"
        error = chosen.choice(list(ERRORS))
        fault = Fault(kind=point.kind, number=point.number, error=error)
        life = forks.run(out, *FEW, fault=fault)
        # temporary files that cannot be deleted, and what is remembered in the cache, stop nobody
        wrong = [] if life.code == 0 else wrong_message(life, out.parent, ERRORS[error])
        wrong += halves(out.parent)
        assert life.journal is not None, life.printed
        for name, epochs in life.journal.saved.items():
            wrong += [f"{name}: lost"] if finished_epochs(out).get(name, 0) < epochs else []
        again = forks.run(out, *FEW, "--resume")
        wrong += differences(outcome(out), expected) if again.code == 0 else [again.printed]
        campaign.count(f"{error} at {fault.kind}", f"{fault}", wrong, out.parent)
    campaign.end("refused by the disk")


def test_files_that_may_not_grow(
    forks: Forks, place: Path, few: tuple[Counter[str], dict[str, Any]], campaign: Campaign
) -> None:
    """The system's own refusal (RLIMIT_FSIZE), of whichever file is the first to become too large."""
    _, expected = few
    sizes = {path.stat().st_size for path in (place / "few").rglob("*") if path.is_file()}
    limits = sorted(size - 1 for size in sizes if size > 4096)  # what it prints goes to a file too
    for number, size in enumerate(random.Random(5).choices(limits, k=campaign.share(0.1))):
        out = place / f"limited-{number}" / "run"
        life = forks.run(out, *FEW, largest_file=size)
        wrong = wrong_message(life, out.parent, ERRORS["EFBIG"]) + halves(out.parent)
        again = forks.run(out, *FEW, "--resume")
        wrong += differences(outcome(out), expected) if again.code == 0 else [again.printed]
        campaign.count("limit of a file's size", f"at most {size} bytes a file", wrong, out.parent)
    campaign.end("refused by the system")

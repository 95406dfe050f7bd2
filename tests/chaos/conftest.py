"""What the campaigns share: a place, a warm process, and the number of trials that `--chaos` asks for."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign import Campaign
from faults import KINDS
from forks import Forks
from small_job import FEW, outcome, write_images


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, where there is room: a disk takes most of the time of so small a job to sync its files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or os.statvfs(memory).f_bavail * os.statvfs(memory).f_frsize < 1 << 30:
        yield tmp_path_factory.mktemp("chaos")
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="ensdistill-chaos-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def forks(place: Path) -> Iterator[Forks]:
    """The warm process."""
    write_images(place / "images")
    warm = Forks(place / "images", place / "forks")
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def few(forks: Forks, place: Path) -> tuple[Counter[str], dict[str, Any]]:
    """Number of calls of an unbroken run with few methods, by kind, and what it leaves."""
    out = place / "few" / "run"
    life = forks.run(out, *FEW)
    assert life.code == 0, life.printed
    assert life.journal is not None and all(life.journal.calls[kind] for kind in KINDS)
    return life.journal.calls, outcome(out)


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Campaign:
    """Count of the trials of one test."""
    trials = request.config.getoption("--chaos")
    return Campaign(trials, is_long=trials >= 100)

"""Two processes under torchrun of which one is lost or stopped: torchrun starts both anew, and the end is the same.

The long campaign alone has these (`make chaos`): a start takes longer than the whole of the small job. One of each is
in tests/runtime.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign import Campaign
from forks import Forks, environment
from small_job import FEW, command, differences, outcome

RESTARTS = 4
PATIENCE = 300.0
SILENCE = 10.0
"""Seconds after which a stopped process counts as lost (`--max-silence`); torchrun takes 30 more to end it."""


@pytest.fixture
def moments(campaign: Campaign) -> random.Random:
    """What decides when a process is lost; where the campaign is short nothing does."""
    if not campaign.is_long:
        pytest.skip("of the long campaign: make chaos")
    return random.Random(6)


class Torchrun:
    """Two processes and torchrun, which starts them anew when one is lost."""

    def __init__(self, forks: Forks, out: Path) -> None:
        options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(RESTARTS)]
        job = command(forks.images, out, *FEW, "--max-silence", str(SILENCE))
        self.start = time.perf_counter()
        self._printed = out.parent / "printed"
        self._printed.parent.mkdir(parents=True)
        with self._printed.open("wb") as file:
            self._agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, "-m", "ensdistill.fast_train", *job],
                env=environment(out.parent.parent / "cache"),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def send(self, number: signal.Signals, rank: int) -> bool:
        """Send a signal to one of the two, once torchrun has started both; False where it has ended before."""
        children = Path(f"/proc/{self._agent.pid}/task/{self._agent.pid}/children")
        while self._agent.poll() is None:
            ranks = [int(pid) for pid in children.read_text().split() if _is_rank(pid)]
            if len(ranks) == 2:
                os.kill(ranks[rank], number)
                return True
            time.sleep(0.1)
        return False

    def wait(self) -> tuple[int, str]:
        """Wait for the end, and return torchrun's exit status and what all have printed; the file goes."""
        try:
            code = self._agent.wait(PATIENCE)
        finally:
            self._agent.kill()
        printed = self._printed.read_text()
        self._printed.unlink()
        return code, printed


def _is_rank(pid: str) -> bool:
    try:
        return b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has just ended
        return False


def test_a_lost_process_changes_nothing(
    forks: Forks, tmp_path: Path, moments: random.Random, campaign: Campaign
) -> None:
    unbroken = Torchrun(forks, tmp_path / "unbroken" / "run")
    code, printed = unbroken.wait()
    assert code == 0, printed
    whole, expected = time.perf_counter() - unbroken.start, outcome(tmp_path / "unbroken" / "run")
    for number in range(campaign.share(0.005)):
        out = tmp_path / str(number) / "run"
        broken = Torchrun(forks, out)
        for loss in range(3):
            time.sleep(moments.uniform(0.1, 0.9) * whole)
            sent = signal.SIGSTOP if number == loss == 0 else signal.SIGKILL
            if not broken.send(sent, moments.randrange(2)):
                break
            campaign.count(f"rank lost by {sent.name}", f"job {number}", [])
        code, printed = broken.wait()
        wrong = differences(outcome(out), expected) if code == 0 else [printed[-3000:]]
        campaign.check(f"lost ranks, job {number}", wrong, out.parent)
    campaign.end("processes lost under torchrun")

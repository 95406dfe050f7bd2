"""How much a campaign tries, what it counts, and what it says."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from pathlib import Path


class Campaign:
    """Trials of one test, counted by kind.

    Args:
        trials: number of all that `--chaos` asks for.
        is_long: says how far it is, for those who wait for it.
    """

    def __init__(self, trials: int, *, is_long: bool) -> None:
        self._trials, self.is_long = trials, is_long
        self._kinds: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._start = time.perf_counter()

    def share(self, part: float) -> int:
        """The number of trials that a part of the campaign has, at least one."""
        return max(1, round(part * self._trials))

    def count(self, kind: str, what: str, wrong: list[str], folder: Path | None = None) -> None:
        """Count a trial; `folder`, if it is over, is kept where something is `wrong`."""
        self._kinds[kind] += 1
        self.check(what, wrong, folder)
        if self.is_long and sum(self._kinds.values()) % 20 == 0:
            self._say("so far")

    def check(self, what: str, wrong: list[str], folder: Path | None = None) -> None:
        """Remember what is `wrong`, if anything is; else delete `folder`."""
        if wrong:
            self._wrong.append(f"{what}: {'; '.join(wrong)}")
            if self.is_long:
                print(self._wrong[-1], file=sys.stderr, flush=True)
        elif folder is not None:
            shutil.rmtree(folder)

    def end(self, what: str) -> None:
        """Say what was counted, and fail if anything was wrong."""
        if self.is_long:
            self._say(what)
        assert not self._wrong, "\n".join(self._wrong)

    def _say(self, what: str) -> None:
        seconds = time.perf_counter() - self._start
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self._kinds.items()))
        total = sum(self._kinds.values())
        print(f"{what}: {total} ({kinds}), {len(self._wrong)} wrong, {seconds:,.0f} s", file=sys.stderr, flush=True)

"""Decide what is measured, when, and what runs where nothing was.

A GPU's candidates are measured in another process (measuring_process.py): one that crashes the device or hangs costs
that process, is remembered in the table and not tried again, and the user sees a line. Nothing runs in this process
that did not run there, but for the fallback: the first of our tiles, else the library, that is not known to fail.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import torch

from ensdistill.engine.launch_key import Key, NormKey
from ensdistill.engine.tuning.candidates import Candidate, candidates
from ensdistill.engine.tuning.measuring import ROUNDS, Outcome, measure
from ensdistill.engine.tuning.measuring_process import Lost, MeasuringProcess, NotMeasured, TimeUp
from ensdistill.engine.tuning.table import Choice, Failure, TuningTable
from ensdistill.runtime.devices import installed_gpu

PROVIDERS = ("triton", "library")
"""In the order in which they are measured: what the library needs compiled takes seconds a layer."""


class Tuner:
    """Table of a device, with the process that fills it."""

    def __init__(
        self,
        table: TuningTable,
        device: torch.device,
        *,
        process: MeasuringProcess | None = None,
        rounds: int = ROUNDS,
    ) -> None:
        """`process`: measures; by default one of its own for a GPU, and this very process for a CPU."""
        self.table, self.device, self.rounds = table, device, rounds
        self.process = process or (MeasuringProcess(device) if device.type == "cuda" else None)
        self._refused: str | None = None

    def left(self, key: Key | NormKey, providers: Sequence[str] = PROVIDERS) -> list[Candidate]:
        """Candidates of `key` that are neither measured nor known to fail."""
        choice = self.table.get(key)
        if isinstance(key, NormKey):
            return [] if choice else [Candidate(provider="triton")]
        known = set() if choice is None else {one.candidate for one in choice.measured}
        return [
            one
            for one in candidates(key, self.device)
            if one.provider in providers and one not in known and self.table.failure(key, one) is None
        ]

    def fallback(self, key: Key) -> Candidate:
        """Candidate that computes `key` where nothing was measured."""
        found = candidates(key, self.device)
        return next((one for one in found if self.table.failure(key, one) is None), Candidate(provider="library"))

    def choice(
        self, key: Key | NormKey, providers: Sequence[str] = PROVIDERS, *, deadline: float | None = None
    ) -> Choice | None:
        """Choose for `key` when all that is left of `providers` has been measured; None where nothing could be.

        `deadline`: in seconds of `time.monotonic`. Past it the choice is the one that was known before.
        """
        before, left = self.table.get(key), self.left(key, providers)
        if not left or self._refused is not None or (deadline is not None and time.monotonic() >= deadline):
            return before
        if before is not None:
            left.append(before.candidate)  # timed again, beside the others
        outcome = self._outcome(key, left, deadline)
        for candidate, reason in outcome.rejected.items():
            self._fail(key, candidate, Failure(reason=reason))
        new = {one.candidate for one in outcome.measured} - ({before.candidate} if before else set())
        if not new:
            return before
        rates = installed_gpu() if self.device.type == "cuda" else None
        choice = (
            Choice.of(key, outcome.measured, rates)
            if before is None
            else before.with_more(key, outcome.measured, rates)
        )
        self.table.put(key, choice)
        return choice

    def _outcome(self, key: Key | NormKey, left: list[Candidate], deadline: float | None) -> Outcome:
        """Measure `left`; of candidates that crash, each is left out in turn."""
        if self.process is None:
            return measure(key, left, self.device, rounds=self.rounds)
        alone = False
        while left:
            try:
                return self.process.measure(key, left, rounds=self.rounds, alone=alone, deadline=deadline)
            except TimeUp:
                break
            except NotMeasured as error:
                self._refuse(f"tuning: nothing is measured from here on: {error}; default tiles run")
                break
            except Lost as error:
                if error.candidate is not None:
                    self._fail(key, error.candidate, Failure(reason=error.reason, crashed=True))
                    left = [one for one in left if one != error.candidate]
                elif not alone:
                    alone = True  # several ran: one at a time, and the guilty one shows
                else:
                    warnings.warn(f"tuning: {key} is not measured: {error}", stacklevel=2)
                    break
        return Outcome()

    def _refuse(self, reason: str) -> None:
        self._refused = reason
        warnings.warn(reason, stacklevel=2)

    def _fail(self, key: Key | NormKey, candidate: Candidate, failure: Failure) -> None:
        self.table.put_failure(key, candidate, failure)
        warnings.warn(f"tuning: {candidate} is left out for {key}: {failure.reason}", stacklevel=2)

    def close(self) -> None:
        """End the measuring process; the next key that must be measured starts another."""
        if self.process is not None:
            self.process.stop()

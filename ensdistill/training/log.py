"""Measures of one network in training: JSON lines, and TensorBoard events beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ensdistill.runtime.files import atomic_write


class Log:
    """`metrics.jsonl` and TensorBoard events in `folder`. What lies past `step`, where the run goes on, is dropped.

    Every line holds `kind` (train, valid or device), `step` (updates done) and its values. A number that is not
    finite, or not known, is null.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._drop_after(step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def _drop_after(self, step: int) -> None:
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break  # the half line of a lost process
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """One line, and one event a value that is known."""
        line: dict[str, Any] = {"kind": kind, "step": step}
        known = {name: value for name, value in values.items() if value is not None}
        line |= {name: known[name] if math.isfinite(known.get(name, math.nan)) else None for name in values}
        self._file.write(json.dumps(line) + "\n")
        for name, value in known.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()


class NoLog:
    """Takes what a `Log` takes and keeps nothing: of several processes one writes."""

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """See `Log`."""

    def flush(self) -> None:
        """See `Log`."""

    def close(self) -> None:
        """See `Log`."""

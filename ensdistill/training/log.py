"""What a training measured: JSON lines, and TensorBoard's events beside them, as far as its checkpoint counts them.

Both files are on the disk before a checkpoint that counts them (`Log.sync`), and where a run goes on they are cut to
what it counts. So the log of a run that was killed, anywhere, and resumed is the unbroken run's.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ensdistill.runtime.errors import first_names
from ensdistill.runtime.files import parse_json, sync_folder, writing

_Count = Annotated[int, msgspec.Meta(ge=0)]


class Place(TypedDict):
    """End of a log, as a checkpoint counts it."""

    lines: _Count
    """Lines of metrics.jsonl."""
    bytes: _Count
    """Bytes of metrics.jsonl."""
    event_bytes: _Count
    """Bytes of the events."""


class Log:
    """`metrics.jsonl` and TensorBoard events in `folder`, cut to where the run goes on.

    Every line holds `kind` (train, valid or device), `step` (updates done) and its values. A number that is not
    finite, or not known, is null.

    Args:
        step: updates done where the run goes on.
        place: what `sync` returned for its checkpoint; None where there is none, or one of an earlier version: then the
            lines of later steps are cut off.
    """

    def __init__(self, folder: Path, step: int, place: Place | None = None) -> None:
        self.notes: list[str] = []
        """What is wrong with the files that were found."""
        self._path = folder / "metrics.jsonl"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
            lines = self._kept_lines(step, place)
            self._num_lines = len(lines)
            self._file.truncate(sum(map(len, lines)))
            self._events = _Events(folder, lines, 0 if place is None else place["event_bytes"])
            if place is not None and not self._events.goes_on:
                self.notes.append(f"{self._events.path}: not what the checkpoint counts; made of metrics.jsonl again")
            sync_folder(folder)

    def _kept_lines(self, step: int, place: Place | None) -> list[bytes]:
        """The lines up to where the run goes on, damaged ones among them."""
        # what follows the last end of a line is nothing, or the half line of a lost process
        lines = [line + b"\n" for line in self._path.read_bytes().split(b"\n")[:-1]]
        read = [_read(line) for line in lines]
        if place is None:
            early = [number for number, line in enumerate(read, start=1) if line is not None and line["step"] <= step]
            count = max(early, default=0)
        else:
            ends = list(accumulate(map(len, lines), initial=0))
            # an edited line moves the bytes, a damaged end of a line the count of lines
            at_bytes = ends.index(place["bytes"]) if place["bytes"] in ends else len(lines)
            count = min(place["lines"], at_bytes)
            if count < place["lines"]:
                self.notes.append(f"{self._path}: {count} lines of the {place['lines']} that the checkpoint counts")
        damaged = [str(number) for number, line in enumerate(read[:count], start=1) if line is None]
        if damaged:
            self.notes.append(f"{self._path}: damaged and left as it is: line {first_names(damaged)}")
        return lines[:count]

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Write one line, and one event of the values that are known."""
        line: dict[str, Any] = {"kind": kind, "step": step}
        known = {name: value for name, value in values.items() if value is not None}
        line |= {name: known[name] if math.isfinite(known.get(name, math.nan)) else None for name in values}
        with writing(self._path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._events.write(kind, step, known)
        self._num_lines += 1

    def flush(self) -> None:
        """Hand everything to the operating system."""
        with writing(self._path):
            self._file.flush()
            self._events.file.flush()

    def sync(self) -> Place:
        """Wait until everything is on the disk, and return where the log ends."""
        self.flush()
        with writing(self._path):
            ends = [_synced_end(file.fileno()) for file in (self._file, self._events.file)]
        return {"lines": self._num_lines, "bytes": ends[0], "event_bytes": ends[1]}

    def close(self) -> None:
        """Flush and close both files."""
        with writing(self._path):
            try:
                self._file.close()
            finally:
                self._events.file.close()


class NoLog:
    """Takes what a `Log` takes and keeps nothing: of several processes one writes."""

    notes: Sequence[str] = ()

    def write(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Drop the line."""

    def flush(self) -> None:
        """Do nothing: nothing is kept."""

    def sync(self) -> Place | None:
        """Do nothing: nothing is kept."""
        return None

    def close(self) -> None:
        """Do nothing: nothing is open."""


class _Events:
    """TensorBoard's events in one file, cut to `num_bytes`, or made of `lines` again where it has less."""

    def __init__(self, folder: Path, lines: Sequence[bytes], num_bytes: int) -> None:
        # after the names of TensorBoard's own writer, which earlier versions used: this one's start drops what they say
        self.path = folder / "events.out.tfevents.training"
        self.goes_on = 0 < num_bytes <= (self.path.stat().st_size if self.path.exists() else 0)
        self.file = self.path.open("ab")
        self._records = RecordWriter(self.file)
        self.file.truncate(num_bytes if self.goes_on else 0)
        if self.goes_on:
            return
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=1, session_log=SessionLog(status=SessionLog.START)))
        for line in lines:
            if (values := _read(line)) is not None:
                kind, step = values.pop("kind"), values.pop("step")
                self.write(kind, step, {name: value for name, value in values.items() if value is not None})

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=scalars)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _read(line: bytes) -> dict[str, Any] | None:
    """The values of a line, or None where it is damaged: no line of `Log.write`."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        return None
    numbers = [value for name, value in values.items() if name != "kind" and value is not None]
    step, most = values.get("step"), sys.float_info.max
    is_whole = type(step) is int and 0 <= step < 1 << 63
    return values if is_whole and all(type(n) in (int, float) and -most <= n <= most for n in numbers) else None


def _synced_end(descriptor: int) -> int:
    os.fsync(descriptor)
    return os.fstat(descriptor).st_size

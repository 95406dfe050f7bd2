"""Deaths and errors at the n-th call of a kind, inside a process that runs the small job.

The calls that change files: `fsync`, `replace`, `unlink`, `create` and `mkdir` are `os`'s, `write` the content of a
file that is written whole (half of it is there when the fault comes), `page` a page of a .beton, `log` a line of
metrics.jsonl and its event, `flush` their way to the operating system.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensdistill.training import loop
from ensdistill.training.log import Log

KINDS = ("fsync", "replace", "unlink", "create", "mkdir", "write", "page", "log", "flush")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens, and when."""

    kind: str
    """One of `KINDS`."""
    number: int
    """Which call of the kind, from 1."""
    error: str | None = None
    """Name of the error number that this call and those after it raise; None: the process is killed before it."""
    after: bool = False
    """Killed after the call in place of before it."""


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


class _Refusing:
    """A file that cannot be written any more."""

    def __init__(self, file: Any, fail: Callable[[str], None]) -> None:
        self._file, self._fail = file, fail

    def write(self, _: bytes) -> None:
        self._fail("")

    def flush(self) -> None:
        self._fail("")

    def close(self) -> None:
        self._file.close()
        self._fail("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclass
class Journal:
    """What a process leaves for those who look at it after its death: `write` puts it beside the run folder."""

    calls: Counter[str] = field(default_factory=Counter)
    """Number of calls, by kind."""
    saved: dict[str, int] = field(default_factory=dict)
    """Epochs that checkpoints have said to be finished, by the name of the network's folder."""
    synced: dict[int, int] = field(default_factory=dict)
    """Bytes of files that are certainly on the disk, by inode."""
    undo: list[tuple[str, str | None]] = field(default_factory=list)
    """Names that changed since their folder was synced, and links to what they were; None where they were not there."""

    def write(self, path: Path) -> None:
        with open(path, "w") as file:  # no call that is counted
            json.dump(vars(self), file)

    @classmethod
    def read(cls, path: Path) -> Journal:
        values = json.loads(path.read_text())
        synced = {int(inode): size for inode, size in values["synced"].items()}
        undo = [(name, old) for name, old in values["undo"]]
        return cls(Counter(values["calls"]), values["saved"], synced, undo)

    def lose_what_was_not_synced(self, folder: Path) -> None:
        """Make `folder` what a lost machine may have left of it, where this process alone has written there."""
        for name, old in reversed(self.undo):
            if not Path(name).is_relative_to(folder):
                continue  # shared memory
            Path(name).unlink(missing_ok=True)
            if old is not None:
                os.link(old, name)
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_size > (size := self.synced.get(path.stat().st_ino, 0)):
                os.truncate(path, size)


def install(fault: Fault | None, journal_path: Path, links: Path) -> Callable[[], None]:
    """Let the fault happen in this process from here on.

    Args:
        fault: None counts alone.
        journal_path: file of the journal.
        links: folder for links to files whose names change, on the same file system.

    Returns: what writes the journal of a process that lives.
    """
    from ffcv.memory_allocator import MemoryAllocator

    journal = Journal()
    links.mkdir(parents=True)

    def die() -> None:
        journal.write(journal_path)
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(name: str) -> None:
        assert fault is not None and fault.error is not None
        number = getattr(errno, fault.error)
        raise OSError(number, os.strerror(number), name) if name else OSError(number, os.strerror(number))

    def counted(kind: str, function: Callable[..., Any], first: Callable[..., None] | None = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kind == "create" and not args[1] & os.O_CREAT:
                return function(*args, **kwargs)
            journal.calls[kind] += 1
            is_now = fault is not None and fault.kind == kind and journal.calls[kind] >= fault.number
            if is_now and first is not None:
                first(*args)
            if is_now and fault is not None and fault.error is not None and first is not refuse:
                fail(str(args[0]) if kind in ("replace", "unlink", "create", "mkdir") else "")
            if is_now and fault is not None and fault.error is None and not fault.after:
                die()
            if kind in ("replace", "unlink"):
                remember(Path(args[-1]))
            result = function(*args, **kwargs)
            if kind == "fsync":
                note_sync(args[0])
            if is_now and fault is not None and fault.error is None:
                die()
            return result

        return call

    def remember(path: Path) -> None:
        if path.exists():
            old = links / str(len(list(links.iterdir())))
            os.link(path, old)
            journal.undo.append((str(path), str(old)))
        else:
            journal.undo.append((str(path), None))

    def note_sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            here = os.readlink(f"/proc/self/fd/{descriptor}")
            journal.undo = [entry for entry in journal.undo if os.path.dirname(entry[0]) != here]
        else:
            journal.synced[found.st_ino] = found.st_size

    def write_half(path: Path, content: Any, *_: Any, **__: Any) -> None:
        with open(path, "w" if isinstance(content, str) else "wb") as file:
            file.write(content[: len(content) // 2])

    def refuse(log: Any, *_: Any) -> None:
        if fault is not None and fault.error is not None:
            log._file = _Refusing(log._file, fail)

    for kind, name in (("fsync", "fsync"), ("replace", "replace"), ("unlink", "unlink"), ("mkdir", "mkdir")):
        setattr(os, name, counted(kind, getattr(os, name)))
    os.open = counted("create", os.open)
    Path.write_bytes = counted("write", Path.write_bytes, write_half)  # type: ignore[method-assign]
    Path.write_text = counted("write", Path.write_text, write_half)  # type: ignore[method-assign]
    MemoryAllocator.flush_page = counted("page", MemoryAllocator.flush_page)
    Log.write = counted("log", Log.write, refuse)  # type: ignore[method-assign]
    Log.flush = counted("flush", Log.flush, refuse)  # type: ignore[method-assign]

    save = loop.save_checkpoint

    def save_and_note(path: Path, state: Any, progress: list[dict[str, Any]]) -> None:
        save(path, state, progress)
        journal.saved[path.parent.name] = progress[0]["epochs"]

    loop.save_checkpoint = save_and_note
    return lambda: journal.write(journal_path)

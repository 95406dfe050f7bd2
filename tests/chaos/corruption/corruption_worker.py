"""The process in which damaged files are read, started by `test_corruption.py`.

A process of its own, so that a signal is seen and not died of, with its memory limited to `MAX_RISE` above what it has
when a case begins. It is asked by (kind, number) and answers with a `Case`.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import corruption_data
import corruption_records
import corruption_weights
import numpy as np
from corruption import DAMAGE, Kind, SetAside, fingerprint

from ensdistill.runtime.errors import run_main

KINDS = {**corruption_data.KINDS, **corruption_weights.KINDS, **corruption_records.KINDS}
"""Every kind by name; each is made in a folder of its own when it is asked for."""
SEED = 20_260
MAX_RISE = 1 << 30
"""Bytes that reading a file may take above what the process has."""
MAX_SECONDS = 10.0
"""Seconds of a core that reading a file may take; of the clock `test_corruption.DEADLINE`, as cores are shared."""
FORGED_SHARE = 0.45
OUT_OF_MEMORY = ("allocate", "out of memory", "Cannot allocate")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one damaged input came to."""

    outcome: str
    """refused, same, other, or fault."""
    damage: str
    """What was done to which file."""
    detail: str = ""
    """The message, or what is wrong."""
    seconds: float = 0.0
    """Seconds of a core."""
    rise: int = 0
    """Bytes of memory at the peak above those at the start."""


class Campaign:
    """Inputs of every kind, in a folder, and what comes of them when they are damaged."""

    def __init__(self, root: Path, kinds: dict[str, Callable[[Path], Kind]]) -> None:
        self.root, self.makers = root, kinds
        self.kinds: dict[str, tuple[Kind, str]] = {}

    def kind(self, name: str) -> tuple[Kind, str]:
        """The kind, and the fingerprint of what its whole input gives."""
        if name not in self.kinds:
            place = self.root / "made"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            kind = self.makers[name](place)
            folder = self._written(kind, {})
            whole = judge(kind, folder, None, "nothing")
            assert whole.outcome == "same", f"{name}: the whole input: {whole}"
            self.kinds[name] = kind, whole.detail
        return self.kinds[name]

    def _written(self, kind: Kind, changed: dict[str, bytes]) -> Path:
        folder = self.root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in {**kind.files, **changed}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    def case(self, name: str, number: int) -> Case:
        """Damage the input as (kind, number) say, read it, and judge what came of it."""
        kind, whole = self.kind(name)
        rng = np.random.default_rng([SEED, zlib.crc32(name.encode()), number])
        file = kind.damaged[int(rng.integers(len(kind.damaged)))]
        is_forged = bool(kind.forged) and rng.random() < FORGED_SHARE
        some = kind.forged if is_forged else DAMAGE
        damage = some[int(rng.integers(len(some)))]
        folder = self._written(kind, {file: damage(kind.files[file], rng)})
        judged = judge(kind, folder, whole, f"{damage.__qualname__.split('.')[0]} {file}")
        if judged.outcome == "other" and kind.has_digest and not is_forged:
            return replace(judged, outcome="fault", detail="silent: other numbers, where a checksum is compared")
        return judged


def judge(kind: Kind, folder: Path, whole: str | None, damage: str) -> Case:
    """Read the input in `folder` under the roof of a command's `run_main`, and say what came of it."""
    found: list[Any] = []
    raised: list[BaseException] = []

    def main() -> None:
        try:
            found.append(kind.read(folder))
        except BaseException as error:
            raised.append(error)
            raise

    errors, begin, rise = io.StringIO(), time.process_time(), _Rise()
    case = Case(outcome="fault", damage=damage)
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("always")
            code = run_main(main)
    except SetAside as said:
        case = replace(case, outcome="refused", detail=str(said))
    except BaseException as error:
        lines = traceback.format_exception_only(error)[-1].strip()
        place = "; ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:])
        case = replace(case, detail=f"traceback: {lines[:200]} at {place}")
    else:
        if code == 0:
            value = fingerprint(found[0])
            case = replace(case, outcome="same" if value == whole or whole is None else "other", detail=value)
        else:
            case = _message(case, errors.getvalue(), folder)
    case = replace(case, seconds=time.process_time() - begin, rise=rise.bytes())
    if case.outcome != "fault" and (lack := _lacked_memory(raised)):
        case = replace(case, outcome="fault", detail=f"memory: {lack}")
    if case.seconds > MAX_SECONDS:
        case = replace(case, outcome="fault", detail=f"hang: {case.seconds:.0f} s")
    if case.rise > MAX_RISE:
        case = replace(case, outcome="fault", detail=f"memory: {case.rise >> 20} MiB")
    return case


def _message(case: Case, text: str, folder: Path) -> Case:
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return replace(case, detail=f"not one line: {text[:300]!r}")
    if str(folder.parent) not in text:
        return replace(case, detail=f"names no file: {text[:300]}")
    if len(lines[0]) > 1500:
        return replace(case, detail=f"a line of {len(lines[0])} letters: {text[:200]}")
    return replace(case, outcome="refused", detail=lines[0].replace(str(folder), "…"))


def _lacked_memory(raised: list[BaseException]) -> str:
    """Say so where an allocation failed on the way: the limit stopped it, not the program."""
    waiting, seen = list(raised), set()
    while waiting:
        error = waiting.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, MemoryError) or any(word in str(error) for word in OUT_OF_MEMORY):
            return f"{type(error).__name__}: {error}"[:200]
        waiting += [other for other in (error.__cause__, error.__context__) if other is not None]
    return ""


class _Rise:
    """Peak of the process's memory above what it is now; and a limit on its addresses for what comes."""

    def __init__(self) -> None:
        self._now = self._status("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
        resource.setrlimit(resource.RLIMIT_AS, (self._status("VmSize:") + MAX_RISE, resource.RLIM_INFINITY))

    def bytes(self) -> int:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return max(0, self._status("VmHWM:") - self._now)

    @staticmethod
    def _status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text[text.index(name) :].split()[1])


def serve(descriptor: int, root: str) -> None:
    """Answer until nobody asks any more: (kind, None) makes the kind, (kind, number) is a case."""
    os.environ["ENSDISTILL_CACHE"] = f"{root}/cache"
    connection, campaign = Connection(descriptor), Campaign(Path(root), KINDS)
    with contextlib.suppress(EOFError):
        while True:
            name, number = connection.recv()
            connection.send(campaign.kind(name)[1] if number is None else campaign.case(name, number))

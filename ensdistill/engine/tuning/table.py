"""Choices among convolutions' measured candidates, and the table of them that is kept on disk.

Triton is chosen where its best median is not above the library's: nobody gets the slower one. `tuner.py` decides what
is measured.

The file, one for each device, driver, torch and triton, holds a hash of the sources: what changed is measured again. It
also holds what failed, by key and candidate, so that what broke a device once is not tried there again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton

from ensdistill import kernels
from ensdistill.engine.launch_key import Key, NormKey
from ensdistill.engine.tuning.candidates import Candidate
from ensdistill.runtime.devices import Device
from ensdistill.runtime.environment import driver_version
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write, cache_folder, read_json, require_digest, with_digest

_FORMAT = 2
_MAX_CRASHES = 2
"""Layers at which a form of our kernels may crash before no tile of that form is tried for any other."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Time that a candidate took."""

    candidate: Candidate
    """Candidate that was timed."""
    microseconds: float
    """Median of the rounds, µs."""
    spread: float
    """Spread of the rounds: 90th less 10th percentile, µs."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Choice of who computes a convolution, with the times that decided."""

    candidate: Candidate
    """Fastest candidate."""
    measured: tuple[Measured, ...]
    """Times of all candidates, the fastest first."""
    floor_share: float | None
    """Floor of the device divided by the time of the chosen one; None where the device's rates are not known."""

    @classmethod
    def of(cls, key: Key | NormKey, measured: Sequence[Measured], device: Device | None) -> Choice:
        """Choose the candidate of the smallest median; Triton where it ties with the library."""
        ordered = sorted(measured, key=lambda one: (one.microseconds, one.candidate.provider == "library"))
        share = None if device is None else 1e6 * key.floor(device) / ordered[0].microseconds
        return cls(candidate=ordered[0].candidate, measured=tuple(ordered), floor_share=share)

    def with_more(self, key: Key | NormKey, measured: Sequence[Measured], device: Device | None) -> Choice:
        """Choose again with `measured` besides, which were timed beside this one's candidate.

        This one's times are scaled by what its candidate takes now over what it took then: the clock may be another.
        """
        now = {one.candidate: one for one in measured}
        scale = 1.0
        if self.candidate in now:
            scale = now[self.candidate].microseconds / self.measured[0].microseconds
        before = [
            replace(one, microseconds=scale * one.microseconds) for one in self.measured if one.candidate not in now
        ]
        return Choice.of(key, [*before, *measured], device)

    @classmethod
    def read(cls, stored: Any) -> Choice:
        """Read what `asdict` gave, through JSON.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """

        def candidate(fields: Any) -> Candidate:
            one = Candidate(**{**fields, "tile": tuple(fields["tile"])})
            if one.provider not in ("triton", "library") or not isinstance(one.grouped, bool):
                raise ValueError(f"provider {one.provider!r}, grouped {one.grouped!r}")
            if not all(type(n) is int and n >= 0 for n in one.tile):
                raise ValueError(f"tile {one.tile}")
            str(one)  # fails for a tile of another form
            return one

        measured = [
            Measured(
                candidate=candidate(one["candidate"]),
                microseconds=float(one["microseconds"]),
                spread=float(one["spread"]),
            )
            for one in stored["measured"]
        ]
        if not all(math.isfinite(one.microseconds) and one.microseconds > 0 for one in measured):
            raise ValueError("a time that is none")
        share = stored["floor_share"]
        read = cls(
            candidate=candidate(stored["candidate"]),
            measured=tuple(measured),
            floor_share=None if share is None else float(share),
        )
        if not measured or read.candidate != measured[0].candidate:
            raise ValueError(f"{read.candidate} is not the fastest")
        return read


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Reason why a candidate is not to be tried again."""

    reason: str
    """Reason in one line."""
    crashed: bool = False
    """True where it took its process with it or never came back; else its numbers are wrong or it does not fit."""

    @classmethod
    def read(cls, stored: Any) -> Failure:
        """Read what `asdict` gave, through JSON; raises as `Choice.read`."""
        if not isinstance(stored["reason"], str) or not isinstance(stored["crashed"], bool):
            raise TypeError("a failure's fields")
        return cls(reason=stored["reason"], crashed=stored["crashed"])


class TuningTable:
    """Choices of one device, and what failed there, kept in a file; `path` None keeps nothing."""

    def __init__(self, path: Path | None, identity: dict[str, Any], *, fresh: bool = False) -> None:
        """`identity`: what a file must say to be used. `fresh`: measure everything again, what failed too."""
        self.path, self.identity = path, {"format": _FORMAT, **identity}
        self._choices, self._failures = ({}, {}) if fresh else self._read()
        self._own: dict[str, Choice] = {}

    @classmethod
    def of_device(cls, device: torch.device, *, fresh: bool = False) -> TuningTable:
        """Open a GPU's table in `$ENSDISTILL_CACHE`, by default `ensdistill` in `$XDG_CACHE_HOME` or `~/.cache`."""
        name = torch.cuda.get_device_name(device)
        parts = (name, driver_version(), f"torch{torch.__version__}", f"triton{triton.__version__}")
        path = cache_folder() / "tuning" / ("-".join(_slug(part) for part in parts) + ".json")
        versions = {"device": name, "driver": driver_version()}
        versions |= {"torch": torch.__version__, "triton": triton.__version__}
        identity = versions | {"sources": sources_hash(), "tf32": torch.backends.cudnn.allow_tf32}
        return cls(path, identity, fresh=fresh)

    def __len__(self) -> int:
        return len(self._choices)

    def get(self, key: Key | NormKey) -> Choice | None:
        """Look up the choice for `key`; None where no candidate was measured."""
        return self._choices.get(str(key))

    def put(self, key: Key | NormKey, choice: Choice) -> None:
        """Keep a choice, here and in the file; another process's newer choices in the file stay."""
        self._choices[str(key)] = self._own[str(key)] = choice
        self._write()

    def failure(self, key: Key | NormKey, candidate: Candidate) -> Failure | None:
        """Look up why `candidate` is not to be tried for `key`: it failed, or its form crashed at other layers."""
        own = self._failures.get(str(key), {}).get(str(candidate))
        if own is not None or candidate.provider != "triton" or not isinstance(key, Key):
            return own
        crashes = [
            name
            for name, failures in self._failures.items()
            if name.startswith(f"{key.op}, ")
            and any(one.crashed and _form(text) == _form(str(candidate)) for text, one in failures.items())
        ]
        if len(crashes) < _MAX_CRASHES:
            return None
        return Failure(reason=f"its form crashed at {len(crashes)} other layers", crashed=True)

    def put_failure(self, key: Key | NormKey, candidate: Candidate, failure: Failure) -> None:
        """Remember that `candidate` is not to be tried again for `key`, here and in the file."""
        self._failures.setdefault(str(key), {})[str(candidate)] = failure
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        choices, failures = self._read(quiet=True)
        choices |= self._own
        for text, some in failures.items():
            done = {str(one.candidate) for one in choices[text].measured} if text in choices else set()
            some = {name: one for name, one in some.items() if name not in done}
            self._failures[text] = some | self._failures.get(text, {})
        stored = {
            **self.identity,
            "choices": {text: asdict(one) for text, one in sorted(choices.items())},
            "failures": {
                text: {name: asdict(one) for name, one in sorted(some.items())}
                for text, some in sorted(self._failures.items())
            },
        }
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(
                    json.dumps(with_digest(stored), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
                )
        except (UserError, OSError) as error:
            warnings.warn(f"tuning: choices are not kept: {error}", stacklevel=3)
            self.path = None

    def _read(self, quiet: bool = False) -> tuple[dict[str, Choice], dict[str, dict[str, Failure]]]:
        if self.path is None or not self.path.exists():
            return {}, {}
        try:
            stored = require_digest(read_json(self.path))
            if any(stored[name] != value for name, value in self.identity.items()):
                return {}, {}  # of other sources: measured again
            choices = {text: Choice.read(one) for text, one in stored["choices"].items()}
            failures = {
                text: {name: Failure.read(one) for name, one in some.items()}
                for text, some in stored["failures"].items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            if not quiet:
                warnings.warn(
                    f"tuning: {self.path} is not a table of ours and will be rewritten ({error!r:.200})", stacklevel=3
                )
            return {}, {}
        return choices, failures


def _form(candidate: str) -> str:
    """`triton boxes` of `triton boxes 128x64x64 4w 3s`."""
    return " ".join(candidate.split()[:2])


@functools.cache
def sources_hash() -> str:
    """Hash of all that is measured: the kernels, their definitions, and how both are timed."""
    engine = Path(__file__).parent.parent
    own = [engine / f"{name}.py" for name in ("launch_key", "tuning/candidates", "tuning/table", "tuning/measuring")]
    files = [*sorted(Path(kernels.__path__[0]).rglob("*.py")), *own]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")

"""Who computes a convolution: its candidates, the choice among those that were measured, and the table kept on disk.

Candidates are Triton's kernel with each tile that fits, and the library a member at a time and grouped. Triton is
chosen where its best median is not above the library's: nobody gets the slower one. A kernel whose result is not the
library's, up to rounding, is no candidate. `tuner.py` decides what is measured, `measuring.py` measures it.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ensdistill import kernels
from ensdistill.engine.launch_key import Key, NormKey
from ensdistill.engine.library import LibraryOperations
from ensdistill.kernels.conv import tiles
from ensdistill.kernels.conv.forward import member_conv
from ensdistill.kernels.conv.input_gradient import member_conv_input_gradient
from ensdistill.kernels.conv.weight_gradient.operation import member_conv_weight_gradient
from ensdistill.kernels.conv.weight_gradient.tiles import rows_width, weight_gradient_tiles
from ensdistill.kernels.launch import cdiv
from ensdistill.runtime.devices import Device
from ensdistill.runtime.environment import driver_version
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write, cache_folder

_FORMAT = 2
_MAX_CRASHES = 2
"""Layers at which a form of our kernels may crash before no tile of that form is tried for any other."""
# Relative, in the norm of the whole tensor: both round their results to the type, the library's epilogue once more.
_TOLERANCE = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 5e-3, "fp64": 1e-9}
_MAX_DIFFERENT_BITS = 1e-2
_TRITON: dict[str, Callable[..., Any]] = {
    "forward": member_conv,
    "input gradient": member_conv_input_gradient,
    "weight gradient": member_conv_weight_gradient,
}
_LIBRARY: dict[str, Callable[..., Any]] = {
    "forward": LibraryOperations.member_conv,
    "input gradient": LibraryOperations.member_conv_input_gradient,
    "weight gradient": LibraryOperations.member_conv_weight_gradient,
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute a convolution."""

    provider: str
    """`triton` or `library`."""
    tile: tuple[int, ...] = ()
    """Triton's tile, as the operation takes it; empty is the default of the shape."""
    grouped: bool = False
    """The library's form: one call for all members, or one a member."""

    def __str__(self) -> str:
        if self.provider == "library":
            return "library grouped" if self.grouped else "library loop"
        if not self.tile:
            return "triton"
        form, m, n, k, warps, stages, *splits = self.tile
        name = ("pointers", "boxes", "rows", "tap rows", "persistent")[form]
        return f"triton {name} {m}x{n}x{k} {warps}w {stages}s" + "".join(f" /{split}" for split in splits)

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        """Compute `key`: the operation's two tensors and its keyword arguments."""
        if self.provider == "library":
            return _LIBRARY[key.op](_GROUPED if self.grouped else _LOOP, *tensors, **options)
        return _TRITON[key.op](*tensors, **options, tile=self.tile)


_LOOP, _GROUPED = LibraryOperations(), LibraryOperations(grouped=True)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a candidate took."""

    candidate: Candidate
    """Which."""
    microseconds: float
    """Median."""
    spread: float
    """90th less 10th percentile, µs."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Who computes a convolution, and why."""

    candidate: Candidate
    """The fastest."""
    measured: tuple[Measured, ...]
    """All candidates, the fastest first."""
    floor_share: float | None
    """Floor of the device divided by the time of the chosen one; None where the device's rates are not known."""

    @classmethod
    def of(cls, key: Key | NormKey, measured: Sequence[Measured], device: Device | None) -> Choice:
        """The candidate of the smallest median; Triton where it ties with the library."""
        ordered = sorted(measured, key=lambda one: (one.microseconds, one.candidate.provider == "library"))
        share = None if device is None else 1e6 * key.floor(device) / ordered[0].microseconds
        return cls(candidate=ordered[0].candidate, measured=tuple(ordered), floor_share=share)

    def with_more(self, key: Key | NormKey, measured: Sequence[Measured], device: Device | None) -> Choice:
        """The choice when `measured` are known too, timed beside this one's candidate.

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
        """From `asdict`'s form, through JSON.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """

        def candidate(fields: Any) -> Candidate:
            one = Candidate(**{**fields, "tile": tuple(int(n) for n in fields["tile"])})
            if one.provider not in ("triton", "library"):
                raise ValueError(f"provider {one.provider!r}")
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
    """Why a candidate is not to be tried again."""

    reason: str
    """In one line."""
    crashed: bool = False
    """Whether it took its process with it or never came back; else its numbers are wrong or it does not fit."""

    @classmethod
    def read(cls, stored: Any) -> Failure:
        """From `asdict`'s form, through JSON; raises as `Choice.read`."""
        if not isinstance(stored["reason"], str) or not isinstance(stored["crashed"], bool):
            raise TypeError("a failure's fields")
        return cls(reason=stored["reason"], crashed=stored["crashed"])


def candidates(key: Key, device: torch.device) -> list[Candidate]:
    """Everything that may compute `key` on `device`."""
    shared_limit, forms = tiles.limits(device)
    if "prologue" in key.present:
        forms = tuple(form for form in forms if form != tiles.PERSISTENT)
    shape = (key.CI, key.CO, key.k, key.stride, key.torch_dtype)
    found: Sequence[Sequence[int]]
    if key.op == "forward":
        found = tiles.forward_tiles(key.M, key.B, key.OH, key.OW, *shape, shared_limit=shared_limit, forms=forms)
    elif key.op == "input gradient":
        M = 1 if key.shared else key.M
        forms = (tiles.POINTERS,) if key.shared else forms  # only pointers add members up
        found = tiles.input_gradient_tiles(M, key.B, key.H, key.W, *shape, shared_limit=shared_limit, forms=forms)
    else:
        folded = key.shared and key.M > 1  # members that read one input are columns side by side
        groups, columns = (1, key.M * key.CO) if folded else (key.M, key.CO)
        width = 0 if folded else rows_width(device, key.k, key.stride, key.W)
        pixels, rows = key.B * key.OH * key.OW, key.k**2 * key.CI
        found = weight_gradient_tiles(
            groups, pixels, rows, columns, key.torch_dtype, width=width, shared_limit=shared_limit
        )
    of_triton = [Candidate(provider="triton", tile=tuple(tile)) for tile in found]
    return [*of_triton, Candidate(provider="library"), Candidate(provider="library", grouped=True)]


def arguments(key: Key, device: torch.device, seed: int) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Random arguments of `key`'s operation: its two tensors, and its keyword arguments."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = key.torch_dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    def vector(C: int) -> Tensor:
        return normal(1 if key.shared or key.op == "weight gradient" else key.E, C, dtype=torch.float32)

    inputs = ((key.B,) if key.shared else (key.M, key.B)) + (key.H, key.W, key.CI)
    outputs = (key.M, key.B, key.OH, key.OW, key.CO)
    fan_in = key.k**2 * (key.CI if key.op == "forward" else key.CO)
    options: dict[str, Any] = {"stride": key.stride}
    present = set(key.present)
    if "prologue" in present:
        options["prologue"] = (vector(key.CI), vector(key.CI))
    if key.op == "weight gradient":
        return (normal(*inputs), normal(*outputs)), options | {"kernel": key.k}
    weights = normal(key.E, key.k, key.k, key.CI, key.CO, scale=fan_in**-0.5)
    if key.members:
        options["members"] = torch.arange(key.M, device=device) % key.E
    options["out_dtype"] = key.torch_out_dtype
    if key.op == "forward":
        options |= {name: name in present for name in ("relu", "sums")}
        options |= {"keep_y": "no y" not in present, "keep_z": "no z" not in present, "bits": key.bits}
        if "bias" in present:
            options["bias"] = vector(key.CO)
        if "residual" in present:
            options["residual"] = normal(*outputs)
        if "second" in present:
            options["second"] = (vector(key.CO), vector(key.CO))
        return (normal(*inputs), weights), options
    options |= {"size": (key.H, key.W), "shared": key.shared}
    for name in ("before", "after"):
        if name in present:
            options[name] = normal(*inputs)
    if "bits" in present:
        shape = (*inputs[:-1], cdiv(key.CI, 8))
        options["bits"] = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    if "norm" in present:
        options["norm"] = (normal(*inputs), vector(key.CI), vector(key.CI))
    if "scale" in present:
        options["scale"] = vector(key.CI)
    return (normal(*outputs), weights), options


def difference(result: Any, truth: Any, key: Key) -> str | None:
    """What is wrong with a `result`, against another implementation's; None where it is rounding alone."""
    if isinstance(truth, Tensor) or truth is None:
        result, truth = (result,), (truth,)
    for one, other in zip(result, truth, strict=True):
        if one is None and other is None:
            continue
        if one is None or other is None:
            return "another number of results"
        if one.dtype == torch.uint8:
            wrong = sum(((one ^ other) >> bit & 1).sum() for bit in range(8)) / (8 * one.numel())
            if wrong > _MAX_DIFFERENT_BITS:
                return f"{wrong:.1%} of the bits differ"
            continue
        if one.ndim == 4 and one.shape[2:] == other.shape[2:] and one.shape != other.shape:  # sums, by tiles
            one, other = one.sum(1), other.sum(1)
        error = torch.linalg.vector_norm(one.float() - other.float())
        relative = float(error / torch.linalg.vector_norm(other.float()).clamp_min(1e-30))
        if not relative <= _TOLERANCE[key.dtype]:
            return f"relative error {relative:.2g}"
    return None


class TuningTable:
    """The choices of one device, and what failed there, kept in a file; `path` None keeps nothing."""

    def __init__(self, path: Path | None, identity: dict[str, Any], *, fresh: bool = False) -> None:
        """`identity`: what a file must say to be used. `fresh`: measure everything again, what failed too."""
        self.path, self.identity = path, {"format": _FORMAT, **identity}
        self._choices, self._failures = ({}, {}) if fresh else self._read()
        self._own: dict[str, Choice] = {}

    @classmethod
    def of_device(cls, device: torch.device, *, fresh: bool = False) -> TuningTable:
        """The table of a GPU, in `$ENSDISTILL_CACHE`, by default `ensdistill` in `$XDG_CACHE_HOME` or `~/.cache`."""
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
        """The choice for `key`, if any candidate was measured."""
        return self._choices.get(str(key))

    def put(self, key: Key | NormKey, choice: Choice) -> None:
        """Keep a choice, here and in the file; another process's newer choices in the file stay."""
        self._choices[str(key)] = self._own[str(key)] = choice
        self._write()

    def failure(self, key: Key | NormKey, candidate: Candidate) -> Failure | None:
        """Why `candidate` is not to be tried for `key`: it failed there, or its form crashed at other layers."""
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
                temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except (UserError, OSError) as error:
            warnings.warn(f"tuning: choices are not kept: {error}", stacklevel=3)
            self.path = None

    def _read(self, quiet: bool = False) -> tuple[dict[str, Choice], dict[str, dict[str, Failure]]]:
        if self.path is None or not self.path.exists():
            return {}, {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if any(stored[name] != value for name, value in self.identity.items()):
                return {}, {}  # of other sources: measured again
            choices = {text: Choice.read(one) for text, one in stored["choices"].items()}
            failures = {
                text: {name: Failure.read(one) for name, one in some.items()}
                for text, some in stored["failures"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    """Hash of all that is measured: the kernels, the library path, and how the two are timed."""
    engine = Path(__file__).parent.parent
    own = [engine / f"{name}.py" for name in ("library", "launch_key", "tuning/choices", "tuning/measuring")]
    files = [*sorted(Path(kernels.__path__[0]).rglob("*.py")), *own]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")

"""Who computes a convolution: every candidate measured on the device, the fastest chosen, the choice kept on disk.

Candidates are Triton's kernel with each tile that fits, and the library a member at a time and grouped. Each is
captured in a CUDA graph that runs it over inputs which together are larger than the L2 cache, and the graphs are
replayed in turn, so that a clock that changes meets them all. Triton is chosen where its best median is not above the
library's: nobody gets the slower one. A kernel whose result is not the library's, up to rounding, is no candidate.

The file, one for each device, driver, torch and triton, holds a hash of the sources: what changed is measured again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from ensdistill import conv_key, kernels, library
from ensdistill.conv_key import Key, NormKey
from ensdistill.errors import UserError
from ensdistill.files import atomic_write
from ensdistill.kernels import tiles
from ensdistill.kernels.batch_norm_apply import batch_norm_apply
from ensdistill.kernels.launch import cdiv, recording
from ensdistill.kernels.member_conv import member_conv
from ensdistill.kernels.member_conv_input_gradient import member_conv_input_gradient
from ensdistill.kernels.member_conv_weight_gradient import member_conv_weight_gradient
from ensdistill.kernels.member_conv_weight_gradient_tiles import rows_width, weight_gradient_tiles
from ensdistill.library import LibraryOperations
from ensdistill.roofline import Device, installed_gpu

ROUNDS = 25
"""Replays of each candidate; their median counts."""
MAX_INPUTS = 32
"""Sets of inputs at most that a candidate rotates through."""
_FORMAT = 1
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
        name = ("pointers", "boxes", "rows")[form]
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
    def of(cls, key: Key, measured: Sequence[Measured], device: Device | None) -> Choice:
        """The candidate of the smallest median; Triton where it ties with the library."""
        ordered = sorted(measured, key=lambda one: (one.microseconds, one.candidate.provider == "library"))
        share = None if device is None else 1e6 * key.floor(device) / ordered[0].microseconds
        return cls(candidate=ordered[0].candidate, measured=tuple(ordered), floor_share=share)

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
        share = stored["floor_share"]
        return cls(
            candidate=candidate(stored["candidate"]),
            measured=tuple(measured),
            floor_share=None if share is None else float(share),
        )


def candidates(key: Key, device: torch.device) -> list[Candidate]:
    """Everything that may compute `key` on `device`."""
    shared_limit, forms = tiles.limits(device)
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


@torch.no_grad()
def measure(key: Key, device: torch.device, *, rounds: int = ROUNDS) -> Choice:
    """Run and time every candidate of `key` on `device`: milliseconds each, seconds where it must be compiled first.

    Raises:
        RuntimeError: not one of them runs.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _measure(key, device, rounds)


def _measure(key: Key, device: torch.device, rounds: int) -> Choice:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = min(MAX_INPUTS, max(2, cdiv(2 * cache, key.bytes)))
    inputs = [arguments(key, device, seed) for seed in range(sets)]
    found = candidates(key, device)
    if device.type == "cuda":
        _compile_together(found, key, inputs[0], device)
    truth = _LOOP_CANDIDATE.run(key, *inputs[0])
    running: dict[Candidate, Callable[[], None]] = {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for candidate in found:
        try:
            wrong = difference(candidate.run(key, *inputs[0]), truth, key)
            if wrong is None:
                running[candidate] = _repeated(candidate, key, inputs, pool)
        except (TritonError, RuntimeError, ValueError, AssertionError) as error:  # such as too much shared memory
            wrong = (str(error).splitlines() or [type(error).__name__])[0]
        if wrong is not None:
            warnings.warn(f"tuning: {candidate} is left out for {key}: {wrong}", stacklevel=2)
    if not running:
        raise RuntimeError(f"nothing computes {key}")
    clock = _device_clock if device.type == "cuda" else _host_clock
    times = clock(list(running.values()), rounds)
    measured = []
    for candidate, seconds in zip(running, times, strict=True):
        each = sorted(1e6 * second / sets for second in seconds)
        tail = len(each) // 10
        spread = each[-1 - tail] - each[tail]
        measured.append(Measured(candidate=candidate, microseconds=statistics.median(each), spread=spread))
    choice = Choice.of(key, measured, installed_gpu() if device.type == "cuda" else None)
    if device.type == "cuda":
        running.clear()
        torch.cuda.empty_cache()  # the graphs' pool
    return choice


@torch.no_grad()
def measure_norm(key: NormKey, device: torch.device, *, rounds: int = ROUNDS) -> Choice:
    """Time the pass over `key`'s activations that a convolution saves if it applies the norm where it loads them."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _measure_norm(key, device, rounds)


def _measure_norm(key: NormKey, device: torch.device, rounds: int) -> Choice:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = min(MAX_INPUTS, max(2, cdiv(2 * cache, key.bytes)))
    generator = torch.Generator(device).manual_seed(0)
    shape = (key.M, key.B, key.H, key.W, key.C)
    inputs = [torch.randn(shape, generator=generator, device=device).to(key.torch_dtype) for _ in range(sets)]
    scale, shift = torch.randn(2, 1, key.C, generator=generator, device=device)

    def run() -> None:
        kept = [batch_norm_apply(y_MBHWC, scale, shift) for y_MBHWC in inputs]
        del kept

    call, clock = run, _host_clock
    if device.type == "cuda":
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        call, clock = graph.replay, _device_clock
    each = sorted(1e6 * seconds / sets for seconds in clock([call], rounds)[0])
    tail = len(each) // 10
    measured = Measured(
        candidate=Candidate(provider="triton"),
        microseconds=statistics.median(each),
        spread=each[-1 - tail] - each[tail],
    )
    rates = installed_gpu() if device.type == "cuda" else None
    share = None if rates is None else 1e6 * key.floor(rates) / measured.microseconds
    return Choice(candidate=measured.candidate, measured=(measured,), floor_share=share)


_LOOP_CANDIDATE = Candidate(provider="library")


def _compile_together(found: Sequence[Candidate], key: Key, given: Any, device: torch.device) -> None:
    """Fill Triton's cache for all candidates, on all cores; what fails to compile fails again where it is run."""

    def compile_only(kernel: Any, grid: tuple[int, ...], args: Any, options: Any) -> None:
        kernel.warmup(*args, grid=grid, **options)

    cores = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with cores, triton.AsyncCompileMode(cores, ignore_errors=True), recording(compile_only), torch.cuda.device(device):
        for candidate in found:
            if candidate.provider == "triton":
                candidate.run(key, *given)


def _repeated(candidate: Candidate, key: Key, inputs: Sequence[Any], pool: Any) -> Callable[[], None]:
    """One call over all inputs, as a graph on CUDA. Its outputs have places of their own while it runs."""

    def run() -> None:
        kept = [candidate.run(key, *each) for each in inputs]
        del kept

    if pool is None:
        return run
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # by hand: torch.cuda.graph() empties caches, each time
        candidate.run(key, *inputs[0])
        torch.cuda.synchronize()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    return graph.replay


def _device_clock(calls: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each call and round, taken in turn. Nothing waits in between: the device never idles before a call."""
    for call in calls:
        call()
    events = [[(_event(), _event()) for _ in range(rounds)] for _ in calls]
    for i in range(rounds):
        for call, pairs in zip(calls, events, strict=True):
            pairs[i][0].record()
            call()
            pairs[i][1].record()
    torch.cuda.synchronize()
    return [[1e-3 * start.elapsed_time(end) for start, end in pairs] for pairs in events]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _host_clock(calls: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return times


class TuningTable:
    """The choices of one device, kept in a file; `path` None keeps nothing."""

    def __init__(self, path: Path | None, identity: dict[str, Any], *, fresh: bool = False) -> None:
        """`identity`: what a file must say to be used. `fresh`: measure everything again."""
        self.path, self.identity = path, {"format": _FORMAT, **identity}
        self._choices: dict[str, Choice] = {} if fresh else self._read()
        self._own: dict[str, Choice] = {}

    @classmethod
    def of_device(cls, device: torch.device, *, fresh: bool = False) -> TuningTable:
        """The table of a GPU, in `$ENSDISTILL_CACHE`, by default `ensdistill` in `$XDG_CACHE_HOME` or `~/.cache`."""
        name = torch.cuda.get_device_name(device)
        parts = (name, _driver(), f"torch{torch.__version__}", f"triton{triton.__version__}")
        path = cache_folder() / "tuning" / ("-".join(_slug(part) for part in parts) + ".json")
        versions = {"device": name, "driver": _driver(), "torch": torch.__version__, "triton": triton.__version__}
        identity = versions | {"sources": sources_hash(), "tf32": torch.backends.cudnn.allow_tf32}
        return cls(path, identity, fresh=fresh)

    def __len__(self) -> int:
        return len(self._choices)

    def get(self, key: Key | NormKey) -> Choice | None:
        """The choice for `key`, if it was made."""
        return self._choices.get(str(key))

    def put(self, key: Key | NormKey, choice: Choice) -> None:
        """Keep a choice, here and in the file; another process's newer choices in the file stay."""
        self._choices[str(key)] = self._own[str(key)] = choice
        if self.path is None:
            return
        merged = self._read(quiet=True) | self._own
        stored = {**self.identity, "choices": {text: asdict(one) for text, one in sorted(merged.items())}}
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except (UserError, OSError) as error:
            warnings.warn(f"tuning: choices are not kept: {error}", stacklevel=2)
            self.path = None

    def _read(self, quiet: bool = False) -> dict[str, Choice]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            if any(stored[name] != value for name, value in self.identity.items()):
                return {}  # of other sources: measured again
            return {text: Choice.read(one) for text, one in stored["choices"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not quiet:
                warnings.warn(
                    f"tuning: {self.path} is not a table of ours and will be rewritten ({error!r})", stacklevel=3
                )
            return {}


def cache_folder() -> Path:
    """Where this package keeps what it can make again."""
    if own := os.environ.get("ENSDISTILL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "ensdistill"


@functools.cache
def sources_hash() -> str:
    """Of all that is measured: the kernels, the library path, and how the two are timed."""
    files = [*sorted(Path(kernels.__path__[0]).glob("*.py")), Path(library.__file__), Path(conv_key.__file__)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in [*files, Path(__file__)])).hexdigest()[:16]


@functools.cache
def _driver() -> str:
    """The driver's version; where the system does not tell it, that of the CUDA which it brings."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    version: Any = torch._C
    return found[1] if found else f"cuda{version._cuda_getDriverVersion()}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")

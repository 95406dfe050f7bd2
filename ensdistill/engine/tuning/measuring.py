"""Timing candidates of a convolution on the device, in the process that calls.

Each candidate is captured in a CUDA graph that runs it over inputs which together are larger than the L2 cache, and the
graphs are replayed in turn, so that a clock that changes meets them all. One whose result is not the library's, up to
rounding, is not timed. A candidate may take the process with it: `tuner.Tuner` calls this in a process of its own.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.errors import TritonError

from ensdistill.engine.launch_key import Key, NormKey
from ensdistill.engine.tuning import choices as tuning
from ensdistill.engine.tuning.choices import Candidate, Measured, arguments
from ensdistill.kernels.launch import cdiv, recording
from ensdistill.kernels.norm.apply import batch_norm_apply
from ensdistill.runtime.timing import capture, seconds_in_turns

ROUNDS = 25
"""Replays of each candidate; their median counts."""
MAX_INPUTS = 32
"""Sets of inputs at most that a candidate rotates through."""
COMPILE_SECONDS, RUN_SECONDS = 600.0, 60.0
"""What a phase may take before its process counts as hung: one that compiles, and one that only runs."""
_LIBRARY = Candidate(provider="library")

Announce = Callable[[Candidate | None, float], None]
"""Called before a phase: the candidate that alone runs in it (None: several), and the seconds that it may take."""


@dataclass(kw_only=True)
class Outcome:
    """What came of measuring candidates of a key; one that is neither measured nor rejected did not fit in memory."""

    measured: list[Measured] = field(default_factory=list)
    """Those that are right, in no order."""
    rejected: dict[Candidate, str] = field(default_factory=dict)
    """Those that do not compile, do not fit the device or are wrong, and why."""


class DeviceLost(Exception):
    """A candidate left the device unusable for this process."""

    def __init__(self, candidate: Candidate, reason: str) -> None:
        super().__init__(reason)
        self.candidate, self.reason = candidate, reason


@torch.no_grad()
def measure(
    key: Key | NormKey,
    found: Sequence[Candidate],
    device: torch.device,
    *,
    rounds: int = ROUNDS,
    alone: bool = False,
    announce: Announce = lambda candidate, seconds: None,
) -> Outcome:
    """Verify and time the candidates `found` of `key` on `device`: milliseconds each, more where something compiles.

    Args:
        alone: compile and time each by itself, so that every phase has one candidate that may be blamed.

    Raises:
        DeviceLost: a candidate broke the device's context.
        torch.OutOfMemoryError: the inputs do not fit.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        outcome = Outcome()
        if isinstance(key, NormKey):
            announce(None, COMPILE_SECONDS)
            outcome.measured = _times({found[0]: _norm_call(key, device)}, _num_sets(key, device), device, rounds)
        else:
            _measure(key, found, device, rounds, alone, announce, outcome)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the graphs' pool
        return outcome


def _measure(
    key: Key,
    found: Sequence[Candidate],
    device: torch.device,
    rounds: int,
    alone: bool,
    announce: Announce,
    outcome: Outcome,
) -> None:
    is_gpu = device.type == "cuda"
    announce(None, COMPILE_SECONDS)
    inputs = [arguments(key, device, seed) for seed in range(_num_sets(key, device))]
    with torch.compiler.set_stance("force_eager"):  # compiling the library's epilogue takes seconds
        truth = _LIBRARY.run(key, *inputs[0])
    if is_gpu and not alone:
        announce(None, COMPILE_SECONDS)
        _compile_together(found, key, inputs[0], device)
    calls: dict[Candidate, Callable[[], object]] = {}
    pool = torch.cuda.graph_pool_handle() if is_gpu else None
    # A pool whose graphs are all gone, as after a capture that failed, takes no other: this one stays.
    keeper = _captured(lambda: torch.zeros(1, device=device), pool) if is_gpu else None
    for candidate in found:
        compiles = alone or candidate.provider == "library"
        announce(candidate, COMPILE_SECONDS if compiles else RUN_SECONDS)
        try:
            wrong = tuning.difference(candidate.run(key, *inputs[0]), truth, key)
            if wrong is None:
                calls[candidate] = _repeated(candidate, key, inputs, pool)
                calls[candidate]()
                if is_gpu:
                    torch.cuda.synchronize()
                if alone:
                    outcome.measured += _times({candidate: calls.pop(candidate)}, len(inputs), device, rounds)
        except torch.OutOfMemoryError:
            calls.pop(candidate, None)
            continue
        except (TritonError, RuntimeError, ValueError, AssertionError) as error:  # such as too much shared memory
            calls.pop(candidate, None)
            wrong = (str(error).splitlines() or [type(error).__name__])[0]
            if "out of memory" in wrong:  # of the driver's own
                continue
            if is_gpu and not _works(device):
                raise DeviceLost(candidate, wrong) from error
        if wrong is not None:
            outcome.rejected[candidate] = wrong
    if calls:
        announce(None, RUN_SECONDS)
        outcome.measured += _times(calls, len(inputs), device, rounds)
    del keeper


def _num_sets(key: Key | NormKey, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(MAX_INPUTS, max(2, cdiv(2 * cache, key.bytes)))


def _works(device: torch.device) -> bool:
    """Whether the device still computes: an illegal access, unlike a refused launch, is for good."""
    try:
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _times(
    calls: dict[Candidate, Callable[[], object]], sets: int, device: torch.device, rounds: int
) -> list[Measured]:
    measured = []
    for candidate, seconds in zip(calls, seconds_in_turns(list(calls.values()), device, rounds), strict=True):
        each = sorted(1e6 * second / sets for second in seconds)
        tail = len(each) // 10
        spread = each[-1 - tail] - each[tail]
        measured.append(Measured(candidate=candidate, microseconds=statistics.median(each), spread=spread))
    return measured


def _norm_call(key: NormKey, device: torch.device) -> Callable[[], object]:
    """The pass over `key`'s activations that a convolution saves if it applies the norm where it loads them."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (key.M, key.B, key.H, key.W, key.C)
    inputs = [
        torch.randn(shape, generator=generator, device=device).to(key.torch_dtype)
        for _ in range(_num_sets(key, device))
    ]
    scale, shift = torch.randn(2, 1, key.C, generator=generator, device=device)

    def run() -> None:
        kept = [batch_norm_apply(y_MBHWC, scale, shift) for y_MBHWC in inputs]
        del kept

    return run if device.type != "cuda" else _captured(run, torch.cuda.graph_pool_handle())


def _compile_together(found: Sequence[Candidate], key: Key, given: Any, device: torch.device) -> None:
    """Fill Triton's cache for all candidates, on all cores; what fails to compile fails again where it is run."""

    def compile_only(kernel: Any, grid: tuple[int, ...], args: Any, options: Any) -> None:
        kernel.warmup(*args, grid=grid, **options)

    cores = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    with cores, triton.AsyncCompileMode(cores, ignore_errors=True), recording(compile_only), torch.cuda.device(device):
        for candidate in found:
            if candidate.provider == "triton":
                candidate.run(key, *given)


def _repeated(candidate: Candidate, key: Key, inputs: Sequence[Any], pool: Any) -> Callable[[], object]:
    """One call over all inputs, as a graph on CUDA. Its outputs have places of their own while it runs."""

    def run() -> None:
        kept = [candidate.run(key, *each) for each in inputs]
        del kept

    return run if pool is None else _captured(run, pool, lambda: candidate.run(key, *inputs[0]))


def _captured(
    run: Callable[[], object], pool: Any, warm_up: Callable[[], object] | None = None
) -> Callable[[], object]:
    """Capture `run` as a graph, after one call of `warm_up` (default: of itself)."""
    return capture(run, warm_up=warm_up or run, pool=pool, empty_cache=False)

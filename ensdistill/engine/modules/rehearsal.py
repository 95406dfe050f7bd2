"""Trial steps: what a few steps change, how far another way of computing them is from that, and what else they leave.

A step by modules of anybody's may do what a replay or a compiled pass does not repeat: draw on the host, count in
Python, put a new tensor in the place of an old one. So a way to compute it counts only where it gives what the step
itself gives, from the same state, on the same batch and the same draws; and `Attributes` and the host's generators are
looked at for what a few steps need not show.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ensdistill.engine.networks import Networks
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.ranks import Ranks
from ensdistill.runtime.timing import clock

Compiling = Literal["auto", "yes", "no"]
"""Whether torch.compile computes what modules do; auto: if the run ends sooner."""

STEPS = 3
"""Steps that are compared: with draws, members and a learning rate of their own each."""
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest distance, as `Ran.distance` has it, that another order of floating-point sums explains."""
_SHARE = 1e-3
"""Tensors that change by less than this share of the others' change are measured by that: they may be rounding alone,
as the bias before a norm is."""
_START_SECONDS, _LAYER_SECONDS = 10.0, 0.25
"""Seconds that compiling takes at least: to begin with, and for every layer of student and teachers."""
_SAVED = 0.5
"""Share of a step's time that compiling saves at most, as far as was seen: what decides whether it is tried."""
_ROUNDS = 3
"""Rounds of steps that are timed; the best counts."""
_FASTER = 0.97
"""Share of a step's time below which compiled is faster, and not by chance."""
_ROUNDING = 1e-4
"""Share of a tensor itself, too, by which its change is measured: an update may be smaller than its rounding."""


@dataclass(frozen=True)
class Ran:
    """Outcome of some steps: their measures, and tensors, in groups of a kind, as the steps left them."""

    measures: list[float]
    after: list[list[Tensor]]
    scale: list[list[float]]
    """By what distances from `after` are divided."""

    @classmethod
    def of(
        cls, measures: Sequence[float], groups: Sequence[Sequence[Tensor]], before: Sequence[Sequence[Tensor]]
    ) -> Ran:
        """Keep what the steps made of `before`."""
        after = [[tensor.detach().clone() for tensor in group] for group in groups]
        scales = []
        for now, then in zip(after, before, strict=True):
            changes, sizes = _norms(_gaps(now, then)), _norms(now)
            count = sum(tensor.numel() for tensor in now)
            whole = sum(change**2 for change in changes) ** 0.5
            shares = [_SHARE * whole * (tensor.numel() / count) ** 0.5 for tensor in now]
            both = zip(changes, shares, sizes, strict=True)
            scales.append([max(change, share) + _ROUNDING * size for change, share, size in both])
        return cls(list(measures), after, scales)

    def distance(self, measures: Sequence[float], groups: Sequence[Sequence[Tensor]]) -> float:
        """Largest distance of a measure, relative to it, or a tensor, to its change; infinite for what is no number."""
        worst = 0.0
        for right, found in zip(self.measures, measures, strict=True):
            worst = _larger(worst, abs(found - right) / max(abs(right), 1e-6))
        for expected, group, scales in zip(self.after, groups, self.scale, strict=True):
            for gap, scale in zip(_norms(_gaps(group, expected)), scales, strict=True):
                worst = _larger(worst, 0.0 if gap == 0 else gap / scale if scale else float("inf"))
        return worst


def _gaps(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Iterator[Tensor]:
    for a, b in zip(found, expected, strict=True):  # one at a time: all would be a second set of them
        yield a.detach().double() - b.double()


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    norms = [torch.linalg.vector_norm(tensor.detach().double()) for tensor in tensors]
    return torch.stack(norms).tolist() if norms else []


def _larger(a: float, b: float) -> float:
    return max(a, b) if b == b else float("inf")


class Attributes:
    """What modules keep in attributes of Python's: values, containers, and tensors, which a graph must not outlive."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [
            (f"{type(root).__name__}.{name}" if name else type(root).__name__, module, _kept(module))
            for root in modules
            for name, module in root.named_modules()
        ]

    def changed(self) -> str | None:
        """Name an attribute that is not what it was; None where there is none."""
        for name, module, kept in self._kept:
            now = _kept(module)
            for key in kept.keys() | now.keys():
                if key not in kept or key not in now or not _same(kept[key], now[key]):
                    return f"{name}.{key}"
        return None

    def restore(self) -> None:
        """Give every module its attributes back."""
        for _, module, kept in self._kept:
            for key in _kept(module).keys() - kept.keys():
                delattr(module, key)
            for key, value in kept.items():
                if key in module._buffers:
                    module._buffers[key] = value
                else:
                    vars(module)[key] = value


def _kept(module: nn.Module) -> dict[str, Any]:
    """Attributes and buffers of `module`; containers are copied, for they change in place."""
    own = {key: value for key, value in vars(module).items() if key not in _REGISTRIES}
    own = {
        key: copy.copy(value) if isinstance(value, list | dict | set | deque) else value for key, value in own.items()
    }
    return own | dict(module._buffers)


_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool | int | float | complex | str | bytes | set | torch.dtype | torch.device) and bool(a == b)


def _host_states(device: torch.device) -> list[Any]:
    """States of the host's generators; on a CPU PyTorch's own is the device's."""
    kind, keys, *position = np.random.get_state(legacy=True)
    torchs = [] if device.type == "cpu" else torch.get_rng_state().tolist()
    return [random.getstate(), kind, keys.tolist(), position, torchs]  # type: ignore[union-attr]


class Steps(Protocol):
    """Runs steps of a training, and puts back what they changed."""

    device: torch.device
    state: Any

    def fill(self) -> None:
        """Let the inputs have a batch, before any epoch."""

    def seed(self) -> None:
        """Set the generators that the modules of the next step draw from."""

    def launch(self) -> None:
        """Run a step launch by launch."""

    def advance(self) -> None:
        """Run a step, replayed where it is captured."""

    def capture(self, graph: Any) -> str | None:
        """Capture the step, or say why it cannot be."""

    def close(self) -> None:
        """Let go of the graph, and launch steps one by one."""

    def measured(self) -> list[float]:
        """Losses of the step before."""

    def leaving_no_trace(self) -> AbstractContextManager[list[Tensor]]:
        """Put back what steps inside change: gives the tensors of `state` as they were."""


@dataclass(frozen=True)
class _Way:
    """A way to compute the step that gave what the step itself gives."""

    compiled: bool
    captured: bool
    seconds: float
    not_captured: str | None = None
    """Why not, where it was tried."""


class _Unlike(RuntimeError):
    """Raised where a way cannot be taken, or gives other numbers than the step itself."""


class Trial:
    """Choice of the way in which a step that asks modules is computed: captured, compiled, or as it is.

    Calling it makes the choice, sets `steps` and `networks` up for it and returns it in words. `graph`: captures; None:
    steps are launched one by one.
    """

    def __init__(self, steps: Steps, networks: Networks, shown: str, graph: Any, compiling: Compiling) -> None:
        self.steps, self.networks, self.shown = steps, networks, shown
        self.compiling: Compiling = compiling
        self.compiled = self.captured = False
        """What was chosen."""
        self.facts: dict[str, Any] = {}
        """What it was chosen by: reasons, and seconds a step."""
        self.is_needed = graph is not None or compiling != "no"
        """True where there may be another way than the step itself."""
        self._graph = graph
        self._right: Ran | None = None
        self._held: Attributes | None = None
        self._tolerance = TOLERANCE[networks.precision]

    def __call__(self, steps_left: int) -> str:
        """Choose.

        Raises:
            UserError: compiling is asked for, and cannot be.
        """
        not_captured = None if self._graph is None else self.networks.why_not_captured(self.shown)
        not_compiled = None if self.compiling == "no" else self._why_not_compiled()
        self._require(not_compiled)
        if (self._graph is not None and not_captured is None) or (self.compiling != "no" and not_compiled is None):
            try:
                not_captured, not_compiled = self._tried(not_captured, not_compiled, steps_left)
            except torch.OutOfMemoryError:
                if self._ranks.size > 1:  # others wait for this one's decisions
                    raise
                why = "the trial, which keeps every parameter twice more, has no room on the device"
                self._require(why)
                self._as_it_is()
                not_captured, not_compiled = not_captured or why, not_compiled or why
        words = []
        if self._graph is not None:
            words.append(_said("captured as one CUDA graph", self.captured, not_captured))
            self.facts["not_captured"] = not_captured
        if self.compiling != "no":
            words.append(_said("compiled by torch.compile", self.compiled, not_compiled))
            self.facts["not_compiled"] = not_compiled
        self._right = None
        self._graph = None  # which is the steps' to let go of
        return f"PyTorch's modules compute a part of the step, which is {' and '.join(words)}"

    def _tried(
        self, not_captured: str | None, not_compiled: str | None, steps_left: int
    ) -> tuple[str | None, str | None]:
        unsound = self._run_as_it_is()
        self._require(unsound)
        if unsound is None:
            return self._choose(not_captured, not_compiled, steps_left)
        return not_captured or unsound, not_compiled or unsound

    def _as_it_is(self) -> None:
        """Set up the step itself, and free what a trial held."""
        self.steps.close()
        self.networks.passes.choose(on_device=False, compiled=False)
        self.compiled = self.captured = False
        self._right = self._held = None
        if self.steps.device.type == "cuda":
            torch.cuda.empty_cache()

    def _require(self, not_compiled: str | None) -> None:
        if not_compiled is not None and self.compiling == "yes":
            raise UserError(f"compile: yes, but the step cannot be compiled: {not_compiled}; give --compile no")

    def _why_not_compiled(self) -> str | None:
        if self.compiling == "auto" and self._ranks.size > 1:
            return "of several processes one alone might fail to; --compile yes compiles there"
        return self.networks.why_not_compiled()

    def _run_as_it_is(self) -> str | None:
        """Run the step itself, twice; say why no other way can be like it, if so."""
        self.steps.fill()
        first = Attributes(self._modules)
        with self.steps.leaving_no_trace() as before:
            self._right = Ran.of(self._measures(), self._groups(self.steps.state.tensors()), self._groups(before))
        settled = Attributes(self._modules)
        noise = self._distance()
        self.facts["repeated_within"] = noise
        draws_on_host = self._draws_on_host()  # asked by all processes, whose steps wait for each other
        why = None
        if (name := settled.changed()) is not None:
            first.restore()
            why = f"{name} changes from step to step"
        elif not noise <= self._tolerance:
            why = f"the same steps, done twice, differ by {noise:.0e}"
        elif draws_on_host:
            why = "its modules draw from NumPy's, Python's or the host's generator"
        self._held = settled  # a graph reads these tensors, whatever modules put in their place
        return self._agreed(why)

    def _choose(
        self, not_captured: str | None, not_compiled: str | None, steps_left: int
    ) -> tuple[str | None, str | None]:
        """Take the fastest way that is sound, and say what was not."""
        plain = None if self.compiling == "yes" else self._way(not_captured, compiled=False)
        compiled = None
        if plain is not None and self.compiling == "auto" and not_compiled is None:
            not_compiled = self._too_short(plain.seconds, steps_left)
        tries = self.compiling != "no" and not_compiled is None
        if tries:
            try:
                compiled = self._way(not_captured, compiled=True)
            except _Unlike as error:
                not_compiled = str(error)
                self._require(not_compiled)
        if plain is None or (compiled is not None and compiled.seconds < _FASTER * plain.seconds):
            assert compiled is not None, "one of the two was tried"
            chosen = compiled
        else:
            if compiled is not None:
                not_compiled = f"{_ms(compiled.seconds)} a step are not less than {_ms(plain.seconds)}"
            chosen = self._way(not_captured, compiled=False) if tries else plain  # what was tried has undone it
        self.compiled, self.captured = chosen.compiled, chosen.captured
        return chosen.not_captured, not_compiled

    def _way(self, not_captured: str | None, *, compiled: bool) -> _Way:
        """Set steps and networks up for a way; capture it unless `not_captured` says why not.

        Raises:
            _Unlike: it cannot be compiled.
        """
        captures = self._graph is not None and not_captured is None
        self.steps.close()
        self.networks.passes.choose(on_device=captures, compiled=compiled)
        if compiled:
            self._compile()
        if captures:
            not_captured = self._agreed(self.steps.capture(self._graph))
            if not_captured is None and not (distance := self._distance()) <= self._tolerance:
                not_captured = f"captured steps differ from the step itself by {distance:.0e}"
            not_captured = self._agreed(not_captured)
            if not_captured is not None:
                self.steps.close()
                captures = False
                if not compiled:
                    self.networks.passes.choose(on_device=False, compiled=False)
            else:
                self.facts["captured_within"] = distance
        seconds = self._seconds() if self.compiling == "auto" else 0.0
        if self.compiling == "auto":
            self.facts.setdefault("compiled_seconds" if compiled else "seconds", seconds)
        return _Way(compiled, captures, seconds, not_captured)

    def _compile(self) -> None:
        start = clock(self.steps.device)
        try:
            distance = self._distance()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's own errors have no common kind
            self.networks.passes.choose(on_device=False, compiled=False)
            text = next((line for line in str(error).splitlines() if line.strip()), "")
            raise _Unlike(f"torch.compile failed ({type(error).__name__}: {text[:200].strip()})") from error
        self.facts |= {"compiling_seconds": clock(self.steps.device) - start, "compiled_within": distance}
        if not distance <= self._tolerance:
            self.networks.passes.choose(on_device=False, compiled=False)
            raise _Unlike(f"compiled steps differ from the step itself by {distance:.0e}")

    def _too_short(self, seconds: float, steps_left: int) -> str | None:
        """Say that compiling cannot pay in the steps that are left, if so."""
        student, *teachers = self._modules
        if self.networks.passes.why_host() is None:  # those that are alike are compiled once
            teachers = teachers[:1]
        layers = sum(not list(module.children()) for root in (student, *teachers) for module in root.modules())
        compiling = _START_SECONDS + _LAYER_SECONDS * layers
        if _SAVED * seconds * steps_left > compiling:
            return None
        return f"{steps_left} steps of {_ms(seconds)} are too few for the {compiling:.0f} s or more that it takes"

    def _seconds(self) -> float:
        """Seconds a step, the best of some rounds."""
        rounds = []
        for _ in range(_ROUNDS):
            with self.steps.leaving_no_trace():
                start = clock(self.steps.device)
                for _ in range(STEPS):
                    self.steps.advance()
                rounds.append((clock(self.steps.device) - start) / STEPS)
        best = min(rounds)
        return float(self._ranks.first(lambda: best))

    def _distance(self) -> float:
        """Run the steps as they are computed now: how far from the step itself they come."""
        assert self._right is not None, "_run_as_it_is comes first"
        with self.steps.leaving_no_trace():
            return self._right.distance(self._measures(), self._groups(self.steps.state.tensors()))

    def _measures(self) -> list[float]:
        measures = []
        for _ in range(STEPS):
            self.steps.advance()
            measures += self.steps.measured()
        return measures

    def _draws_on_host(self) -> bool:
        """Say whether modules draw from a generator of the host's, whose numbers a graph would repeat."""
        with self.steps.leaving_no_trace():
            self.steps.launch()
            after = _host_states(self.steps.device)
            self.steps.state.step -= 1
            self.steps.seed()
            return not _same(after, _host_states(self.steps.device))

    def _agreed(self, why: str | None) -> str | None:
        """Give the reason; where another process has one, that there is one."""
        return (why or "another process cannot") if self._ranks.any(why is not None) else None

    @property
    def _ranks(self) -> Ranks:
        return self.steps.state.ranks

    @property
    def _modules(self) -> list[nn.Module]:
        """The student and the teachers."""
        teachers = [] if self.networks.teachers is None else list(self.networks.teachers.classifiers)
        return [self.networks.student, *teachers]

    def _groups(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Parameters, buffers and moments apart: what they change by is of one size in each."""
        student = self.networks.student
        first, second = len(list(student.parameters())), len(list(student.buffers()))
        return [list(tensors[:first]), list(tensors[first : first + second]), list(tensors[first + second :])]


def _said(what: str, done: bool, why_not: str | None) -> str:
    return what if done or why_not is None else f"not {what}, for {why_not}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"

"""The steps of a training, one after another: launch by launch, or each the replay of one captured CUDA graph.

    images, labels = inputs.batch(step)              where the feed has put them
    measures = train_step(…, lr = rates[step])       draws keyed by (seed, step), read on the device
    record[step mod rows] = measures;  step ← step + 1

Both ways run this one function; a graph saves the host's part of some thousand launches. It is captured once, before
the first step: the warm-up that a capture needs leaves no trace in parameters, moments, statistics or counters. What
the steps measured is read behind them, not between: `mark` queues the copy, and `Mark.read` waits for it later.

A step that asks modules of anybody's is tried first (engine/modules/rehearsal.py): a few steps as they are, twice, then
captured and compiled, from the same state on the same draws. What gives other numbers is not kept.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ensdistill.data.inputs import Inputs, Ready
from ensdistill.engine.modules.rehearsal import Compiling, Trial
from ensdistill.kernels import launch
from ensdistill.kernels.loss.record import record
from ensdistill.kernels.philox import counter_of
from ensdistill.training.module_draws import seed_modules
from ensdistill.training.step import State, StepConfig, measure_names, train_step

_WARM_UPS = 3  # the first compiles and measures, the second runs what was chosen, the third finds nothing new


class Graph(Protocol):
    """Work that is recorded once and repeated with the same tensors: what they hold then counts, not what they held."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record `work`. It may be run some times before, and need not be run while it is recorded."""

    def replay(self) -> None:
        """Repeat the recorded work."""


class CudaGraph:
    """A CUDA graph on `device`, with memory of its own.

    `collectives`: other threads may call CUDA meanwhile, as NCCL's watchdog does; otherwise a capture fails if they do.
    """

    def __init__(self, device: torch.device, *, collectives: bool = False) -> None:
        self.device = device
        self._errors = "thread_local" if collectives else "global"
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, work: Callable[[], None]) -> None:
        """Warm up and record `work`.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        stream = torch.cuda.Stream(self.device, priority=-1)  # what runs beside it fills its gaps
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self._graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[stream.device_index]
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    work()
                gc.collect()  # an earlier graph in a cycle must not be destroyed in the middle of this one
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode=self._errors):
                    work()
        except RuntimeError:
            self._graph = None
            # it would still count what is drawn as the graph's, and refuse to draw for anybody else
            generator.graphsafe_set_state(generator.clone_state())
            raise
        finally:
            torch.cuda.synchronize(self.device)

    def replay(self) -> None:
        """Replay what was captured."""
        assert self._graph is not None, "nothing was captured"
        self._graph.replay()


@dataclass(frozen=True)
class _Timing:
    """CUDA events around one step."""

    ready: Ready
    start: torch.cuda.Event
    end: torch.cuda.Event


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measures of some steps."""

    rows: list[list[dict[str, float]]]
    """The measures of each step and network, and `step` and `lr`."""
    waited: float
    """Seconds that the steps waited for data: on a GPU, from the end of a step to the arrival of the next batch."""
    busy: float | None
    """Seconds in which captured steps ran; None where steps are not captured."""


class Mark:
    """The measures of the steps up to here, on their way to the host."""

    def __init__(
        self,
        record: Tensor,
        names: Sequence[str],
        rows: Sequence[tuple[int, float]],
        timings: Sequence[_Timing],
        before: torch.cuda.Event | None,
        waited: float,
        captured: bool,
    ) -> None:
        on_gpu = record.is_cuda
        self._table = torch.empty(record.shape, dtype=record.dtype, pin_memory=on_gpu)
        self._table.copy_(record, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(record.device))
        self._names, self._rows, self._timings, self._before = names, rows, timings, before
        self._waited, self._captured = waited, captured

    def read(self) -> Measured:
        """Wait for the measures to arrive, and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        table = self._table.tolist()
        rows = [
            [{"step": step, "lr": lr} | dict(zip(self._names, row, strict=True)) for row in table[step % len(table)]]
            for step, lr in self._rows
        ]
        waited, busy, before = self._waited, 0.0, self._before
        for timing in self._timings:
            busy += timing.start.elapsed_time(timing.end) / 1e3
            if before is not None and timing.ready is not None:
                waited += max(0.0, before.elapsed_time(timing.ready) / 1e3)
            before = timing.end
        return Measured(rows=rows, waited=waited, busy=busy if self._captured else None)


class Stepper:
    """Advances `state` by one step a call.

    Args:
        inputs: where the step finds its batch.
        rates: the learning rate of every step of the run.
        rows: steps, at most, between two marks.
        graph: captures the step where the networks allow it; None runs it launch by launch.
        compiling: whether torch.compile computes what modules do: yes, no, or auto, if the run ends sooner.
        function: what a step does, as `train_step`, which it is by default.
        networks: that train together; each has measures of its own.
    """

    def __init__(
        self,
        state: State,
        config: StepConfig,
        *,
        inputs: Inputs,
        rates: Sequence[float],
        device: torch.device,
        rows: int,
        graph: Graph | None = None,
        compiling: Compiling = "no",
        function: Callable[..., dict[str, Tensor]] = train_step,
        networks: int = 1,
    ) -> None:
        self.state, self.config, self.inputs, self.device = state, config, inputs, device
        self.function = function
        self.note: str | None = None
        """Reason that steps which could be captured are not, or not as they should; None where there is none."""
        self._rates = rates
        # the last one repeated: what warms up for a capture may run past the last step
        after = [rates[-1]] * (_WARM_UPS + 1)
        self._rates_T = torch.tensor([*rates, *after], dtype=torch.float64, device=device)
        self._names = measure_names(config.method)
        self._record = torch.zeros((rows, networks, len(self._names)), dtype=torch.float64, device=device)
        self._counter = torch.zeros(3, dtype=torch.int64, device=device)
        self.asks_modules = state.networks.asks_modules(config.method.shown)
        self._graph = None if self.asks_modules else graph
        self.trial = Trial(self, state.networks, config.method.shown, graph, compiling) if self.asks_modules else None
        """How the modules came to be computed as they are; None where none are asked."""
        self._timings: list[_Timing] = []
        self._last_end: torch.cuda.Event | None = None
        self._waited = 0.0
        self._marked = state.step

    @property
    def is_captured(self) -> bool:
        """True where steps are replays of a graph."""
        return self._graph is not None

    def prepare(self, first_row: int) -> None:
        """Set the device's counters to where `state` stands and capture. Before any thread of the feed begins.

        Args:
            first_row: the global row of this process's first image.
        """
        self.first_row = first_row
        self._counter.copy_(counter_of(self.config.seed, self.state.step, first_row, self.device))
        self._marked = self.state.step
        if self.trial is not None:
            if self.trial.is_needed:
                words = self.trial(len(self._rates) - self.state.step)
                self.note = "; ".join([words, *([self.note] if self.note and self.is_captured else [])])
        elif self._graph is not None and (why := self.capture(self._graph)) is not None:
            self.note = f"the step could not be captured ({why}): it runs launch by launch"

    def capture(self, graph: Graph) -> str | None:
        """Capture the step, which leaves no trace; or say why that cannot be, and launch one by one from then on."""
        early, before = launch.dependent, ""
        launches = not self.asks_modules or self.state.networks.kernel is not False
        while True:
            try:
                with self.leaving_no_trace():
                    graph.capture(self.launch)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) and self.trial is not None:
                    raise  # the trial holds memory that a step of its own does not
                why = (str(error).splitlines() or [type(error).__name__])[0]
                if launch.dependent and launches:
                    launch.dependent, before = False, why  # what a driver is likeliest not to know
                    self.note = f"the step could be captured without dependent launches only ({why})"
                    continue
                if why == before:  # they were not to blame
                    launch.dependent = early
                self._graph = None  # a driver or a library that cannot: the same function, launch by launch
                return why
            self._graph = graph
            return None

    def close(self) -> None:
        """Let go of the graph: a process group does not end while one holds its collectives. Steps run without it."""
        self._graph = None

    def batches(self, batches: Iterable[Ready]) -> Iterator[Ready]:
        """Pass `batches` on; the host's waiting for each counts, unless a GPU still has steps to do meanwhile."""
        self._last_end = None  # whatever came between two epochs is not waiting for data
        source, is_idle = iter(batches), True
        while True:
            start = time.perf_counter()
            try:
                ready = next(source)
            except StopIteration:
                return
            if is_idle or self.device.type != "cuda":
                self._waited += time.perf_counter() - start
            is_idle = False
            yield ready

    def __call__(self, ready: Ready = None) -> None:
        """Run one step on the batch that the inputs hold, which was `ready` then."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            stream = torch.cuda.current_stream(self.device)  # not the current device's, which may be another
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
        self.advance()
        if on_gpu:
            end.record(stream)
            self._timings.append(_Timing(ready, start, end))

    def mark(self) -> Mark:
        """Fetch what the steps since the last mark measured."""
        steps = range(self._marked, self.state.step)
        assert 0 < len(steps) <= len(self._record), "steps are marked at least every `rows`"
        rows = [(step, self._rates[step]) for step in steps]
        mark = Mark(
            self._record, self._names, rows, self._timings, self._last_end, self._waited, captured=self.is_captured
        )
        if self._timings:
            self._last_end = self._timings[-1].end
        self._marked, self._timings, self._waited = self.state.step, [], 0.0
        return mark

    def advance(self) -> None:
        """Run one step, launched or replayed."""
        if self._graph is None:
            self.launch()
            return
        if self.asks_modules:
            self.seed()
        self._graph.replay()
        self.state.step += 1

    def launch(self) -> None:
        """Run one step launch by launch."""
        images_BHWC, labels_B = self.inputs.batch(self._counter[1])
        lr = self._rates_T.index_select(0, self._counter[1:2])[0]
        measures = self.function(self.state, self.config, images_BHWC, labels_B, lr, counter=self._counter)
        values = [measures[name] for name in self._names]
        ranks = self.state.ranks
        if ranks.size > 1:
            values = list(ranks.mean(torch.stack([value.to(torch.float64) for value in values])).unbind())
        record(self._record, self._counter, values, kernel=self.state.networks.kernel and ranks.size == 1)

    def fill(self) -> None:
        """Let the inputs have a batch, before any epoch."""
        self.inputs.fill()

    def seed(self) -> None:
        """Set the generators of modules for the step to come: a graph cannot, as the step itself does."""
        seed_modules(self.config.seed, self.state.step, self.first_row, self.device)

    def measures(self) -> dict[str, Tensor]:
        """Give what the step before measured, as float64 scalars on the device, which later steps leave alone."""
        row = self._record[(self.state.step - 1) % len(self._record), 0].clone()
        return dict(zip(self._names, row.unbind(), strict=True))

    def measured(self) -> list[float]:
        """Wait for the losses of the step before, of all its networks, and return them."""
        row = self._record[(self.state.step - 1) % len(self._record)]
        return row[:, [name.startswith("loss") for name in self._names]].flatten().tolist()

    @contextmanager
    def leaving_no_trace(self) -> Iterator[list[Tensor]]:
        """Put back everything that a step changes; gives what `state.tensors()` were."""
        state = self.state
        changing = [tensor.detach() for tensor in (*state.tensors(), self._counter, self._record)]
        before, step = [tensor.clone() for tensor in changing], state.step
        try:
            yield before[:-2]
        finally:
            for tensor, value in zip(changing, before, strict=True):
                tensor.copy_(value)
            state.step = step
            state.optimizer.zero_grad(set_to_none=True)

"""The threads part, of a CPU: the step of the step part on one thread, on all, and on all beside a busy neighbour.

Providers are those of the step part, checked as there, each once for every number of threads. All take turns, as there.
The neighbour is a process of a session of its own that computes without end on one core, and so gets as much of it as a
thread of ours does; it is stopped while others have their turns. A row's provider says its threads; its note how many
times as fast it is as the same provider on one.

    tflops       as in the step part
    floor_share  the floor of as many threads, measured before, / median
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench.harness.checked import Checked
from bench.harness.context import Batches, Context, networks_of, timing_columns, work_columns
from bench.harness.rows import Row
from bench.harness.turns import Timing, in_turns
from bench.parts.step import METHOD, checked
from bench.rivals import PROVIDERS, Problem, Run
from ensdistill.runtime.devices import rates_of
from ensdistill.runtime.environment import usable_cores
from ensdistill.training.step import StepConfig

BUSY = ", a busy neighbour"


def rows(context: Context) -> Iterator[Row]:
    """Yield a row for every provider and number of threads."""
    if context.device.type != "cpu":
        yield context.row(part="threads", provider="", note="a part of CPUs; give --device cpu")
        return
    before = torch.get_num_threads()
    try:
        yield from _rows(context)
    finally:
        torch.set_num_threads(before)


def _rows(context: Context) -> Iterator[Row]:
    batches = Batches(context)
    teachers, student = networks_of(context, METHOD)
    problem = Problem(teachers=teachers, student=student, config=StepConfig(method=METHOD, seed=0))
    at: dict[int, Context] = {}
    steps: dict[str, Checked[Run]] = {}
    found: dict[str, Row] = {}
    threads_of: dict[str, int] = {}
    for threads in sorted({1, context.threads, usable_cores()}):
        torch.set_num_threads(threads)
        at[threads] = replace(context, threads=threads, rates=rates_of(context.device, context.precision))
        for name in context.providers:
            provider = PROVIDERS[name]
            precision = context.precision if context.precision in provider.precisions else provider.precisions[0]
            label = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            device = context.identity["device"].partition(",")[0]  # its threads are the provider's here
            row = context.row(part="threads", provider=label, method=str(METHOD), precision=precision, device=device)
            step = checked(name, replace(problem, precision=precision), problem, batches)
            if isinstance(step, str) or step.wrong:
                yield replace(row, note=step if isinstance(step, str) else step.wrong)
                continue
            context.say(f"threads: {label}, {step.difference}")
            steps[label], found[label], threads_of[label] = step, row, threads
            if threads > 1:
                found[label + BUSY], threads_of[label + BUSY] = replace(row, provider=label + BUSY), threads
    with _neighbour() as (wake, stop):

        def turn(label: str, step: Checked[Run]) -> Callable[[int], object]:
            def call(i: int) -> object:
                torch.set_num_threads(threads_of[label])
                if label.endswith(BUSY):
                    wake()
                try:
                    return step(i)
                finally:
                    stop()

            return call

        calls = {label: turn(label, steps[label.removesuffix(BUSY)]) for label in found}
        context.say(f"threads: timing {'; '.join(calls)}")
        timings = in_turns(calls, context.device, rounds=context.rounds, max_seconds=len(calls) * context.seconds)
    for label, timing in timings.items():
        columns: dict[str, Any] = timing_columns(timing, context.B)
        columns |= work_columns(at[threads_of[label]], METHOD, timing)
        alone = timings.get(f"{label.partition(',')[0]}, 1 thread")
        yield replace(found[label], **columns, note="" if alone in (None, timing) else _said(alone, timing))


def _said(alone: Timing | None, timing: Timing) -> str:
    assert alone is not None
    return f"{alone.quantile_ms(0.5) / timing.quantile_ms(0.5):.2f} x one thread"


@contextmanager
def _neighbour() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Start a process that computes without end while it is awake; gives what wakes it and what stops it."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        yield (lambda: os.kill(process.pid, signal.SIGCONT)), (lambda: os.kill(process.pid, signal.SIGSTOP))
    finally:
        process.kill()
        process.wait()

"""The step part: latentbe+tdiv-sdiv by every provider of bench/rivals that runs on the device.

Each is compared with the fp32 definition over two steps first; who differs gets a row without a time. Those left are
timed in turns (turns.py) on random uint8 images that lie on the device, batch after batch so many that no cache holds
them; decoding and copying are the feed's part. A provider that cannot compute in the comparison's precision computes in
its own, which its row says.

    tflops       FLOPs that the method needs (roofline.step_parts: 22 F at E = 4) / median, whatever the provider spends
    gbps         bytes that it needs to move, counted there too / median
    floor_share  the device's floor for that work / median; the same floor for every provider
    peak_gb      on a GPU: see checked.py

What it does not say: how fast a whole training is, or how long the start takes, minutes where torch.compile works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.harness.checked import Checked, why_not
from bench.harness.compiled_networks import MODE
from bench.harness.context import Batches, Context, networks_of, timing_columns, work_columns
from bench.harness.rows import Row
from bench.harness.turns import in_turns
from bench.rivals import PROVIDERS, Problem, Run, bounds
from ensdistill.config.methods import Method
from ensdistill.training.step import StepConfig

METHOD = Method(student="latentbe", shown="tdiv-sdiv")
"""Method that is trained."""


def rows(context: Context) -> Iterator[Row]:
    """Yield a row for each provider: first those that are not timed, as they are found, then the others."""
    batches = Batches(context)
    teachers, student = networks_of(context, METHOD)
    problem = Problem(teachers=teachers, student=student, config=StepConfig(method=METHOD, seed=0))
    steps: dict[str, Checked[Run]] = {}
    found: dict[str, Row] = {}
    for name in context.providers:
        provider = PROVIDERS[name]
        precision = context.precision if context.precision in provider.precisions else provider.precisions[0]
        row = context.row(part="step", provider=name, method=str(METHOD), precision=precision)
        step = checked(name, replace(problem, precision=precision), problem, batches)
        if isinstance(step, str):
            yield replace(row, note=step)
        elif step.wrong:
            yield replace(row, note=step.wrong)
        else:
            context.say(f"step: {name}, {step.difference}")
            steps[name], found[name] = step, replace(row, peak_gb=step.peak_gb)
    context.say(f"step: timing {', '.join(steps)}")
    timings = in_turns(steps, context.device, rounds=context.rounds, max_seconds=context.seconds)
    for name, timing in timings.items():
        if wrong := steps[name].wrong:
            yield replace(found[name], note=wrong)
            continue
        columns: dict[str, Any] = timing_columns(timing, context.B)
        columns["note"] = f"torch.compile's mode {MODE}" if name.startswith("compiled") else ""
        yield replace(found[name], **columns, **work_columns(context, METHOD, timing))


def checked(name: str, problem: Problem, definition: Problem, batches: Batches) -> Checked[Run] | str:
    """Make the provider's step on `problem` and check it, or say why there is none."""
    provider = PROVIDERS[name]
    if provider.needs_gpu and problem.device.type != "cuda":
        return "needs a GPU"
    try:
        return Checked(
            lambda: provider.make(problem),
            lambda: PROVIDERS["pruned"].make(definition),
            bounds(problem),
            batches,
            problem.device,
        )
    except (ValueError, RuntimeError) as error:
        return why_not(error)

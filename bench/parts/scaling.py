"""The scaling part: how the step's time grows along one axis at a time, and where memory ends.

From the comparison's problem: members 1 to 16, batches of 32 to 4096, images of 32, 64 and 224 pixels, and of a wide
residual network widths 1, 2, 4 and 10 at its depth. The step is latentbe+tdiv-sdiv by the default backend; one member
alone is latentbe, for the perturbation compares two. Batches are random pixels on the device, rotated past its caches.

Every point is checked against the fp32 definition over two steps before it is timed: on as many images as it is timed
on, or, where the definition does not fit into memory beside it, on the half, a quarter, …; its note says on how many.
A point has no time where

- it does not fit: `peak_gb` is then what its tensors were predicted to need, which no other row without a time has;
- it would take long, by its FLOPs and a line through the times of the points before it; the note says how long;
- it computes something else than the definition, or cannot be computed: the note says by how much, or why.

`peak_gb` of a point that was timed is on a GPU what its run added to what lay there, on a CPU what was predicted.

Not measured: how the axes act together, and what feeding the data costs.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.checked import Checked, why_not
from bench.harness.context import WRONG, Batches, Context, cost_of, networks_of, release, timing_columns, work_columns
from bench.harness.rows import Row
from bench.harness.turns import in_turns
from bench.rivals import PROVIDERS, Problem, bounds
from ensdistill.config.methods import Method
from ensdistill.costs.floor import step_parts
from ensdistill.costs.memory import Workload, capacity, predict, without_values
from ensdistill.engine.operations import Backend
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.monitor.memory import Peak, gigabytes
from ensdistill.runtime.environment import Precision
from ensdistill.training.step import StepConfig

PROVIDER: Backend = "auto"
REFERENCE: Backend = "reference"  # of bench/rivals `pruned`
MEMBERS = (1, 2, 4, 8, 16)
BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SIZES = (32, 64, 224)
WIDTHS = (1, 2, 4, 10)

STEPS = 13
"""Steps that a point takes beside its rounds: for the check two by each provider, of which fp32 counts double; 3 to
warm up, 2 to count by; the rest for drawing networks."""
LONGEST_QUICK, LONGEST = 3.0, 40.0
"""Seconds that a point may take by prediction."""


def method(point: Context) -> Method:
    """Choose the method that is trained there."""
    return Method(student="latentbe", shown="tdiv-sdiv" if point.E > 1 else "clean")


def axes(context: Context) -> dict[str, list[Context]]:
    """The points of every axis in ascending order, the context's own among them."""
    points = {
        "E": [replace(context, E=E) for E in sorted({*MEMBERS, context.E})],
        "B": [replace(context, B=B) for B in sorted({*BATCHES, context.B})],
        "size": [replace(context, size=size) for size in sorted({*SIZES, context.size})],
    }
    if wide := re.fullmatch(r"(wrn\d+x)(\d+)", context.network):
        points["width"] = [replace(context, network=f"{wide[1]}{n}") for n in sorted({*WIDTHS, int(wide[2])})]
    return points


def rows(context: Context) -> Iterator[Row]:
    """A row a point as it is measured, the context's own first. If `quick`, an axis ends where a point has no time."""
    pace = Pace()
    yield _row(context, pace)
    for points in axes(context).values():
        for point in points:
            if point == context:
                continue
            row = _row(point, pace)
            yield row
            if context.quick and row.p50_ms is None:
                break


class Pace:
    """Predicts a step's seconds from its FLOPs: a line through what was measured so far."""

    def __init__(self) -> None:
        self.flops: list[float] = []
        self.seconds: list[float] = []

    def add(self, flops: float, seconds: float) -> None:
        """Add the seconds that a step took."""
        self.flops.append(flops)
        self.seconds.append(seconds)

    def seconds_for(self, flops: float) -> float:
        """Predict a step's seconds; zero as long as nothing was measured."""
        if not self.flops:
            return 0.0
        if len(self.flops) == 1:
            return self.seconds[0] * flops / self.flops[0]
        slope, intercept = statistics.linear_regression(self.flops, self.seconds)
        return intercept + slope * flops


def _row(point: Context, pace: Pace) -> Row:
    row = point.row(part="scaling", provider=PROVIDER, method=str(method(point)))
    point.say(f"scaling: {row.method}, {row.network}, E {row.E}, B {row.B}, {row.size} px")
    cost = cost_of(point)
    flops = sum(part.flops(point.B) for part in step_parts(cost, [cost] * point.E, method(point)))
    room = capacity(point.device)
    prediction = predict(_workload(point, PROVIDER, point.precision), point.B)
    needed = f"needs about {gigabytes(prediction.total)} of {gigabytes(room)}"
    at_its_end = replace(row, peak_gb=prediction.tensors / 1e9)
    if prediction.total > room:
        return replace(at_its_end, note=f"does not fit: {needed}")
    seconds = (STEPS + point.rounds) * pace.seconds_for(flops)
    if seconds > (LONGEST_QUICK if point.quick else LONGEST):
        return replace(row, note=f"would take about {seconds:.0f} s")
    try:
        columns = _checked_and_timed(point, _checked_images(point, room))
    except torch.OutOfMemoryError:
        return replace(at_its_end, note=f"out of memory: {needed} by prediction")
    except (ValueError, RuntimeError) as error:
        return replace(row, note=why_not(error))
    finally:
        release(point.device)
    if "p50_ms" not in columns:
        return replace(row, **columns)
    pace.add(flops, columns["p50_ms"] / 1e3)
    return replace(at_its_end, **columns)


def _checked_images(point: Context, room: int) -> int:
    """Find how many images, at most the point's own, let both providers of the check fit into `room` bytes."""
    both = _workload(point, PROVIDER, point.precision), _workload(point, REFERENCE, "fp32")
    B = point.B
    while B > 2 and sum(predict(workload, B).total for workload in both) > room:
        B //= 2
    return B


def _checked_and_timed(point: Context, num_checked: int) -> dict[str, Any]:
    """Columns of a row: of its times, or of what is wrong with its numbers on steps of `num_checked` images."""
    problem = _problem(point)
    make = partial(PROVIDERS[PROVIDER].make, problem)
    make_reference = partial(PROVIDERS["pruned"].make, replace(problem, precision="fp32"))
    few = Batches(replace(point, B=num_checked))
    if wrong := Checked(make, make_reference, bounds(problem), few, point.device).wrong:
        return {"note": wrong}
    release(point.device)
    batches = few if num_checked == point.B else Batches(point)
    is_cuda = point.device.type == "cuda"
    others = torch.cuda.memory_allocated(point.device) if is_cuda else 0
    run = make()
    peak = Peak(point.device)
    losses: dict[str, Tensor] = {}

    def step(i: int) -> None:
        losses["latest"] = run(*batches[i])["loss"]

    timing = in_turns({PROVIDER: step}, point.device, rounds=point.rounds, max_seconds=point.seconds)[PROVIDER]
    if not math.isfinite(loss := losses["latest"].item()):
        return {"note": f"{WRONG}: the loss of the last step is {loss}"}
    columns = timing_columns(timing, point.B) | work_columns(point, method(point), timing)
    if is_cuda:
        assert peak.bytes is not None
        columns["peak_gb"] = (peak.bytes - others) / 1e9
    if num_checked != point.B:
        columns["note"] = f"checked on {num_checked} images"
    return columns


def _problem(point: Context) -> Problem:
    teachers, student = networks_of(point, method(point))
    config = StepConfig(method=method(point), seed=0)
    return Problem(teachers=teachers, student=student, config=config, precision=point.precision)


def _workload(point: Context, backend: Backend, precision: Precision) -> Workload:
    """Describe the point's step, by networks of the same shape."""
    network = build(point.network, num_classes=point.classes, image_size=point.size)
    plain = Classifier(network, [0.5] * 3, [0.25] * 3)
    return Workload(
        teachers=Teachers([without_values(plain) for _ in range(point.E)], point.classes),
        student=build_student(method(point), lambda seed: plain, E=point.E, seed=0),
        method=method(point),
        image_shape=(point.size, point.size, 3),
        precision=precision,
        backend=backend,
        device_type=point.device.type,
    )

"""The methods part: what a training step of every student and every data shown costs, and the whole job around it.

**Steps.** Our own step by the default backend, as a training runs it (training/stepper.py: on a GPU one captured graph
where the networks have kernels). Each is compared with the fp32 definition over two steps first, as in the step part,
and has batches as there. All methods of one student are timed in turns, with a plain `ce` step as one of them: `vs_ce`
is the median relative to that one, so that a clock that changes meets both. Rows `part=methods`; the first, `ce`, is 1.
`peak_gb` is measured on a GPU (checked.py), on a CPU predicted by costs/memory.py, whose allocator counts nothing.
Relative memory and energy are those columns divided by ce's.

**The whole job.** Rows `part=job`, seconds as milliseconds in `p50_ms`: what the schedule of a recipe
(cifar100-wrn28x4; with --quick digits) takes at the speeds that were measured here, of this comparison's network and
batch: `data` (writing the .beton, by the speed of writing up to 5,000 random images), `teachers` (E trainings of ce,
one after another), `student`, and `job`, their sum, by method. The 20th and 80th percentiles are those of the parts,
added up. Not in it: validation, the evaluation at the end, waiting for data, the start; `python -m
ensdistill.fast_train --plan` predicts the first two.

**Quality.** With --runs FOLDER, a run's results.json becomes nll.csv: method, nll, acc, cost (training time relative to
one teacher's, in that run; where it trained no teachers, `vs_ce` of here).
"""

from __future__ import annotations

import copy
import csv
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness.checked import Checked, why_not
from bench.harness.context import Batches, Context, networks_of, release, timing_columns, work_columns
from bench.harness.rows import Row
from bench.harness.turns import MOST_CALLS, Timing, in_turns
from bench.rivals import Problem, Run, bounds
from ensdistill.config.configs import Training
from ensdistill.config.methods import SHOWN, STUDENTS, Method
from ensdistill.config.recipes import find_recipe
from ensdistill.costs.data_size import DataSize, data_size
from ensdistill.costs.memory import Workload, predict
from ensdistill.data.prepare import prepare
from ensdistill.data.sources.base import SPLIT_NAMES, Content, Source, Split
from ensdistill.engine.networks import make_networks
from ensdistill.engine.operations import Backend
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.files import atomic_write
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, train_step
from ensdistill.training.stepper import CudaGraph, Stepper

RECIPE, QUICK_RECIPE = "cifar100-wrn28x4", "digits"
BACKEND: Backend = "auto"
CE = Method(student="ce")
LR = 0.01
LOG_EVERY = 20
"""Steps between two looks at what they measured, as in training."""
WRITTEN = 5_000
"""Images that are written to find the speed of writing, at most."""
WRITINGS = 3


def rows(context: Context) -> Iterator[Row]:
    """Yield a row for each method, then the whole jobs that they make."""
    batches = Batches(context)
    timed: list[Row] = []
    for student in STUDENTS:
        context.say(f"methods: {student}")
        for row in _student_rows(context, student, batches):
            if row.p50_ms is not None:
                timed.append(row)
            yield row
        release(context.device)
    yield from job_rows(context, timed)


def existing_methods(student: str) -> list[Method]:
    """List `student` with all the data that it can be shown."""
    methods = []
    for shown in SHOWN:
        with suppress(UserError):  # the two do not go together
            methods.append(Method(student=student, shown=shown))
    return methods


# ---- steps --------------------------------------------------------------------------------------------------------


class OurStep(Run):
    """Does the step of a training on batches that it copies to where the step reads them, as staged inputs do."""

    def __init__(
        self,
        context: Context,
        method: Method,
        networks: tuple[Teachers, Student],
        *,
        backend: Backend,
        precision: Precision,
    ) -> None:
        """Teachers and student of `networks` are copied. A graph is captured here."""
        device = context.device
        teachers, self.student = copy.deepcopy((networks[0] if method.needs_teachers else None, networks[1]))
        made = make_networks(backend, teachers, self.student, precision, device)
        self.notes = made.notes
        """Parts that have no kernels, and why."""
        self.remember_images(made)
        inputs: Any = self  # of its inputs the stepper itself wants a batch alone
        config = StepConfig(method=method, seed=0)
        self._images_BHWC = torch.zeros(context.B, context.size, context.size, 3, dtype=torch.uint8, device=device)
        self._labels_B = torch.zeros(context.B, dtype=torch.int64, device=device)
        self._stepper = Stepper(
            State(networks=made, optimizer=make_optimizer(self.student, config.weight_decay)),
            config,
            inputs=inputs,
            rates=[LR] * MOST_CALLS * (context.rounds + 1),
            device=device,
            rows=LOG_EVERY,
            graph=CudaGraph(device) if device.type == "cuda" and backend != "reference" else None,
            function=self._step,
        )
        self._stepper.prepare(first_row=0)
        if self._stepper.note is not None:
            self.notes = [*self.notes, self._stepper.note]

    def _step(self, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        self._measures = train_step(*arguments, **options)
        return self._measures

    def fill(self) -> None:
        """Put noise into the batch: see `ensdistill.data.inputs.Inputs`."""
        self._images_BHWC.random_(0, 256)

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Give the batch that the step reads: see `ensdistill.data.inputs.Inputs`."""
        return self._images_BHWC, self._labels_B

    def __call__(self, images_BHWC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Do a step and return its measures; as in training they are fetched now and then, without waiting."""
        self._images_BHWC.copy_(images_BHWC)
        self._labels_B.copy_(labels_B)
        self._stepper()
        if self._stepper.state.step % LOG_EVERY == 0:
            self._stepper.mark()
        return self._measures


def _student_rows(context: Context, student: str, batches: Batches) -> Iterator[Row]:
    """Time every method of `student` in turns with `ce`."""
    methods = existing_methods(student)
    _, plain = networks_of(context, CE)
    pair = networks_of(context, Method(student=student))
    limits = bounds(
        Problem(teachers=None, student=plain, config=StepConfig(method=CE, seed=0), precision=context.precision)
    )
    steps: dict[str, Checked[OurStep]] = {}
    found: dict[str, Row] = {}
    for method in dict.fromkeys([CE, *methods]):
        row = context.row(part="methods", provider=BACKEND, method=str(method))
        networks = (pair[0], plain) if method == CE else pair
        make = partial(OurStep, context, method, networks)
        try:
            step = Checked(
                partial(make, backend=BACKEND, precision=context.precision),
                partial(make, backend="reference", precision="fp32"),
                limits,
                batches,
                context.device,
            )
        except (ValueError, RuntimeError) as error:
            if method in methods:
                yield replace(row, note=why_not(error))
            continue
        if not step.wrong:
            note = "; ".join(step.run.notes)
            steps[str(method)] = step
            found[str(method)] = replace(row, peak_gb=_peak_gb(context, method, networks, step), note=note)
        elif method in methods:
            yield replace(row, note=step.wrong)
    timings = in_turns(steps, context.device, rounds=context.rounds, max_seconds=context.seconds)
    ce = timings.get(str(CE))
    for method in methods:
        if (name := str(method)) not in timings:
            continue
        if wrong := steps[name].wrong:
            yield replace(found[name], note=wrong)
            continue
        columns = timing_columns(timings[name], context.B) | work_columns(context, method, timings[name])
        columns["vs_ce"] = None if ce is None else timings[name].quantile_ms(0.5) / ce.quantile_ms(0.5)
        yield replace(found[name], **columns)


def _peak_gb(context: Context, method: Method, networks: tuple[Teachers, Student], step: Checked[OurStep]) -> float:
    """Give the peak memory in GB: measured on a GPU, else predicted."""
    if step.peak_gb is not None:
        return step.peak_gb
    workload = Workload(
        teachers=networks[0] if method.needs_teachers else None,
        student=networks[1],
        method=method,
        image_shape=(context.size, context.size, 3),
        precision=context.precision,
        backend=BACKEND,
        device_type=context.device.type,
    )
    return predict(workload, context.B).tensors / 1e9


# ---- the whole job ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Milliseconds: 20th percentile, median, 80th."""

    p20: float
    p50: float
    p80: float

    def __add__(self, other: Span) -> Span:
        return Span(self.p20 + other.p20, self.p50 + other.p50, self.p80 + other.p80)

    def __mul__(self, times: float) -> Span:
        return Span(self.p20 * times, self.p50 * times, self.p80 * times)

    @property
    def columns(self) -> dict[str, float]:
        """Columns of `Row` that hold the time."""
        return {"p20_ms": self.p20, "p50_ms": self.p50, "p80_ms": self.p80}


def span_of(row: Row) -> Span:
    """Read the time of a row that has one."""
    assert row.p20_ms is not None and row.p50_ms is not None and row.p80_ms is not None, "timed rows only"
    return Span(row.p20_ms, row.p50_ms, row.p80_ms)


def job_rows(context: Context, timed: Sequence[Row]) -> Iterator[Row]:
    """Yield rows `data`, `teachers`, and `student` and `job` of each method in `timed`, the measured steps."""
    recipe = QUICK_RECIPE if context.quick else RECIPE
    config = find_recipe(recipe)
    size = data_size(config, context.say)
    schedule = f"schedule of {recipe}, {config.student.epochs} epochs of {size.num_train:,} images"
    by_method = {row.method: row for row in timed}
    context.say(f"job: {schedule}")
    writing = _writing(size)
    images = size.num_images
    data = Span(*(1e3 * images * writing.quantile_ms(share) / 1e3 for share in (0.2, 0.5, 0.8)))

    def row(provider: str, method: str, span: Span, n: int, note: str) -> Row:
        return context.row(part="job", provider=provider, method=method, n=n, note=note, **span.columns)

    yield row("data", "", data, len(writing.seconds), f"writing the {images:,} images of {recipe}")
    teachers: Span | None = None
    if ce := by_method.get(str(CE)):
        teachers = span_of(ce) * (context.E * _images(size, config.teacher) / context.B)
        yield row(
            "teachers", str(CE), teachers, ce.n, f"{context.E} of {config.teacher.epochs} epochs, schedule of {recipe}"
        )
    for name, step in by_method.items():
        student = span_of(step) * (_images(size, config.student) / context.B)
        yield row("student", name, student, step.n, schedule)
        if not Method.parse(name).needs_teachers:
            yield row("job", name, data + student, step.n, schedule)
        elif teachers is not None:
            yield row("job", name, data + teachers + student, step.n, schedule)


def _images(size: DataSize, training: Training) -> int:
    """Count the images that one training goes through: incomplete batches are dropped."""
    return training.epochs * (size.num_train // training.batch_size) * training.batch_size


def _writing(size: DataSize) -> Timing:
    """Time the writing, in seconds an image, of a .beton of random images of the job's shape."""
    num = min(WRITTEN, size.num_train)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (num, *size.image_shape), dtype=np.uint8)
    parts = zip(SPLIT_NAMES, np.array_split(np.arange(num), len(SPLIT_NAMES)), strict=True)
    labels = np.arange(num) % size.num_classes
    splits = {name: Split(images=images[part], labels=labels[part], origin="random images") for name, part in parts}
    names = tuple(map(str, range(size.num_classes)))
    source = Source(name="random", fingerprint="", read=lambda: Content(class_names=names, splits=splits))
    timing = Timing()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1 + WRITINGS):
            start = time.perf_counter()
            prepare(source, Path(folder) / str(i))
            if i > 0:  # the first compiles and reads the source
                timing.seconds.append((time.perf_counter() - start) / num)
    return timing


# ---- quality ------------------------------------------------------------------------------------------------------


def write_quality(run: Path, rows_: Sequence[Row], path: Path) -> None:
    """Write to `path` what each network of the run's results.json cost and how good it is.

    Args:
        rows_: of this part, for the cost of students whose run trained no teachers.

    Raises:
        UserError: there are no results in the folder `run`.
    """
    file = run / "results.json"
    try:
        results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
        table = [(row["name"], row["measures"]["nll"], row["measures"]["acc"], row["cost"]) for row in results]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--runs {run}: no results of a run ({error!r}); expected its results.json") from error
    costs = {row.method: row.vs_ce for row in rows_ if row.part == "methods"}
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["method", "nll", "acc", "cost"])
        for name, nll, acc, cost in table:
            own = costs.get(name) if cost is None else cost
            writer.writerow([name, f"{nll:.6g}", f"{acc:.6g}", "" if own is None else f"{own:.6g}"])

"""Plan of a whole job, before anything runs: time, memory, disk and floor, teachers included.

Time comes from a calibration of a few seconds on the machine that will do the work: one forward, one training step of
the plain network and one of the BatchEnsemble student, scaled by the work that floor.py counts. Memory is that of
the very step, run on tensors without values (memory.py). Nothing is written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table

from ensdistill.config.configs import Command
from ensdistill.config.methods import Method
from ensdistill.costs.calibration import Calibration, calibrate
from ensdistill.costs.data_size import DataSize
from ensdistill.costs.dry_run import needs_no_values, precision_of_gradients, require_variance, teachers_without_values
from ensdistill.costs.floor import Part, step_parts, whole
from ensdistill.costs.memory import Workload, capacity, predict, require_room, shortage
from ensdistill.costs.network import NetworkCost, network_cost
from ensdistill.engine.cpu.side_by_side import crew_for
from ensdistill.engine.operations import make_operations
from ensdistill.formats.load import check_both_modes
from ensdistill.models import Classifier
from ensdistill.models.students import build_student
from ensdistill.runtime.devices import Device, rates_of
from ensdistill.runtime.environment import Precision, choose_device, choose_precision, choose_threads, is_tiny
from ensdistill.runtime.errors import UserError
from ensdistill.training.from_config import make_classifier
from ensdistill.training.loop import validation_epochs

# One thread's rate of FFCV's writer, images that lie in memory; decoding and resizing files take longer.
WRITTEN_IMAGES_PER_SECOND = 20_000
WRITTEN_BYTES_PER_SECOND = 200e6
_TABLE_BYTES = 64
"""FFCV's table and label, an image."""
_CE = Method(student="ce")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the job. None: not known, or nothing to say."""

    name: str
    """Name in the table."""
    images: int | None = None
    """Training images that all its runs go through."""
    F: float | None = None
    """Forwards of one network (an input-only backward counts 1, a full one 2) an image."""
    floor: float | None = None
    """Seconds below which the device cannot be, validation included."""
    seconds: float | None = None
    """Predicted seconds, validation included."""
    memory: float | None = None
    """Bytes of tensors at the peak."""
    too_large: str | None = None
    """Why the device has not that much memory, where it has not."""
    disk: float | None = None
    """Bytes of files that stay."""
    checkpoint: float = 0
    """Bytes of files while it trains, beside those: weights, moments, averages; the new whole before the old go."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages of a job and where their numbers come from."""

    stages: tuple[Stage, ...]
    """Stages in the order in which they run."""
    total: Stage
    """Sums over the stages, and the largest memory; one checkpoint, because one network trains at a time."""
    rates: Device | None
    """The device whose floor it is; None where its rates are not known."""
    calibration: Calibration
    """Measured speed that the times come from."""


def plan(
    command: Command, size: DataSize, *, calibration: Calibration | None = None, rates: Device | None = None
) -> Plan:
    """Predict what the job of `command` takes on data of `size`.

    Args:
        calibration: None measures the machine (under 5 s).
        rates: of the device, for the floor. None looks them up, or measures the CPU (0.4 s).

    Raises:
        UserError: unknown network, device or backend, or a batch that is larger than the training images.
    """
    config = command.config
    _require_images(command, size)
    device = choose_device(command.device)
    make_operations(config.backend, device)  # refused here as a run would be
    if config.builder is None:
        require_room(config.network, config.members)
    classifier = make_classifier(config, num_classes=size.num_classes, image_shape=size.image_shape)
    require_variance(classifier, config.student.batch_size, size.image_shape, "student.batch-size")
    if _trains_teachers(command):
        require_variance(classifier, config.teacher.batch_size, size.image_shape, "teacher.batch-size")
    precision = precision_of_gradients(
        choose_precision(config.precision, device),
        classifier,
        size.image_shape,
        device=device,
        asked=config.precision,
        say=lambda line: None,  # the plan's table names the precision
    )
    rates = rates or rates_of(device, precision)
    if config.builder is not None:
        check_both_modes(classifier, config.network, num_classes=size.num_classes, image_shape=size.image_shape)
    H, W, C = size.image_shape
    with needs_no_values(config):
        cost = network_cost(classifier.network, in_channels=C, image_size=(H, W))
    methods = [] if command.stage == "teachers" else [Method.parse(text) for text in config.methods]
    if calibration is None:
        B, before = config.student.batch_size, torch.get_num_threads()
        threads = choose_threads(command.threads, layer_macs=B * cost.macs_a_layer)
        torch.set_num_threads(threads)
        calibration = calibrate(
            copy.deepcopy(classifier),
            size,
            methods,
            B=B,
            device=device,
            precision=precision,
            optimizer=config.optimizer,
            crew=crew_for(config.backend, device, threads, tiny=is_tiny(B * cost.macs_a_layer)),
        )
        torch.set_num_threads(before)
    planner = _Planner(
        command=command,
        size=size,
        methods=methods,
        classifier=classifier,
        cost=cost,
        device=device,
        precision=precision,
        rates=rates,
        calibration=calibration,
        capacity=capacity(device),
    )
    stages = [planner.data()]
    with needs_no_values(config):
        if _trains_teachers(command):
            stages.append(planner.training(_CE, teachers=True))
        stages += [planner.training(method, teachers=False) for method in methods]
    stages.append(planner.evaluation())
    return Plan(stages=tuple(stages), total=_total(stages), rates=rates, calibration=calibration)


def _trains_teachers(command: Command) -> bool:
    return not command.config.teachers and command.stage in ("all", "teachers")


def _require_images(command: Command, size: DataSize) -> None:
    config = command.config
    trainings = [("student", config.student)] + [("teacher", config.teacher)] * _trains_teachers(command)
    for name, training in trainings:
        if training.batch_size > size.num_train:
            raise UserError(
                f"plan: the {name}s' batch-size is {training.batch_size}, expected 1 to the number of training images, "
                f"{size.num_train}; choose another"
            )


@dataclass(frozen=True, kw_only=True)
class _Planner:
    """Makes the stages of one plan."""

    command: Command
    size: DataSize
    methods: Sequence[Method]
    classifier: Classifier
    cost: NetworkCost
    device: torch.device
    precision: Precision
    rates: Device | None
    calibration: Calibration
    capacity: int

    def data(self) -> Stage:
        """Make the stage that writes the .beton."""
        H, W, C = self.size.image_shape
        images = self.size.num_images
        stored = images * (H * W * C + _TABLE_BYTES)
        seconds = max(images / WRITTEN_IMAGES_PER_SECOND, stored / WRITTEN_BYTES_PER_SECOND)
        return Stage(name="data", images=images, seconds=seconds, disk=stored)

    def training(self, method: Method, *, teachers: bool) -> Stage:
        """Make the stage that trains every teacher, or the students of one method."""
        config, size, E = self.command.config, self.size, self.command.config.members
        training = config.teacher if teachers else config.student
        B, epochs, runs = training.batch_size, training.epochs, E if teachers else self.command.seeds
        updates = config.updates
        parts = step_parts(self.cost, [self.cost] * E, method, updates)
        steps = runs * epochs * (size.num_train // B)
        views = 1 + (updates.ema is not None)
        valid = [(self._evaluated(method), views * runs * len(validation_epochs(epochs)) * size.num_valid)]
        if updates.swa is not None:  # its statistics
            valid.append((self._members(method), runs * size.num_train))
        student = build_student(method, lambda seed: copy.deepcopy(self.classifier), E=E, seed=0)
        params = sum(parameter.numel() for parameter in student.parameters())
        workload = Workload(
            # they are there once there are students
            teachers=None if teachers else teachers_without_values(self.classifier, E, size.num_classes),
            student=student,
            method=method,
            image_shape=size.image_shape,
            precision=self.precision,
            backend=config.backend,
            device_type=self.device.type,
            updates=updates,
        )
        prediction = predict(workload, B)
        too_large = None
        if prediction.total > self.capacity:
            option = "teacher.batch-size" if teachers else "student.batch-size"
            too_large = shortage(workload, B, prediction, capacity=self.capacity, option=option)
        return Stage(
            name=f"{runs} teachers" if teachers else f"{method}" + (f" ×{runs}" if runs > 1 else ""),
            images=steps * B,
            F=sum(part.F for part in parts),
            floor=self._floor([(parts, steps, B)], valid),
            seconds=self._seconds([(parts, steps * B)], valid, method),
            memory=prediction.tensors,
            too_large=too_large,
            disk=runs * self._exported(method, params),
            checkpoint=2 * updates.copies * 4 * params,
        )

    def evaluation(self) -> Stage:
        """Make the stage that measures teachers and students on validation and test images."""
        E, images = self.command.config.members, self.size.num_valid + self.size.num_test
        views = 1 + len(self.command.config.updates.averages)
        F = E + views * sum(self.command.seeds * self._evaluated(method) for method in self.methods)
        if _trains_teachers(self.command):
            F += (views - 1) * E
        return Stage(
            name="evaluation",
            images=images,
            F=F,
            floor=self._floor([], [(F, images)]),
            seconds=self._seconds([], [(F, images)], _CE),
            memory=4 * E * self.cost.params + self._workspace(self.command.config.student.batch_size),
        )

    def _evaluated(self, method: Method) -> float:
        """F an image of measuring a student: what it ships, and its members where that is another network."""
        return self._members(method) + (method.student == "latentbe")

    def _members(self, method: Method) -> float:
        """F an image of a forward of all members of a student."""
        E = self.command.config.members
        if method.student == "hydra":
            head = sum(layer.macs for layer in self.cost.layers if layer.in_head) / self.cost.macs
            return 1 - head + E * head
        return E if method.has_members else 1

    def _floor(self, trained: list[tuple[list[Part], int, int]], measured: list[tuple[float, int]]) -> float | None:
        """Seconds of `trained`, (parts, steps, B) each, and of `measured`, (F an image, images) each."""
        if self.rates is None:
            return None
        rates = self.rates
        floor = sum(steps * part.floor(B, rates) for parts, steps, B in trained for part in parts)
        return floor + whole(self.cost, forward=1).floor(1, rates) * sum(F * images for F, images in measured)

    def _seconds(
        self, trained: list[tuple[list[Part], int]], measured: list[tuple[float, int]], method: Method
    ) -> float:
        """Seconds of `trained`, (parts, images) each, and of `measured`, (F an image, images) each."""
        forward, step = self.calibration.forward, self.calibration.step
        seconds = forward * sum(F * images for F, images in measured)
        for parts, images in trained:
            for part in parts:
                # The student's own layers are slower where they carry factors; the frozen teachers' never do.
                by_student = part.name.startswith(("student", "sdiv")) and method.student in ("latentbe", "be")
                slower = self.calibration.member_step / step if by_student else 1.0
                for work in part.work:
                    share = sum(layer.macs for layer in work.layers) / work.network_macs
                    backward = max(step - forward, 0.0)
                    once = work.forward * forward + work.input_backward * backward / 2 + work.backward * backward
                    seconds += images * share * slower * once
        return seconds

    def _workspace(self, rows: int) -> float:
        """Bytes of the input, the output and one copy in another order of the largest layer."""
        element_bytes = 2 if self.precision == "bf16" else 4
        return 3 * rows * element_bytes * max(layer.outputs for layer in self.cost.layers)

    def _exported(self, method: Method, params: int) -> int:
        """Bytes of a run's networks, the best and the last of each view; `latentbe` ships the averaged one."""
        return self.command.config.updates.files * 4 * (self.cost.params if method.student == "latentbe" else params)


def _total(stages: Sequence[Stage]) -> Stage:
    def added(name: str) -> float | None:
        values = [value for stage in stages if (value := getattr(stage, name)) is not None]
        return sum(values) if values else None

    return Stage(
        name="total",
        floor=added("floor"),
        seconds=added("seconds"),
        memory=max(stage.memory for stage in stages if stage.memory is not None),
        disk=added("disk"),
        checkpoint=max(stage.checkpoint for stage in stages),
    )


def render(planned: Plan) -> Group:
    """The plan as one table and the notes that say where its numbers come from; for `rich.console.Console.print`."""
    table = Table(box=None, header_style="bold")
    table.add_column("", no_wrap=True)
    floor = "floor" if planned.rates is None else f"floor {planned.rates.name}"
    for column in ("images", "F/image", floor, "predicted", "memory", "disk"):
        table.add_column(column, justify="right", no_wrap=column != "predicted")  # a range may take two lines
    for stage in [*planned.stages, planned.total]:
        table.add_row(
            stage.name,
            "" if stage.images is None else format_count(stage.images),
            "" if stage.F is None else f"{stage.F:.3g}",
            "" if stage.floor is None else format_seconds(stage.floor),
            "" if stage.seconds is None else _predicted(stage, planned.calibration),
            "" if stage.memory is None else format_bytes(stage.memory),
            "" if stage.disk is None else format_bytes(stage.disk + stage.checkpoint),
            style="bold" if stage is planned.total else "",
        )
    calibration, rates = planned.calibration, planned.rates
    rate = f"{1e3 * calibration.forward:.3g} ms a forward and {1e3 * calibration.step:.3g} ms a training step an image"
    notes = [
        f"predicted from a calibration of up to {calibration.images} images a step on this machine "
        f"({calibration.where}): {rate}. Start-up, loading and recalibration are not in it."
    ]
    if calibration.is_busy:
        notes.append(
            f"this machine is busy: repeats of one measurement took {calibration.fastest:.2f} to "
            f"{calibration.slowest:.2f} times their median; from the fastest to the slowest of them is the range."
        )
    if rates is not None:
        notes.append(f"floor: {rates.rates}; see python -m ensdistill.roofline.")
    notes.append("memory: tensors at the peak; Python and its libraries come on top.")
    notes += [stage.too_large for stage in planned.stages if stage.too_large is not None]
    notes.append("disk: best and last network of each run, one checkpoint, the .beton.")
    return Group(table, "", *notes)


def _predicted(stage: Stage, calibration: Calibration) -> str:
    """A stage's time; on a busy machine, where it was measured, `12 s to 3 min 05 s`."""
    assert stage.seconds is not None
    if not calibration.is_busy or stage.name == "data":
        return format_seconds(stage.seconds)
    ends = [format_seconds(stage.seconds * factor) for factor in (calibration.fastest, calibration.slowest)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def format_seconds(seconds: float) -> str:
    """Format a time: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`, `31 h`, `27 days`."""
    if seconds < 0.95:
        return f"{seconds:.1g} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 10:
        return f"{hours} h {minutes:02d} min"
    return f"{seconds / 3600:.0f} h" if hours < 72 else f"{seconds / 86400:,.0f} days"


def format_count(n: int) -> str:
    """Format a count: `1,797`, `36 M`."""
    return f"{n:,}" if n < 1e6 else f"{n / 1e6:.3g} M"


def format_bytes(size: float) -> str:
    """Format a size: `512 kB`, `3.1 MB`, `12 GB`, in powers of 1,000."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"
    return f"{size / 1000:.1f} TB"

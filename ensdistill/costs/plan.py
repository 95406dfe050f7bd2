"""What a whole job will take, before anything runs: time, memory, disk and floor, teachers included.

Time comes from a calibration of a few seconds on the machine that will do the work: one forward, one training step of
the plain network and one of the BatchEnsemble student, scaled by the work that roofline.py counts. Memory is that of
the very step, run on tensors without values (memory.py). Nothing is written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table

from ensdistill.config.methods import Method
from ensdistill.costs.calibration import Calibration, calibrate
from ensdistill.costs.floor import Part, step_parts, whole
from ensdistill.costs.job_size import JobSize
from ensdistill.costs.memory import Workload, capacity, predict, shortage, without_values
from ensdistill.costs.network import NetworkCost, network_cost
from ensdistill.formats.pytorch import build_foreign
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student, build_student
from ensdistill.runtime.devices import DEVICES, Device, find_device, installed_gpu, measure_cpu
from ensdistill.runtime.environment import choose_threads
from ensdistill.runtime.errors import UserError

# One thread's rate of FFCV's writer, images that lie in memory; decoding and resizing files take longer.
WRITTEN_IMAGES_PER_SECOND = 20_000
WRITTEN_BYTES_PER_SECOND = 200e6
_CE = Method(student="ce")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage of the job. None: not known, or nothing to say."""

    name: str
    """Which stage."""
    images: int | None = None
    """Images that it goes through, validation excepted, all its runs together."""
    F: float | None = None
    """Forwards of one network (an input-only backward counts 1, a full one 2) an image."""
    floor: float | None = None
    """Seconds below which the device cannot be, validation included."""
    seconds: float | None = None
    """Seconds predicted, validation included."""
    memory: float | None = None
    """Bytes of tensors at the peak."""
    too_large: str | None = None
    """Why its memory is not there, where it is not."""
    disk: float | None = None
    """Bytes of files that stay."""
    checkpoint: float = 0
    """Bytes of files while it trains, beside those: weights and momentum, the new ones whole before the old ones go."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rows of a job and where their numbers come from."""

    rows: tuple[Row, ...]
    """Stages in order."""
    total: Row
    """Sums; the largest memory; checkpoints once, because one network trains at a time."""
    device: Device | None
    """Whose floor it is."""
    calibration: Calibration | None
    """None where the device is not at hand."""
    precision: str
    """Arithmetic of convolutions."""


def plan(job: JobSize, *, calibration: Calibration | None = None, device: Device | None = None) -> Plan:
    """Predict what `job` takes.

    Args:
        calibration: None measures the machine at hand (under 5 s), where `job.device` is it.
        device: rates for the floor. None looks them up, or measures the CPU (0.4 s).

    Raises:
        UserError: unknown network or device.
    """
    at_hand = _is_at_hand(job.device)
    if device is None:
        if at_hand:
            device = installed_gpu() if torch.device(job.device).type == "cuda" else measure_cpu(job.precision)
        else:
            device = find_device(job.device)
    classifier = _classifier(job)
    cost = network_cost(classifier.network, in_channels=job.in_channels, image_size=job.image_size)
    if calibration is None and at_hand:
        before = torch.get_num_threads()
        torch.set_num_threads(choose_threads(job.threads, layer_macs=job.student_batch_size * cost.macs_a_layer))
        calibration = calibrate(job, copy.deepcopy(classifier))
        torch.set_num_threads(before)
    planner = _Planner(
        job=job,
        classifier=classifier,
        cost=cost,
        device=device,
        calibration=calibration,
        capacity=capacity(torch.device(job.device)) if at_hand else None,
    )
    rows = [planner.data()]
    if job.train_teachers:
        rows.append(planner.training(_CE, teachers=True))
    rows += [planner.training(method, teachers=False) for method in job.methods]
    rows.append(planner.evaluation())
    return Plan(
        rows=tuple(rows), total=planner.total(rows), device=device, calibration=calibration, precision=job.precision
    )


def _is_at_hand(name: str) -> bool:
    """Whether `name` is a device of this machine, not only the name of a kind of GPU."""
    if name == "cpu":
        return True
    if name.split(":")[0] != "cuda":
        return False
    if not torch.cuda.is_available():
        raise UserError(f"device '{name}': PyTorch sees no GPU here; expected cpu or one of {', '.join(DEVICES)}")
    return True


def _classifier(job: JobSize) -> Classifier:
    if ":" in job.network:
        network = build_foreign(job.network, job.network_args, seed=0)
    else:
        network = build(
            job.network, num_classes=job.num_classes, in_channels=job.in_channels, image_size=job.image_size
        )
    return Classifier(network, [0.5] * job.in_channels, [0.25] * job.in_channels)


@dataclass(frozen=True, kw_only=True)
class _Planner:
    job: JobSize
    classifier: Classifier
    cost: NetworkCost
    device: Device | None
    calibration: Calibration | None
    capacity: int | None
    """Bytes that the device has; None where it is not at hand."""

    def data(self) -> Row:
        job = self.job
        images = job.num_train + job.num_valid + job.num_test
        image_bytes = job.stored_image_bytes or job.in_channels * job.image_size**2
        stored = images * (image_bytes + 64)  # FFCV's table and label an image
        seconds = max(images / WRITTEN_IMAGES_PER_SECOND, stored / WRITTEN_BYTES_PER_SECOND)
        return Row(name="data", images=images, seconds=seconds if job.write_data else 0.0, disk=stored)

    def training(self, method: Method, *, teachers: bool) -> Row:
        job = self.job
        B = job.teacher_batch_size if teachers else job.student_batch_size
        epochs = job.teacher_epochs if teachers else job.student_epochs
        validations = job.teacher_validations if teachers else job.student_validations
        runs = job.members if teachers else job.seeds
        parts = step_parts(self.cost, [self.cost] * job.members, method)
        steps = runs * epochs * (job.num_train // B)
        valid = [(self._evaluated(method), runs * validations * job.num_valid)]
        student = build_student(method, lambda seed: copy.deepcopy(self.classifier), E=job.members, seed=0)
        params = sum(parameter.numel() for parameter in student.parameters())
        workload = self._workload(student, method, teachers=teachers)
        prediction = predict(workload, B)
        too_large = None
        if self.capacity is not None and prediction.total > self.capacity:
            option = "teacher.batch-size" if teachers else "student.batch-size"
            too_large = shortage(workload, B, prediction, capacity=self.capacity, option=option)
        return Row(
            name=f"{runs} teachers" if teachers else f"{method}" + (f" ×{runs}" if runs > 1 else ""),
            images=steps * B,
            F=sum(part.F for part in parts),
            floor=self._floor([(parts, steps, B)], valid),
            seconds=self._seconds([(parts, steps * B)], valid, method),
            memory=prediction.tensors,
            too_large=too_large,
            disk=runs * self._exported(method, params),
            checkpoint=2 * 2 * 4 * params,
        )

    def evaluation(self) -> Row:
        job = self.job
        images = job.num_valid + job.num_test
        F = job.members + sum(job.seeds * self._evaluated(method) for method in job.methods)
        B = job.student_batch_size
        memory = 4 * job.members * self.cost.params + self._workspace(B)
        return Row(
            name="evaluation",
            images=images,
            F=F,
            floor=self._floor([], [(F, images)]),
            seconds=self._seconds([], [(F, images)], _CE),
            memory=memory,
        )

    def total(self, rows: Sequence[Row]) -> Row:
        def added(name: str) -> float | None:
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            return sum(values) if values else None

        return Row(
            name="total",
            floor=added("floor"),
            seconds=None if self.calibration is None else added("seconds"),
            memory=max(row.memory for row in rows if row.memory is not None),
            disk=added("disk"),
            checkpoint=max(row.checkpoint for row in rows),
        )

    def _evaluated(self, method: Method) -> float:
        """F an image of measuring a student: what it ships, and its members where that is another network."""
        if method.student == "hydra":
            head = sum(layer.macs for layer in self.cost.layers if layer.in_head) / self.cost.macs
            return 1 - head + self.job.members * head
        return {"be": self.job.members, "latentbe": self.job.members + 1}.get(method.student, 1)

    def _floor(self, trained: list[tuple[list[Part], int, int]], measured: list[tuple[float, int]]) -> float | None:
        """`trained`: (parts, steps, B). `measured`: (F an image, images)."""
        if self.device is None:
            return None
        device = self.device
        floor = sum(steps * part.floor(B, device) for parts, steps, B in trained for part in parts)
        return floor + whole(self.cost, forward=1).floor(1, device) * sum(F * images for F, images in measured)

    def _seconds(
        self, trained: list[tuple[list[Part], int]], measured: list[tuple[float, int]], method: Method
    ) -> float | None:
        """`trained`: (parts, images). `measured`: (F an image, images)."""
        if self.calibration is None:
            return None
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

    def _workload(self, student: Student, method: Method, *, teachers: bool) -> Workload:
        """What is asked for its memory; the teachers are there once there are students."""
        job = self.job
        classifiers = [] if teachers else [without_values(self.classifier) for _ in range(job.members)]
        return Workload(
            teachers=Teachers(classifiers, job.num_classes) if classifiers else None,
            student=student,
            method=method,
            image_shape=(job.image_size, job.image_size, job.in_channels),
            precision=job.precision,
            backend=job.backend,
            device_type="cpu" if job.device == "cpu" else "cuda",
        )

    def _workspace(self, rows: int) -> float:
        """Input, output and one copy in another order of the largest layer."""
        element_bytes = 2 if self.job.precision == "bf16" else 4
        return 3 * rows * element_bytes * max(layer.outputs for layer in self.cost.layers)

    def _exported(self, method: Method, params: int) -> int:
        """Bytes of a run's best and last network; `latentbe` ships the averaged one."""
        return 2 * 4 * (self.cost.params if method.student == "latentbe" else params)


def render(planned: Plan) -> Group:
    """The plan as one table and the notes that say where its numbers come from; for `rich.console.Console.print`."""
    table = Table(box=None, header_style="bold")
    table.add_column("", no_wrap=True)
    floor = "floor" if planned.device is None else f"floor {planned.device.name}"
    for column in ("images", "F/image", floor, "predicted", "memory", "disk"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in [*planned.rows, planned.total]:
        table.add_row(
            row.name,
            "" if row.images is None else format_count(row.images),
            "" if row.F is None else f"{row.F:.3g}",
            "" if row.floor is None else format_seconds(row.floor),
            "" if row.seconds is None else format_seconds(row.seconds),
            "" if row.memory is None else format_bytes(row.memory),
            "" if row.disk is None else format_bytes(row.disk + row.checkpoint),
            style="bold" if row is planned.total else "",
        )
    calibration, device = planned.calibration, planned.device
    if calibration is None:
        notes = ["predicted: not known, the device is not at hand; the floor is what no program goes below."]
    else:
        rate = (
            f"{1e3 * calibration.forward:.3g} ms a forward and {1e3 * calibration.step:.3g} ms a training step an image"
        )
        notes = [
            f"predicted from a calibration of up to {calibration.images} images a step on this machine "
            f"({calibration.where}): {rate}. Start-up, loading and recalibration are not in it."
        ]
    if device is not None:
        notes.append(f"floor: {device.rates}; see python -m ensdistill.roofline.")
    notes.append("memory: tensors at the peak; Python and its libraries come on top.")
    notes += [row.too_large for row in planned.rows if row.too_large is not None]
    notes.append("disk: best and last network of each run, one checkpoint, the .beton.")
    return Group(table, "", *notes)


def format_seconds(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`, `31 h`, `27 days`."""
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
    """`1,797`, `36 M`."""
    return f"{n:,}" if n < 1e6 else f"{n / 1e6:.3g} M"


def format_bytes(size: float) -> str:
    """`512 kB`, `3.1 MB`, `12 GB`, in powers of 1,000."""
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.5:
            return f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"
    return f"{size / 1000:.1f} TB"

"""Training steps on tensors without values: what a recipe launches, and which layers of a training are unmeasured.

Ahead-of-time compilation runs them to see every launch; a training runs its own before its first step, so that no
measurement of a layer falls into training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ensdistill.config.configs import Config, Training
from ensdistill.config.methods import Method
from ensdistill.engine.launch_key import Key
from ensdistill.engine.networks import KernelNetworks, Networks
from ensdistill.engine.operations import Operations, RecordingOperations, TritonOperations, TunedOperations
from ensdistill.engine.tuning.candidates import Candidate, candidates
from ensdistill.kernels.loss.record import record
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student, build_student
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.errors import UserError
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, measure_names, train_step
from ensdistill.training.together import TeacherNetworks, teachers_step

Program = Callable[[], None]
Tiles = Literal["default", "all"]

IMAGES = {
    "digits": (8, 1, 10),
    "fashion-mnist": (28, 1, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "tiny-imagenet": (64, 3, 200),
    "imagenet": (224, 3, 1000),
}
"""Side, channels and classes of the sources that recipes name: no data need be there to compile for them."""


class _EveryTile(RecordingOperations):
    """Our kernels, every convolution with each tile that tuning would measure."""

    def run(self, key: Key, tensors: Sequence[Tensor], options: dict[str, Any]) -> Any:
        for candidate in candidates(key, tensors[0].device):
            if candidate.provider == "triton":
                candidate.run(key, tensors, options)
        return Candidate(provider="triton").run(key, tensors, options)


def programs(config: Config, tiles: Tiles = "default") -> Iterator[Program]:
    """One training step in bf16 of a teacher, of all teachers in one go, of each of the students, where kernels can.

    Run them under `launch.recording`. `tiles`: whether convolutions take their default tile, or every one in turn.

    Raises:
        UserError: the recipe's source has no known shape.
    """
    if config.source not in IMAGES:
        raise UserError(f"source {config.source}: its shape is not known; expected one of {', '.join(IMAGES)}")
    operations: Operations = TritonOperations() if tiles == "default" else _EveryTile()
    yield lambda: _step(config, Method(student="ce"), config.teacher, operations)
    yield lambda: _teachers_step(config, operations)
    for method in map(Method.parse, config.methods):
        yield lambda method=method: _step(config, method, config.student, operations)  # type: ignore[misc]


def _classifier(config: Config) -> Classifier:
    """Built on the CPU: what a constructor computes of values must not meet `meta`."""
    side, C, K = IMAGES[config.source]
    network = build(config.network, num_classes=K, in_channels=C, image_size=side)
    return Classifier(network, [0.5] * C, [0.5] * C)


def _step_config(config: Config, method: Method) -> StepConfig:
    pad = config.pad if config.crop == "pad" else 0
    return StepConfig(method=method, seed=config.seed, tau=config.tau, alpha=config.alpha, pad=pad, flip=config.flip)


def _teachers_step(config: Config, operations: Operations) -> None:
    classifier, E, B = _classifier(config), config.members, config.teacher.batch_size
    side, C, _ = IMAGES[config.source]
    networks = TeacherNetworks([classifier] * E, "bf16", operations, torch.device("meta"))
    if networks.notes:
        return
    state = State(networks=networks, optimizer=make_optimizer(networks.student, config.teacher.weight_decay))
    images_EBHWC = torch.empty(E, B, side, side, C, dtype=torch.uint8, device="meta")
    labels_EB = torch.empty(E, B, dtype=torch.int64, device="meta")
    counter, method = torch.empty(3, dtype=torch.int64, device="meta"), Method(student="ce")
    measures = teachers_step(state, _step_config(config, method), images_EBHWC, labels_EB, lr=0.1, counter=counter)
    _record(measures, measure_names(method), E, counter)


def _step(config: Config, method: Method, training: Training, operations: Operations) -> None:
    prepare_step(config, method, training, operations)()


def prepare_step(config: Config, method: Method, training: Training, operations: Operations) -> Program:
    """One training step of `method`; nothing where kernels cannot express the networks.

    Making it folds the teachers, which a training does once.
    """
    side, C, K = IMAGES[config.source]
    classifier = _classifier(config)
    student = build_student(method, lambda seed: copy.deepcopy(classifier), E=config.members, seed=0).to("meta")
    teachers = None
    if method.needs_teachers:
        teachers = Teachers([copy.deepcopy(classifier).to("meta") for _ in range(config.members)], K)
    networks = KernelNetworks(teachers, student, "bf16", operations)
    if networks.notes:  # the modules run then, and libraries bring kernels of their own
        return lambda: None
    state = State(networks=networks, optimizer=make_optimizer(student, training.weight_decay))
    B = training.batch_size
    images_BHWC = torch.empty(B, side, side, C, dtype=torch.uint8, device="meta")
    labels_B = torch.empty(B, dtype=torch.int64, device="meta")
    step_config, names = _step_config(config, method), measure_names(method)
    counter = torch.empty(3, dtype=torch.int64, device="meta")

    def run() -> None:
        measures = train_step(state, step_config, images_BHWC, labels_B, lr=0.1, counter=counter)
        _record(measures, names, 1, counter)

    return run


def _record(measures: dict[str, Tensor], names: Sequence[str], networks: int, counter: Tensor) -> None:
    """What the stepper does with a step's measures. Its table has as many rows as a log line has steps: a run-time
    number."""
    table = torch.empty(50, networks, len(names), dtype=torch.float64, device="meta")
    record(table, counter, [measures[name] for name in names], kernel=True)


def record_step(
    teachers: Teachers | None,
    student: Student,
    method: Method,
    *,
    B: int,
    image_shape: tuple[int, int, int],
    precision: Precision,
) -> RecordingOperations:
    """The convolutions of one training step (`keys`), how often each runs, the `passes` between them, and `notes`.

    Args:
        teachers, student: copied without their values, and left alone.
        B: images a step.
        image_shape: (H, W, C).
    """
    teachers = None if teachers is None else copy.deepcopy(teachers).to("meta")
    operations = RecordingOperations()
    networks = KernelNetworks(teachers, copy.deepcopy(student).to("meta"), precision, operations)
    operations.notes = networks.notes
    operations.clear()  # the teachers' weights are laid out once a run
    H, W, C = image_shape
    with torch.device("meta"):
        x_BCHW = torch.empty(B, C, H, W)
        # what has no kernels runs through the modules: there is nothing of it to record
        if networks.frozen is not None and teachers is not None:
            if method.shown in ("tdiv", "tdiv-sdiv"):
                with_student = method.shown == "tdiv-sdiv" and networks.frozen_student is not None
                networks.divergence_gradient(x_BCHW, (0, teachers.E - 1), with_student=with_student)
            elif method.shown in ("ods", "confods"):
                networks.ods_gradient(x_BCHW, 0, torch.empty(B, teachers.num_classes), 4.0)
            networks.teacher_logits(x_BCHW)
        if networks.training is not None:
            networks.student_logits(x_BCHW).sum().backward()
    return operations


def record_teachers_step(
    networks: TeacherNetworks, *, B: int, image_shape: tuple[int, int, int]
) -> RecordingOperations:
    """The same of a step of teachers that train together, `B` images each; `networks` is left alone."""
    operations = RecordingOperations()
    classifiers = [networks.together.classifier(m) for m in range(networks.together.E)]
    copied = TeacherNetworks(classifiers, networks.precision, operations, torch.device("meta"))
    operations.notes = copied.notes
    operations.clear()
    H, W, C = image_shape
    if copied.training is not None:
        x_EBCHW = torch.empty(len(classifiers), B, C, H, W, device="meta")
        with torch.device("meta"):
            copied.student_logits(x_EBCHW).sum().backward()
    return operations


def unmeasured(
    networks: Networks, method: Method, *, B: int, image_shape: tuple[int, int, int]
) -> tuple[TunedOperations, list[Key]] | None:
    """What a step of `networks` runs and nobody has measured on this device yet, and where to measure it.

    None where nothing is, or where nothing has to be: all but `--backend auto` on a GPU.
    """
    tuned = getattr(networks, "operations", None)
    if not isinstance(tuned, TunedOperations) or not tuned.measures:
        return None
    if isinstance(networks, TeacherNetworks):
        recorded = record_teachers_step(networks, B=B, image_shape=image_shape)
    else:
        recorded = record_step(
            networks.teachers, networks.student, method, B=B, image_shape=image_shape, precision=networks.precision
        )
    keys = [key for key in recorded.keys if tuned.table.get(key) is None]
    return (tuned, keys) if keys else None

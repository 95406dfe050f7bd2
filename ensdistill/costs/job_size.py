"""How large a job is: what a plan needs to know of a command, found without writing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ensdistill.config.configs import Command
from ensdistill.config.methods import Method
from ensdistill.data.sources.registry import open_source
from ensdistill.runtime.environment import choose_device, choose_precision
from ensdistill.runtime.errors import UserError
from ensdistill.training.loop import validation_epochs


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """What a plan needs to know of a job."""

    network: str
    """As `ensdistill.models.build` has it, or the import path of a builder; teachers and students."""
    network_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of that builder."""
    num_classes: int
    """K."""
    in_channels: int
    """Channels of an image."""
    image_size: int
    """Side of an image in pixels."""
    num_train: int
    """Training images."""
    num_valid: int
    """Validation images."""
    num_test: int
    """Test images."""
    members: int
    """E."""
    teacher_epochs: int
    """Epochs of each teacher."""
    student_epochs: int
    """Epochs of each student."""
    teacher_batch_size: int
    """Images a step of a teacher."""
    student_batch_size: int
    """Images a step of a student."""
    methods: tuple[Method, ...]
    """The students."""
    seeds: int = 1
    """Students a method."""
    teacher_validations: int
    """Validations of each teacher while it trains."""
    student_validations: int
    """Validations of each student while it trains."""
    train_teachers: bool = True
    """Whether the teachers are trained here; otherwise they are there already."""
    write_data: bool = True
    """Whether the .beton is written; otherwise it is there already."""
    stored_image_bytes: int | None = None
    """Bytes an image in the .beton. None: its pixels."""
    threads: int | None = None
    """CPU threads that were asked for."""
    device: str = "cpu"
    """Where it will run: cpu, cuda, cuda:1, or a name that roofline.py knows (H100), which gives its floor alone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of convolutions."""
    backend: str = "auto"
    """What computes the networks of the step: see `dispatch.Backend`."""

    def __post_init__(self) -> None:
        for name in ("num_train", "members", "teacher_epochs", "student_epochs", "seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"plan: {name} is {getattr(self, name)}, expected at least 1; give a positive number")
        stages = [("student", self.student_batch_size)] + [("teacher", self.teacher_batch_size)] * self.train_teachers
        for stage, B in stages:
            if not 1 <= B <= self.num_train:
                raise UserError(
                    f"plan: the {stage}s' batch-size is {B}, expected 1 to the number of training images, "
                    f"{self.num_train}; choose another"
                )


@dataclass(frozen=True)
class DataSize:
    """Sizes of a data set."""

    num_classes: int
    channels: int
    side: int
    train: int
    valid: int
    test: int


# Published sizes, for a plan on a machine that does not have the data; splits as data/ makes them.
_PUBLISHED = {
    "cifar10": DataSize(10, 3, 32, 45_000, 5_000, 10_000),
    "cifar100": DataSize(100, 3, 32, 45_000, 5_000, 10_000),
    "fashion-mnist": DataSize(10, 1, 28, 55_000, 5_000, 10_000),
    "tiny-imagenet": DataSize(200, 3, 64, 90_000, 10_000, 10_000),
    "imagenet": DataSize(1000, 3, 224, 1_231_167, 50_000, 50_000),
}


def job_size(command: Command, say: Callable[[str], None]) -> JobSize:
    """The size of the job that `command` asks for.

    Args:
        say: told where the data are not at hand and their published sizes are taken.

    Raises:
        UserError: the data are not at hand and their size is not known.
    """
    config = command.config
    data = _data_size(command, say)
    num_train = config.train_images or data.train
    device = choose_device(command.device)
    return JobSize(
        network=config.network,
        network_args=config.builder_arguments(),
        num_classes=data.num_classes,
        in_channels=data.channels,
        image_size=config.image_size or data.side,
        num_train=num_train,
        num_valid=data.valid,
        num_test=data.test,
        members=config.members,
        teacher_epochs=config.teacher.epochs,
        student_epochs=config.student.epochs,
        teacher_batch_size=config.teacher.batch_size,
        student_batch_size=config.student.batch_size,
        methods=tuple(Method.parse(text) for text in config.methods) if command.stage != "teachers" else (),
        seeds=command.seeds,
        teacher_validations=len(validation_epochs(config.teacher.epochs)),
        student_validations=len(validation_epochs(config.student.epochs)),
        train_teachers=not config.teachers and command.stage in ("all", "teachers"),
        threads=command.threads,
        device=str(device),
        precision=choose_precision(config.precision, device),
        backend=config.backend,
    )


def _data_size(command: Command, say: Callable[[str], None]) -> DataSize:
    config = command.config
    try:
        source = open_source(config.source, config.data)
        splits = source.splits
    except UserError:
        if config.data is not None or config.source not in _PUBLISHED:
            raise
        say(f"{config.source}: not at hand, planned with its published size")
        return _PUBLISHED[config.source]
    train = splits["train"]
    shape = getattr(train.images, "shape", None) or (0, *(source.content.image_shape or (0, 0, 3)))
    side = shape[1] or config.image_size
    if not side:
        raise UserError(f"image-size: not given, but {config.source} has images of many sizes; give --image-size 224")
    return DataSize(
        source.num_classes, shape[3], side, *(len(splits[name].labels) for name in ("train", "valid", "test"))
    )

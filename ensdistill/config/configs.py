"""The configuration of a run: every number that its results depend on, and the command's other options.

`Config` is what a recipe returns, what `config.json` holds and what `--resume` compares; any field can be overridden on
the command line. `Command` adds what says how, not what, to compute.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tyro

from ensdistill.config.methods import Method
from ensdistill.config.updates import Optimizer, Updates
from ensdistill.runtime.environment import usable_cores
from ensdistill.runtime.errors import UserError, nearest
from ensdistill.runtime.files import atomic_write, parse_json, read_json

MAX_IMAGE_SIDE = 8192
"""Most pixels of a side of the images that networks see: what is larger is a mistake, or made to fill memories."""
MAX_THREADS_A_CORE = 4
"""More than this is a mistake. Some more than there are cores may be asked for, of which as many are used as there are
cores: a run may go on where there are fewer."""
Crop = Literal["pad", "random-resized"]
Stage = Literal["teachers", "distill", "evaluate", "all"]


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise UserError(f"{name}: got {found}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Schedule of one network: warm-up, one cosine."""

    epochs: int = 200
    """Passes over the training images."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from learning rate 0."""
    lr: float = 0.1
    """Learning rate after the warm-up; one cosine to 0 follows."""
    batch_size: int = 128
    """Images a step. An incomplete last batch is dropped."""
    weight_decay: float = 5e-4
    """Weight of half the squared norm of every parameter; for adamw the decoupled decay, a step and learning rate."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(self.epochs <= 1_000_000, "epochs", self.epochs, "at most 1,000,000")
        _require(
            0 <= self.warmup_epochs < self.epochs,
            "warmup-epochs",
            self.warmup_epochs,
            f"0 to below epochs = {self.epochs}",
        )
        _require(self.lr > 0, "lr", self.lr, "a positive number")
        _require(self.batch_size >= 1, "batch-size", self.batch_size, "at least 1")
        _require(self.weight_decay >= 0, "weight-decay", self.weight_decay, "zero or a positive number")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every number that the results of a run depend on."""

    recipe: str
    """Source of the defaults: a recipe's name, or the config.json of an earlier run."""
    source: str
    """Data: digits, fashion-mnist, cifar10, cifar100, tiny-imagenet, folder, npy or beton."""
    data: Path | None = None
    """Place of the data: a folder, an archive, a .beton. Default: the source's own place; with a path, the source is
    recognised."""
    network: str = "wrn28x4"
    """Teachers and students: wrn{depth}x{width}, resnet{20,32,44,56,110}[x{width}], resnet18, resnet34, resnet50,
    or a builder of your own by its import path package.module:function, such as timm:create_model."""
    network_args: str = "{}"
    """Keyword arguments of that builder, as JSON."""
    members: int = 4
    """E: teachers, and the student's members."""
    methods: tuple[str, ...] = ("kd", "latentbe", "latentbe+tdiv-sdiv")
    """Students to distil, each student[+data shown]: ce, kd, latentbe, be, hydra; clean, gaussian, ods, confods, tdiv,
    tdiv-sdiv."""
    teacher: Training = field(default_factory=Training)
    """Schedule of each teacher's training."""
    student: Training = field(default_factory=Training)
    """Schedule of each student's training."""
    tau: float = 4.0
    """Temperature that softens the distillation's targets."""
    alpha: float = 1.0
    """Weight of the distillation; the labels have 1 - alpha."""
    factor_rate: float = 1.0
    """The rank-one factors learn at factor-rate times members times the learning rate. 1 is the official value."""
    optimizer: Optimizer = "sgd"
    """Optimizer of every network: sgd: Nesterov SGD with momentum 0.9; adamw: AdamW with betas 0.9 and 0.999, whose
    learning rate is 1e-3 and weight decay 1e-2 where a recipe has those of sgd and none are given."""
    ema: float | None = None
    """Decay a step, such as 0.999, of an exponential moving average of the weights of every network that is trained,
    which is kept, validated and shipped beside it. None: there is none."""
    swa: int | None = None
    """Average the weights after each of so many last epochs (SWA), with BatchNorm statistics measured anew, and ship it
    beside every network that is trained. None: there is none."""
    pad: int = 4
    """Zero pixels a side before the random crop."""
    flip: bool = True
    """Flip images with probability 1/2."""
    crop: Crop = "pad"
    """pad: zero-pad and crop images of one size; random-resized: image files, cut to image-size."""
    image_size: int | None = None
    """Side in pixels of the crops of image files. None: the images' own size."""
    train_images: int | None = None
    """Use only so many of the training images: the first ones of digits, Fashion-MNIST and CIFAR, of other data the
    same share of each class. None: all."""
    seed: int = 0
    """Key of every random draw. Teacher t has seed + t, student n has seed + 1000 + n."""
    recalibrate_bn: bool = False
    """Measure the averaged network's own BatchNorm statistics in one pass over the training images before it ships."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of convolutions. auto: bf16 where the device has it (GPU, CPU with avx512_bf16 or amx), else fp32."""
    backend: Literal["auto", "tuned", "reference", "library", "triton"] = "auto"
    """Backend of the step's networks. reference: their modules in plain PyTorch; library: member-batched by
    cuDNN; triton: the kernels; auto: on a GPU the faster of the two for each layer shape, on a CPU the reference;
    tuned: the same where it was measured before (`ensdistill.tune`), the kernels elsewhere: it starts at once."""
    sync_bn: bool = False
    """Normalise by the statistics of all processes' rows where several train (torchrun). Otherwise each process
    normalises its own, as the official code does on several devices, and evaluation averages what they have."""
    teachers: tuple[Path, ...] = ()
    """Teachers of your own, in place of training them: our .safetensors, official Flax checkpoints, PyTorch
    state_dicts, run folders."""
    teacher_builder: str | None = None
    """Import path package.module:function that builds the network of a PyTorch state_dict."""
    teacher_args: str = "{}"
    """Keyword arguments of the builder, as JSON."""

    def __post_init__(self) -> None:
        _require(self.members >= 1, "members", self.members, "at least 1")
        _require(self.members <= 1_000, "members", self.members, "at most 1,000")
        _require(self.tau > 0, "tau", self.tau, "a positive number")
        _require(0 <= self.alpha <= 1, "alpha", self.alpha, "0 to 1")
        _require(self.factor_rate >= 0, "factor-rate", self.factor_rate, "zero or a positive number")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a number between 0 and 1, such as 0.999")
        trained = {"student.epochs": self.student} | ({} if self.teachers else {"teacher.epochs": self.teacher})
        for name, training in trained.items():
            _require(
                self.swa is None or 1 <= self.swa <= training.epochs,
                "swa",
                self.swa,
                f"1 to {name} = {training.epochs}",
            )
        _require(self.train_images is None or self.train_images >= 1, "train-images", self.train_images, "at least 1")
        _require(
            self.image_size is None or 1 <= self.image_size <= MAX_IMAGE_SIDE,
            "image-size",
            self.image_size,
            f"1 to {MAX_IMAGE_SIDE} pixels",
        )
        _require(self.pad >= 0, "pad", self.pad, "zero or more pixels")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        self.builder_arguments()
        for text in self.methods:
            method = Method.parse(text)
            if method.shown in ("tdiv", "tdiv-sdiv") and self.members < 2:
                raise UserError(
                    f"members: {text} compares two members, got members = {self.members}; "
                    "give at least 2, or another method"
                )
        methods = [Method.parse(text) for text in self.methods]
        if self.members < 2 and (found := next((method for method in methods if method.has_members), None)):
            raise UserError(
                f"members: {found} has a member for each teacher, got members = {self.members}; "
                "give at least 2, or the methods kd and ce"
            )
        names = tuple(map(str, methods))
        _require(len(set(names)) == len(names), "methods", ", ".join(self.methods), "each method once")
        object.__setattr__(self, "methods", names)  # kd+clean is kd: one method, one folder

    @property
    def updates(self) -> Updates:
        """Optimizer, and averages of the weights over time."""
        return Updates(optimizer=self.optimizer, ema=self.ema, swa=self.swa)

    @property
    def builder(self) -> str | None:
        """The import path of a network of somebody else's; None for one of ours."""
        return self.network if ":" in self.network else None

    def builder_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the builder, read from `network_args`.

        Raises:
            UserError: it is no JSON object, or the network is one of ours, which takes none.
        """
        try:
            arguments = parse_json(self.network_args)
        except ValueError as error:
            raise UserError(
                f"network-args: {self.network_args[:200]!r} is no JSON ({error}); "
                "expected such as '{\"num_classes\": 10}'"
            ) from error
        _require(isinstance(arguments, dict), "network-args", self.network_args, "a JSON object")
        if arguments and self.builder is None:
            raise UserError(
                f"network-args: {self.network} takes none; they are for a --network package.module:function"
            )
        return arguments

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "config.json") -> Config:
        """The configuration that `to_json` gave.

        Raises:
            UserError: a field is unknown, missing, or has a value that it cannot have.
        """
        _require_known(cls, values, where)
        for stage in ("teacher", "student"):
            if isinstance(values.get(stage), dict):
                _require_known(Training, values[stage], f"{where}: {stage}")
        try:
            config = msgspec.convert(values, cls, dec_hook=_read_path)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, UserError):  # a value of the right type that makes no sense
                raise UserError(f"{where}: {error.__cause__}") from error
            raise UserError(f"{where}: {error}; expected the fields {', '.join(_names(cls))}") from error
        if not re.fullmatch(r"\w[\w.-]*", config.recipe):  # it names the run folder
            raise UserError(f"{where}: recipe: got {config.recipe!r}, expected a name of letters, digits, . and -")
        return config


def _read_path(kind: type[Path], value: object) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"expected the text of a path, got {value!r}")
    return kind(value)


def _names(cls: type[Config | Training]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _require_known(cls: type[Config | Training], values: dict[str, Any], where: str) -> None:
    names = _names(cls)
    for name in values:
        if name not in names:
            raise UserError(f"{where}: there is no field '{name}'{nearest(name, names)}; expected {', '.join(names)}")


@dataclass(frozen=True, kw_only=True)
class Command:
    """Distil an ensemble of image classifiers into one network.

    With no arguments: the `digits` recipe, start to end, on data that scikit-learn brings along.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Path | None = None
    """The run folder. Default: runs/RECIPE."""
    stage: Stage = "all"
    """Stop after the teachers, distil with teachers that exist, or only evaluate what exists."""
    seeds: int = 1
    """Students a method, from different seeds; the table then shows mean ± sd."""
    plan: bool = False
    """Print the predicted time, memory, disk and floor of the whole job, and end."""
    resume: bool = False
    """Go on where an unfinished run stopped, in the middle of an epoch."""
    device: str | None = None
    """Device to compute on: cpu, cuda, cuda:1. Default: a GPU where there is one."""
    threads: int | None = None
    """CPU threads of each process. Default: as many as there are cores, or this process's share of them under torchrun;
    one where the network's layers are tiny. Never more than there are cores."""
    cache: Literal["auto", "gpu", "host", "none"] = "auto"
    """Place of decoded training images: gpu: all of them on the device, as uint8; host: in memory; none: decoded
    anew every epoch; auto: on a GPU where they take at most a quarter of its free memory, else in memory below 1 GiB.
    Batches are the same."""
    teachers_together: Literal["auto", "yes", "no"] = "auto"
    """Train the teachers as one member-batched network: each becomes what it becomes alone. auto: whichever is faster;
    on a CPU one after another, on a GPU measured before the first step."""
    capture: bool = True
    """On a GPU, capture each training's step as one CUDA graph; one that asks PyTorch's modules, where that gives the
    same numbers."""
    compile: Literal["auto", "yes", "no"] | None = None
    """Let torch.compile compute what PyTorch's modules do. auto: where the run then ends sooner, measured before a
    training's first step and kept for those like it. Default: auto on a GPU; no on a CPU, where digits do not hang on
    how fast it is."""
    log_every: int = 20
    """Steps between two log lines."""
    monitor_every: float = 1.0
    """Seconds between two looks at the device: utilisation, clock, power, throttling. 0: none."""
    max_silence: float = 90.0
    """Seconds without a sign of life from one of several processes (torchrun) after which the run ends. 0: never."""

    def __post_init__(self) -> None:
        _require(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        _require(self.log_every >= 1, "log-every", self.log_every, "at least 1")
        _require(0 <= self.monitor_every < float("inf"), "monitor-every", self.monitor_every, "zero or more seconds")
        _require(0 <= self.max_silence < float("inf"), "max-silence", self.max_silence, "zero or more seconds")
        cores = usable_cores()
        _require(
            self.threads is None or 1 <= self.threads <= MAX_THREADS_A_CORE * cores,
            "threads",
            self.threads,
            f"1 to {MAX_THREADS_A_CORE * cores}, for this process has {cores} cores",
        )

    def shared_options(self) -> dict[str, Any]:
        """Options that several processes of one run must have alike, as JSON values by name: all but the threads."""
        options: dict[str, Any] = {}
        for name, value in self.config.to_json().items():
            stage = value if isinstance(value, dict) else None
            options |= {name: value} if stage is None else {f"{name}.{key}": stage[key] for key in stage}
        options |= {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("config", "threads")
        }
        return {
            f"--{name.replace('_', '-')}": str(value) if isinstance(value, Path) else value
            for name, value in options.items()
        }


def write_config(path: Path, config: Config) -> None:
    """Write `config` as readable JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(config.to_json(), indent=2) + "\n", encoding="utf-8")


def read_config(path: Path) -> Config:
    """Read what `write_config` wrote.

    Raises:
        UserError: not readable, not JSON, or not a configuration.
    """
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable JSON configuration ({error}); expected one that a run wrote"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected a JSON object with the fields of a configuration, got {type(values).__name__}"
        )
    return Config.from_json(values, str(path))


# Fields in which two runs of one folder may differ: which students are asked for does not change any of them.
_MAY_DIFFER = {"methods"}


def require_same_config(folder: Path, config: Config, may_differ: Collection[str] = ()) -> None:
    """Check that `folder` is new, holds nothing that was trained, or a run of this configuration.

    Args:
        may_differ: fields that are compared elsewhere.

    Raises:
        UserError: the first field that differs.
    """
    path = folder / "config.json"
    if not path.exists() or not any(folder.glob("*/*/metrics.jsonl")):
        return
    theirs, ours = read_config(path).to_json(), config.to_json()
    for name, value in ours.items():
        if name not in _MAY_DIFFER and name not in may_differ and theirs.get(name) != value:
            raise UserError(
                f"{folder}: holds a run of another configuration ({name} is {theirs.get(name)} there, {value} here); "
                "choose another --out, or give the same options"
            )

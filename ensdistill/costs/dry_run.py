"""Training steps on tensors without values (`meta`): nothing is computed, and every launch, layer and byte is there.

`dry_step` is such a step. Ahead-of-time compilation runs it to see what is launched, memory.py to count bytes, `tune`
and a training before its first step to see which layers nobody has measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ensdistill.config.configs import Config, Training
from ensdistill.config.methods import Method
from ensdistill.config.updates import SGD, Updates
from ensdistill.engine.launch_key import Key
from ensdistill.engine.networks import KernelNetworks, Networks
from ensdistill.engine.operations import Operations, RecordingOperations, TritonOperations, TunedOperations
from ensdistill.engine.tuning.candidates import Candidate, candidates
from ensdistill.kernels.conv.cudnn import unmet_columns
from ensdistill.kernels.loss.record import record
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student, build_student
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.errors import UserError
from ensdistill.training.from_config import make_classifier, make_state, step_config
from ensdistill.training.step import StepConfig, measure_names, train_step
from ensdistill.training.together import TeacherNetworks, TeachersInTraining, teachers_step

if TYPE_CHECKING:
    from ensdistill.costs.data_size import DataSize

Program = Callable[[], None]
Tiles = Literal["default", "all"]

_LOGGED_STEPS = 50
"""Rows of the table of measures: a run-time number, which no kernel is compiled for."""
_META = torch.device("meta")
_M = TypeVar("_M", bound=nn.Module)


# ---- networks and a step on `meta` ----------------------------------------------------------------------------------


def without_values(module: _M) -> _M:
    """A copy on `meta`, in which is shared what was shared; the values are never copied."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def teachers_without_values(classifier: Classifier, E: int, num_classes: int) -> Teachers:
    """E teachers on `meta`, each of the modules of `classifier`."""
    return Teachers([without_values(classifier) for _ in range(E)], num_classes)


def networks_on_meta(
    teachers: Teachers | None, student: Student, precision: Precision, operations: Operations | None
) -> Networks:
    """The networks that training would make of these, which lie on `meta`: see `engine.networks.make_networks`.

    `student`: or teachers that train together, which are no student and have no other teachers.
    """
    if isinstance(student, TeachersInTraining):
        return _Together(student, precision, operations)
    if operations is None:
        return _Modules(teachers, student, precision)
    return _Kernels(teachers, student, precision, operations)


def dry_step(
    networks: Networks,
    config: StepConfig,
    *,
    B: int,
    image_shape: tuple[int, int, int],
    updates: Updates = SGD,
) -> Callable[[], dict[str, Tensor]]:
    """One training step of `networks`, which lie on `meta`: runs at every call, and returns the measures.

    The optimizer's update is left out: where it is real it is fused, launches none of our kernels and makes no tensor.

    Args:
        B: images a step; of teachers that train together, of each.
        image_shape: (H, W, C).
        updates: optimizer and averages over time; those of `sgd` and none by default.
    """
    state = make_state(networks, updates, weight_decay=config.weight_decay)
    state.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
    batch: tuple[int, ...] = (B,)
    step: Callable[..., dict[str, Tensor]] = train_step
    if isinstance(networks, TeacherNetworks):
        batch, step = (networks.together.E, B), teachers_step

    def run() -> dict[str, Tensor]:
        images_BHWC = torch.empty(*batch, *image_shape, dtype=torch.uint8, device=_META)
        labels_B = torch.empty(batch, dtype=torch.int64, device=_META)
        counter = torch.empty(3, dtype=torch.int64, device=_META)
        return step(state, config, images_BHWC, labels_B, lr=0.1, counter=counter)

    return run


@contextmanager
def needs_no_values(config: Config) -> Iterator[None]:
    """Run what runs the network of `config` on `meta`; that of somebody else may look at values that are not there.

    Raises:
        UserError: it does.
    """
    try:
        yield
    except RuntimeError as error:
        if config.builder is None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{config.network}: cannot be run on tensors without values ({reason}), by which its work and its memory "
            "are counted; let its forward do nothing that depends on a tensor's values, such as .item() or an if"
        ) from error


@torch.no_grad()
def require_variance(network: nn.Module, B: int, image_shape: tuple[int, int, int], option: str) -> None:
    """Check that norms of `network` have more than one value a channel in training, whose variance they take.

    Args:
        B: rows that are normalised together.
        image_shape: (H, W, C).
        option: what gives `B`, for the message.

    Raises:
        UserError: a norm has one value a channel, as BatchNorm on one image of a 1x1 map.
    """
    H, W, C = image_shape
    try:
        without_values(network).train()(torch.empty(B, C, H, W, device=_META))
    except ValueError as error:
        if "Expected more than 1" in str(error):  # so PyTorch's norms say it
            raise UserError(
                f"{option}: got {B}, but images of {H}x{W} pixels leave a norm of the network one value a channel, "
                "which has no variance; give a larger batch-size, or larger images"
            ) from error
        raise
    except RuntimeError:
        return  # it needs values: what predicts its memory says so


def precision_of_gradients(
    precision: Precision,
    network: nn.Module,
    image_shape: tuple[int, int, int],
    *,
    device: torch.device,
    asked: str,
    say: Callable[[str], None],
) -> Precision:
    """Return `precision`, or fp32 where a CPU would not write all of a gradient of `network` in bf16.

    Args:
        image_shape: (H, W, C).
        asked: `--precision`, of which only `auto` may become another.
        say: shows one line.

    Raises:
        UserError: bf16 was asked for by name.
    """
    found = unwritten_gradient(network, image_shape) if device.type == "cpu" and precision == "bf16" else None
    if found is None:
        return precision
    what = f"on a CPU PyTorch leaves part of a weight's gradient unwritten in bf16 for a convolution of {found} pixels"
    if asked == "bf16":
        raise UserError(f"--precision bf16: {what}; give --precision fp32, or larger images")
    say(f"precision: fp32, since {what}")
    return "fp32"


@torch.no_grad()
def unwritten_gradient(network: nn.Module, image_shape: tuple[int, int, int]) -> str | None:
    """Name a convolution whose weight gradient PyTorch leaves partly unwritten on a CPU in bf16; None where none is.

    oneDNN's (torch 2.13 and 2.14): with a stride, where a column of the kernel meets no pixel (`unmet_columns`); in
    three dimensions on any small map.

    Args:
        image_shape: (H, W, C).
    """
    H, W, C = image_shape
    with _FindUnwritten() as found, suppress(RuntimeError):  # it needs values: what predicts its memory says so
        without_values(network).train()(torch.empty(2, C, H, W, device=_META))
    return found.name


class _FindUnwritten(TorchDispatchMode):
    """Looks for the convolution that `unwritten_gradient` names."""

    name: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and self.name is None:
            x, weight, _, stride, padding, dilation, is_transposed, *_ = args
            wide, narrow = (out, x) if is_transposed else (x, out)
            kernel, strides = "x".join(map(str, weight.shape[2:])), "x".join(map(str, stride))
            is_unwritten = weight.ndim == 5 or (
                weight.ndim == 4
                and max(stride) > 1
                and unmet_columns(
                    wide.shape[-1],
                    narrow.shape[-1],
                    k=weight.shape[-1],
                    stride=stride[-1],
                    padding=padding[-1],
                    dilation=dilation[-1],
                )
            )
            if is_unwritten:
                self.name = f"{kernel} with stride {strides} on maps of {'x'.join(map(str, wide.shape[2:]))}"
        return out


class _OnMeta:
    """Networks whose modules run on `meta`, where autocast has to be imitated."""

    precision: Precision

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        return _Autocast() if self.precision == "bf16" else nullcontext()


class _Modules(_OnMeta, Networks):
    pass


class _Kernels(_OnMeta, KernelNetworks):
    pass


class _Together(_OnMeta, TeacherNetworks):
    pass


# By name: the same for functions and for methods of tensors.
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm")
_IN_BF16 = frozenset((*_CONVOLUTIONS, *_PRODUCTS, "scaled_dot_product_attention"))


class _Autocast(TorchFunctionMode):
    """Casts operands of convolutions and matrix products as `torch.autocast` to bf16 does: parameters once."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _IN_BF16:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _cast(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if id(x) not in self.casts:
            self.casts[id(x)] = x.to(torch.bfloat16)
        return self.casts[id(x)]


# ---- every launch of a recipe, for ahead-of-time compilation --------------------------------------------------------


class _EveryTile(RecordingOperations):
    """Runs every convolution by our kernels with each tile that tuning would measure."""

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
    _published_size(config)
    operations: Operations = TritonOperations() if tiles == "default" else _EveryTile()
    of_teachers = Method(student="ce")
    yield lambda: prepare_step(config, of_teachers, config.teacher, operations)()
    yield lambda: prepare_step(config, of_teachers, config.teacher, operations, together=True)()
    for method in map(Method.parse, config.methods):
        yield lambda method=method: prepare_step(  # type: ignore[misc]
            config, method, config.student, operations
        )()


def _published_size(config: Config) -> DataSize:
    from ensdistill.costs.data_size import published_size  # readers of images, which a step on tensors does without

    return published_size(config.source)


def prepare_step(
    config: Config, method: Method, training: Training, operations: Operations, *, together: bool = False
) -> Program:
    """One training step of `method`, its measures recorded; nothing where kernels cannot express the networks.

    Making it folds the teachers, which a training does once. `together`: of all teachers as one network.
    """
    size = _published_size(config)
    # on the CPU: what a constructor computes of values must not meet `meta`
    classifier = make_classifier(config, num_classes=size.num_classes, image_shape=size.image_shape)
    teachers, student = _teachers_and_student(classifier, method, config.members, size.num_classes)
    if together:
        student = TeachersInTraining([without_values(classifier)] * config.members, for_kernels=True)
    networks = networks_on_meta(teachers, student, "bf16", operations)
    if networks.notes:  # the modules run then, and libraries bring kernels of their own
        return lambda: None
    step = dry_step(
        networks,
        step_config(config, method, training, config.seed),
        B=training.batch_size,
        image_shape=size.image_shape,
    )
    names, rows = measure_names(method), config.members if together else 1
    counter = torch.empty(3, dtype=torch.int64, device=_META)

    def run() -> None:
        measures = step()
        table = torch.empty(_LOGGED_STEPS, rows, len(names), dtype=torch.float64, device=_META)
        record(table, counter, [measures[name] for name in names], kernel=True)  # as the stepper does

    return run


def _teachers_and_student(
    classifier: Classifier, method: Method, E: int, num_classes: int
) -> tuple[Teachers | None, Student]:
    """Teachers, where `method` needs any, and student, on `meta`, each made of `classifier`."""
    student = build_student(method, lambda seed: copy.deepcopy(classifier), E=E, seed=0)
    teachers = teachers_without_values(classifier, E, num_classes) if method.needs_teachers else None
    return teachers, without_values(student)


# ---- every layer of a training, for measuring -----------------------------------------------------------------------


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
        teachers, student: copied without their values, and left alone; see `networks_on_meta`.
        B: images a step.
        image_shape: (H, W, C).
    """
    operations = RecordingOperations()
    meta_teachers = None if teachers is None else without_values(teachers)
    networks = networks_on_meta(meta_teachers, without_values(student), precision, operations)
    operations.notes = networks.notes
    operations.clear()  # the teachers' weights are laid out once a run
    dry_step(networks, StepConfig(method=method, seed=0, pad=0), B=B, image_shape=image_shape)()
    return operations


def operations_of(
    network: str,
    *,
    method: Method,
    E: int,
    B: int,
    image_size: int,
    in_channels: int = 3,
    num_classes: int = 100,
    precision: Precision = "bf16",
) -> RecordingOperations:
    """The convolutions of one training step of `network` as teachers and student, as `record_step` gives them.

    Raises:
        UserError: there is no such network, or kernels can express no pass over it.
    """
    made = build(network, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    classifier = Classifier(made, [0.5] * in_channels, [0.25] * in_channels)
    teachers, student = _teachers_and_student(classifier, method, E, num_classes)
    image_shape = (image_size, image_size, in_channels)
    try:
        operations = record_step(teachers, student, method, B=B, image_shape=image_shape, precision=precision)
    except ValueError as error:  # more elements than a kernel can number
        raise UserError(f"a batch of {B}, {image_size} pixels: {error}; choose fewer images or smaller ones") from error
    if not operations.keys:
        raise UserError(f"network '{network}': no pass has kernels ({'; '.join(operations.notes)}); choose another")
    return operations


def unmeasured_layers(
    networks: Networks, method: Method, *, B: int, image_shape: tuple[int, int, int]
) -> tuple[TunedOperations, list[Key]] | None:
    """The layers of a step of `networks` that nobody has measured on this device yet, and what measures them.

    None where there are none, or none has to be measured: all but `--backend auto` on a GPU.
    """
    tuned = getattr(networks, "operations", None)
    if not isinstance(tuned, TunedOperations) or not tuned.measures:
        return None
    recorded = record_step(
        networks.teachers, networks.student, method, B=B, image_shape=image_shape, precision=networks.precision
    )
    keys = [key for key in recorded.keys if tuned.table.get(key) is None]
    return (tuned, keys) if keys else None

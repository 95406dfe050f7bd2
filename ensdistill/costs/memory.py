"""How much memory training takes: predicted before it starts, measured after it.

`predict` runs the very step on tensors without values (`meta`) and adds up the bytes of every storage that is alive, so
that it holds for every network, method and backend without a formula of its own. Where `meta` is not the device:
- autocast does not exist there and is imitated: convolutions and matrix products in bf16, all else in its own type;
- on a GPU the library's element-wise work is compiled, here it is counted uncompiled, with all its temporaries, and so
  are the members' convolutions that are written straight into their places there: `library` is an upper bound;
- `auto` on a GPU is counted as our kernels, with a pass of its own for every norm and all second outputs stored;
- teachers of several normalisations are counted as if they shared one, which is one copy of the images for each less;
- temporaries inside an operation of PyTorch's own are not seen.
What no tensor counts, cuDNN's workspaces and the allocator's slack, is an allowance beside it.
"""

from __future__ import annotations

import copy
import functools
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ensdistill.config.methods import Method
from ensdistill.engine.networks import KernelNetworks, Networks
from ensdistill.engine.operations import LibraryOperations, TritonOperations
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.monitor.memory import CONTEXT_BYTES, SLACK, Prediction, _table, gigabytes
from ensdistill.runtime import streams
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.errors import UserError
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig, train_step

CUDA_BLOCK = 512
"""The CUDA allocator gives multiples of so many bytes."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training whose memory is asked for. Its networks may lie on any device; their values are never read."""

    teachers: Teachers | None
    """The teachers that are on the device meanwhile, idle or not."""
    student: Student
    """The network to train."""
    method: Method
    """What it is."""
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    precision: Precision
    """Arithmetic of convolutions."""
    backend: str
    """See `dispatch.Backend`."""
    device_type: str
    """`cpu` or `cuda`: where it will run."""


def predict(workload: Workload, B: int) -> Prediction:
    """Memory of `workload` with `B` images a step. Takes a second for a deep network, whatever its width and `B`."""
    with streams.meta_as(workload.device_type), Meter(workload.device_type) as meter:
        student = without_values(workload.student)
        teachers = None if workload.teachers is None else without_values(workload.teachers)
        for module in (student, *([] if teachers is None else [teachers])):
            meter.hold([*module.parameters(), *module.buffers()])
        parameters = meter.live
        networks = _networks(teachers if workload.method.needs_teachers else None, student, workload)
        state = State(networks=networks, optimizer=make_optimizer(student, weight_decay=5e-4))
        # The fused update has no temporaries, and no kernel for `meta`.
        state.optimizer.step = lambda: None  # type: ignore[method-assign, misc, assignment]
        H, W, C = workload.image_shape
        config = StepConfig(method=workload.method, seed=0, pad=min(4, H - 1, W - 1))
        meter.restart()
        images_BHWC = torch.empty(B, H, W, C, dtype=torch.uint8, device="meta")
        labels_B = torch.empty(B, dtype=torch.int64, device="meta")
        train_step(state, config, images_BHWC, labels_B, 0.1)
        del images_BHWC, labels_B
    kept = meter.live  # of what stays, the first step makes some
    in_step = meter.peak - kept
    allowance = 0 if workload.backend == "triton" else meter.largest
    if workload.device_type == "cuda":
        allowance += CONTEXT_BYTES + int(SLACK * in_step)
    return Prediction(parameters=parameters, state=kept - parameters, step=in_step, allowance=allowance)


def largest_batch(workload: Workload, capacity: int, *, at_most: int) -> int:
    """The most images a step, up to `at_most`, that fit into `capacity` bytes; 0 where not even 2 do.

    One alone is not tried: in training a norm may refuse it.
    """
    if at_most < 2:
        return 0
    (low, least), (high, most) = ((B, predict(workload, B).total) for B in (2, at_most))
    if most <= capacity:
        return high
    if least > capacity:
        return 0
    steps = 0
    while high - low > 1:
        # Nearly linear in B, with a bend where another part of the step becomes the peak: halve now and then.
        share = (capacity - least) / (most - least) if steps % 3 < 2 else 0.5
        guess = min(max(low + int(share * (high - low)), low + 1), high - 1)
        needed = predict(workload, guess).total
        if needed <= capacity:
            low, least = guess, needed
        else:
            high, most = guess, needed
        steps += 1
    return low


def require_fitting(workload: Workload, B: int, *, capacity: int, option: str) -> Prediction:
    """The prediction for `B` images a step, if it fits into `capacity` bytes.

    Args:
        option: what gives `B`, for the message: `student.batch-size`.

    Raises:
        UserError: it does not fit; says the largest batch that does.
    """
    prediction = predict(workload, B)
    if prediction.total > capacity:
        raise UserError(shortage(workload, B, prediction, capacity=capacity, option=option))
    return prediction


def shortage(workload: Workload, B: int, prediction: Prediction, *, capacity: int, option: str) -> str:
    """Why `B` images a step do not fit into `capacity` bytes, and what would."""
    largest = largest_batch(workload, capacity, at_most=B - 1)
    advice = f"the largest batch that fits is {largest}"
    if largest == 0:
        advice = "not even 2 images fit; choose a smaller network, fewer members or a larger device"
    return (
        f"{option}: {B} images a step of {workload.method} need about {gigabytes(prediction.total)} of this device's "
        f"{gigabytes(capacity)}; {advice}"
    )


def capacity(device: torch.device) -> int:
    """Bytes that this process can have of `device`: what is free, and on a GPU what it already holds.

    On a CPU what the machine, or the control groups that the process is in, can still give.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # after this the process has its context, which is not free
        return int(free) + torch.cuda.memory_reserved(device) + CONTEXT_BYTES
    return _available(Path("/"))


def _available(root: Path) -> int:
    """Of the machine whose /proc and /sys lie under `root`."""
    limits = list(_group_rooms(root))
    try:
        values = _table(root / "proc/meminfo")
        limits.append(1024 * values["MemAvailable:"])
    except (OSError, KeyError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits))


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group of the process may still take: its limit less what it uses and could not give back."""
    try:
        lines = (root / "proc/self/cgroup").read_text().split()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the name may be the host's: then its own group is the top.
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                statistics = _table(folder / "memory.stat")
                # version 1 has a group's own there, and those of the groups in it beside
                cache = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
            except OSError:
                pass  # no such group here, or the root, which has no limit
            else:
                if most != "max":
                    yield int(most) - used + cache
            if folder == top:
                break


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations under it make, or that it is shown, while they are alive."""

    def __init__(self, device_type: str) -> None:
        """`device_type`: whose temporaries to count, cpu or cuda."""
        super().__init__()
        self.block = CUDA_BLOCK if device_type == "cuda" else 1
        self.casts = device_type == "cpu"
        """Whether operands are cast before an operation on two types; a GPU does it as it loads."""
        self._live = [0, 0]
        self._peak = [0, 0]
        self.largest = 0
        """Bytes of the largest storage made since then."""
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return sum(self._live)

    @property
    def peak(self) -> int:
        """The most bytes alive at once, since `restart`: of the streams of a GPU, which share no memory, the sum."""
        return sum(self._peak)

    def restart(self) -> None:
        """Forget the peak and the largest storage."""
        self._peak, self.largest = list(self._live), 0

    def hold(self, tensors: Iterable[Any]) -> None:
        """Count the storages of these tensors from now on; whatever else is among them is passed over."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in self._alive:
                continue
            size = -(-storage.nbytes() // self.block) * self.block
            lane = streams.lane
            self._alive[key] = weakref.ref(storage, functools.partial(self._release, key, size, lane))
            self._live[lane] += size
            self._note_peak()
            self.largest = max(self.largest, size)

    def _note_peak(self, temporary: int = 0) -> None:
        self._peak = [max(peak, live) for peak, live in zip(self._peak, self._live, strict=True)]
        self._peak[0] = max(self._peak[0], self._live[0] + temporary)

    def _release(self, key: int, size: int, lane: int, _: object) -> None:
        del self._alive[key]
        self._live[lane] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ensdistill":
            # its launcher, which PyTorch would not call on `meta`: the workspaces between kernels count too
            from torch._library.custom_ops import OPDEFS

            with self:
                out = OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and out.is_meta and any(map(_is_channels_last, args[:2])):
            out = torch.empty_like(out, memory_format=torch.channels_last)  # which `meta` alone forgets
        self.hold(tree_leaves(out))
        if self.casts:
            self._note_peak(_cast_bytes(func, args, out))
        return out


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _cast_bytes(func: Any, args: Any, out: Any) -> int:
    """Bytes of the operands that an element-wise operation or a sum computes in another type than their own."""
    if func.overloadpacket is torch.ops.aten.sum:
        return args[0].numel() * out.itemsize if args[0].dtype != out.dtype else 0
    if torch.Tag.pointwise not in func.tags:
        return 0
    tensors = [x for x in args if isinstance(x, Tensor) and x.ndim > 0]
    common = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.bool)
    return sum(x.numel() * common.itemsize for x in tensors if x.dtype != common)


_M = TypeVar("_M", bound=nn.Module)


def without_values(module: _M) -> _M:
    """A copy on `meta`, in which is shared what was shared; the values are never copied."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


class _OnMeta:
    """Networks whose modules run on `meta`."""

    precision: Precision

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        return _Autocast() if self.precision == "bf16" else nullcontext()


class _Modules(_OnMeta, Networks):
    pass


class _Kernels(_OnMeta, KernelNetworks):
    pass


def _networks(teachers: Teachers | None, student: Student, workload: Workload) -> Networks:
    """What `networks.make_networks` makes, on `meta`."""
    backend, precision = workload.backend, workload.precision
    if backend == "reference" or (backend in ("auto", "tuned") and workload.device_type != "cuda"):
        return _Modules(teachers, student, precision)
    operations: Any = LibraryOperations() if backend == "library" else TritonOperations()
    if backend == "auto":
        operations = _NothingFolded()
    return _Kernels(teachers, student, precision, operations)


class _NothingFolded(TritonOperations):
    """What measuring may choose that takes most memory."""

    def folds_norm(self, *_: Any) -> bool:
        return False

    def folds_second(self, *_: Any) -> bool:
        return False


# By name: the same for functions and for methods of tensors.
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm")
_IN_BF16 = frozenset((*_CONVOLUTIONS, *_PRODUCTS, "scaled_dot_product_attention"))


class _Autocast(TorchFunctionMode):
    """What `torch.autocast` to bf16 does to convolutions and matrix products. Parameters are cast once."""

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

"""Memory that training takes, predicted before it starts.

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

import functools
import os
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ensdistill.config.methods import Method
from ensdistill.config.updates import SGD, Updates
from ensdistill.costs.dry_run import dry_step, networks_on_meta, without_values
from ensdistill.engine.operations import LibraryOperations, Operations, TritonOperations
from ensdistill.models import build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.monitor.memory import CONTEXT_BYTES, SLACK, Prediction, gigabytes, read_table
from ensdistill.runtime import streams
from ensdistill.runtime.environment import Precision
from ensdistill.runtime.errors import UserError
from ensdistill.training.step import StepConfig

CUDA_BLOCK = 512
"""Bytes of the CUDA allocator's smallest block: it gives multiples of them."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training whose memory is asked for. Its networks may lie on any device; their values are never read."""

    teachers: Teachers | None
    """Teachers that are on the device meanwhile, idle or not."""
    student: Student
    """Network to train."""
    method: Method
    """Student, and the data that it is shown."""
    image_shape: tuple[int, int, int]
    """Shape (H, W, C) of an image."""
    precision: Precision
    """Type that convolutions compute in."""
    backend: str
    """Backend of the step: see `engine.operations.Backend`."""
    device_type: str
    """`cpu` or `cuda`: where it will run."""
    updates: Updates = SGD
    """Optimizer, and averages of the weights over time."""


def predict(workload: Workload, B: int) -> Prediction:
    """Memory of `workload` with `B` images a step. Takes a second for a deep network, whatever its width and `B`."""
    with streams.meta_as(workload.device_type), Meter(workload.device_type) as meter:
        student = without_values(workload.student)
        teachers = None if workload.teachers is None else without_values(workload.teachers)
        for module in (student, *([] if teachers is None else [teachers])):
            meter.hold([*module.parameters(), *module.buffers()])
        parameters = meter.live
        needed = teachers if workload.method.needs_teachers else None
        networks = networks_on_meta(needed, student, workload.precision, _operations(workload))
        H, W, _ = workload.image_shape
        config = StepConfig(method=workload.method, seed=0, pad=min(4, H - 1, W - 1))
        step = dry_step(networks, config, B=B, image_shape=workload.image_shape, updates=workload.updates)
        meter.restart()
        step()
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


def require_room(network: str, members: int) -> None:
    """Check, before any is built, that this machine's memory holds `members` networks of ours called `network`.

    Raises:
        UserError: it does not, or no network has that name.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(network, num_classes=2).parameters())
    needed, room = 4 * parameters * members, capacity(torch.device("cpu"))
    if needed > room:
        raise UserError(
            f"network: {members} of {network}, of {parameters:,} parameters each, take {gigabytes(needed)} of this "
            f"machine's {gigabytes(room)} of memory; choose a smaller network, or fewer members"
        )


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
    """Message that `B` images a step do not fit into `capacity` bytes, and how many would."""
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
    """Bytes that the machine whose /proc and /sys lie under `root` can still give."""
    limits = list(_group_rooms(root))
    try:
        values = read_table(root / "proc/meminfo")
        limits.append(1024 * values["MemAvailable:"])
    except (OSError, KeyError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(limits))


def _group_rooms(root: Path) -> Iterator[int]:
    """Bytes left of each of the process's control groups: its limit less what it uses and could not give back."""
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
                statistics = read_table(folder / "memory.stat")
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
        """True where operands are cast before an operation on two types; a GPU casts as it loads."""
        self._live = [0, 0]
        self._peak = [0, 0]
        self.largest = 0
        """Bytes of the largest storage made since `restart`."""
        self._alive: dict[int, weakref.ref[Any]] = {}

    @property
    def live(self) -> int:
        """Number of bytes alive now."""
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


def _operations(workload: Workload) -> Operations | None:
    """The operations of `workload` on `meta`: those of `engine.operations.make_operations`, `auto` by our kernels."""
    backend = workload.backend
    if backend == "reference" or (backend in ("auto", "tuned") and workload.device_type != "cuda"):
        return None
    if backend == "auto":
        return _NothingFolded()
    return LibraryOperations() if backend == "library" else TritonOperations()


class _NothingFolded(TritonOperations):
    """Runs every norm apart and stores all second outputs: of what measuring may choose, what takes most memory."""

    def folds_norm(self, *_: Any) -> bool:
        return False

    def folds_second(self, *_: Any) -> bool:
        return False

"""The processes that train one network together: `torchrun --nproc-per-node N -m ensdistill.fast_train …`.

Each process (rank) has its own rows of every batch and its own copy of the network. Tensors on a GPU travel by NCCL on
the current stream, so that a CUDA graph can capture what is done with them; tensors on the CPU, and decisions of the
host, by gloo. Without torchrun there is one process, `ALONE`, for which nothing here communicates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from ensdistill.runtime.errors import RunFailed, UserError
from ensdistill.runtime.rank_guards import Store
from ensdistill.runtime.rank_guards.agreement import refuse_difference, require_same_options
from ensdistill.runtime.rank_guards.heartbeat import MAX_SILENCE, Heartbeat, end_process, say, steps

Result = TypeVar("Result")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_PATIENCE = timedelta(hours=24)
"""Time that the host waits for others, who may prepare data meanwhile. One that dies or stops is noticed before."""
_BUCKET_BYTES = 64 << 20
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_SILENCE = 5.0
"""Seconds that torchrun has to end a process whose error the first one has said."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    What communicates is called by all of them, in the same order, with tensors of the same shapes and types.
    """

    rank: int = 0
    """Number of this process, in [0, size)."""
    size: int = 1
    """Number of processes on all machines."""
    local_rank: int = 0
    """This process among those of its machine, which is the GPU that it has."""
    host: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Process group for what lies on the CPU."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # networks hold it and are copied; a process group cannot be

    @property
    def is_first(self) -> bool:
        """True for the process that speaks for all: it writes files and shows progress."""
        return self.rank == 0

    @property
    def tracks(self) -> bool:
        """True: every process has running statistics of its own to write."""
        return True

    @property
    def is_precise(self) -> bool:
        """True: what processes tell each other takes longer than sums do."""
        return True

    def share(self, batch_size: int) -> range:
        """The rows of every batch of `batch_size` that this process has: as many as every other.

        Raises:
            UserError: the batch cannot be shared out evenly.
        """
        if batch_size % self.size:
            smaller, larger = batch_size - batch_size % self.size, batch_size + -batch_size % self.size
            choices = f"{smaller} or {larger}" if smaller else str(larger)
            raise UserError(
                f"batch size {batch_size}: it is that of all processes together and cannot be shared evenly among "
                f"{self.size}; set it to {choices}, or start another number of processes"
            )
        rows = batch_size // self.size
        return range(self.rank * rows, (self.rank + 1) * rows)

    def part(self, count: int) -> range:
        """The part of `count` things that is this process's, as even as may be: parts are in order and may be empty."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    @torch.no_grad()
    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; `tensor` is contiguous."""
        if self.size > 1:
            with self._talking(tensor) as group:
                dist.all_reduce(tensor, group=group)
        return tensor

    @torch.no_grad()
    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, a tensor of its own."""
        return self.sum_(tensor.detach().clone(memory_format=torch.contiguous_format)) / self.size

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over ranks: a collective for some 64 MiB of them, no synchronisation."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._talking(flat) as group:
                dist.all_reduce(flat, group=group)
            _scatter_into(bucket, flat.div_(self.size))

    @torch.no_grad()
    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by the first rank's."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._talking(flat) as group:
                dist.broadcast(flat, src=0, group=group)
            _scatter_into(bucket, flat)

    @torch.no_grad()
    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's `tensor`, (size, …), in the order of the ranks."""
        gathered = tensor.new_empty(self.size, *tensor.shape)
        if self.size == 1:
            return gathered.copy_(tensor[None])
        with self._talking(tensor) as group:
            dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=group)
        return gathered

    @torch.no_grad()
    def gather_rows(self, rows: Tensor | None) -> Tensor:
        """The rows (n, …) of all ranks one behind another, in the order of the ranks, on the CPU.

        Args:
            rows: as many as there are here, on any device; None where there are none and their shape is not known.

        Raises:
            ValueError: no rank knows the shape.
        """
        rows = None if rows is None else rows.cpu()
        own: Any = None if rows is None else (len(rows), tuple(rows.shape[1:]), rows.dtype)
        shapes = self.gather_objects(own)
        known = next((shape for shape in shapes if shape is not None), None)
        if known is None:
            raise ValueError("rows: got None on every rank, expected a tensor on one at least")
        if self.size == 1 and rows is not None:
            return rows
        lengths = [0 if shape is None else shape[0] for shape in shapes]
        # collectives take one shape: rows without a meaning fill up the shorter ones
        padded = torch.zeros(max(lengths), *known[1], dtype=known[2])
        if rows is not None:
            padded[: len(rows)] = rows
        return torch.cat([part[:length] for part, length in zip(self.gather(padded), lengths, strict=True)])

    def gather_objects(self, value: Result) -> list[Result]:
        """Every rank's (picklable) `value`, in the order of the ranks; the host waits."""
        values = [value] * self.size
        if self.size > 1:
            with self._talking() as group:
                dist.all_gather_object(values, value, group=group)
        return values

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Check that every rank has the same `values`, by name; the host waits.

        Raises:
            UserError: on every rank, the first that differs.
        """
        refuse_difference(self.gather_objects(dict(values)))

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` is set on any rank; the host waits."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        with self._talking() as group:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        return bool(flags.item())

    def barrier(self) -> None:
        """Wait until all ranks are here: their hosts, not what they have given to their GPUs."""
        self.any(False)

    def first(self, work: Callable[[], Result]) -> Result:
        """Let the first rank do `work` while the others wait, for hours if need be; all get its (picklable) result.

        Raises:
            UserError: on the others, where `work` raised on the first rank, which raises what it was.
        """
        if self.size == 1:
            return work()
        said: list[Any] = [None, None]
        if self.is_first:
            try:
                said = [work(), None]
            except BaseException as error:
                failure = str(error) or type(error).__name__
                with self._talking() as group:
                    dist.broadcast_object_list([None, failure], src=0, group=group)
                raise
        with self._talking() as group:
            dist.broadcast_object_list(said, src=0, group=group)
        result, failure = said
        if failure is not None:
            raise UserError(f"process {self.rank} of {self.size}: the first process stopped ({failure}); see its error")
        return result

    @contextmanager
    def _talking(self, tensor: Tensor | None = None) -> Iterator[dist.ProcessGroup | None]:
        """The group for `tensor`, or for what the hosts say; whoever has lost another ends with one line.

        Raises:
            RunFailed: another process has ended. (NCCL does not say so: its collectives end with torchrun's signal.)
        """
        if tensor is not None and tensor.device.type != "cpu":
            yield None
            return
        try:
            with steps.waiting():
                yield self.host
        except RuntimeError as error:  # gloo's, which has no class of its own
            lost = next((words for words in _LOST if words in str(error)), None)
            if lost is None:
                raise
            raise RunFailed(
                f"process {self.rank} of {self.size}: another process ended ({lost}); see what it said, and go on "
                "with --resume"
            ) from error


ALONE = Ranks()
"""One process, which shares with nobody."""


@contextmanager
def one_voice() -> Iterator[None]:
    """Around a command: an error that all processes find is said by the first.

    The others wait before they raise what a user can read: torchrun ends them meanwhile if the first has stopped too.
    """
    try:
        yield
    except (UserError, RunFailed):
        if not is_first_process():
            time.sleep(_SILENCE)
        raise


def is_first_process() -> bool:
    """Tell whether this is the first of torchrun's processes, or the only one, before they are connected."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def from_environment(
    device: torch.device, *, max_silence: float = MAX_SILENCE, options: Mapping[str, Any] | None = None
) -> Iterator[Ranks]:
    """The processes that torchrun started, connected inside; `ALONE` where it did not, or started one.

    On a GPU each process has the one of its local rank, which is the current device (`cuda`) from here on. Let go of
    CUDA graphs that hold collectives before leaving.

    Args:
        device: what to compute on; `cuda` or `cpu`, without a number where there are several processes.
        max_silence: seconds without a sign of life from one process after which the others end; 0: never.
        options: what all processes must have alike, by name: JSON values.

    Raises:
        UserError: torchrun's variables are incomplete or make no sense, a machine has more processes than GPUs, a GPU
            was named for several processes, the processes do not find each other, or their options differ.
    """
    ranks = _read_environment()
    if ranks.size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        if str(device) != "cuda":
            raise UserError(
                f"--device {device}: {ranks.size} processes take a GPU each; expected cuda without a number "
                "(CUDA_VISIBLE_DEVICES chooses among them)"
            )
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={ranks.local_rank}: this machine has {torch.cuda.device_count()} usable GPUs, one a "
                "process; start at most as many (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(ranks.local_rank)
    own = torch.device("cuda", ranks.local_rank) if device.type == "cuda" else None
    with ExitStack() as stack:
        try:
            store, _, _ = next(rendezvous("env://", rank=ranks.rank, world_size=ranks.size))
            if max_silence:
                stack.enter_context(_heartbeat(ranks, max_silence).beating())
            require_same_options(_of_this_start(store), ranks.rank, ranks.size, options or {})
            dist.init_process_group(
                "gloo" if own is None else "nccl",
                store=_of_this_start(store),
                rank=ranks.rank,
                world_size=ranks.size,
                device_id=own,
            )
        except UserError:  # a ValueError too, and says already what it is
            raise
        except (dist.DistError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"process {ranks.rank} of {ranks.size} found no others at MASTER_ADDR:MASTER_PORT = {address} "
                f"({str(error).splitlines()[0]}); start all of them with torchrun"
            ) from error
        stack.callback(dist.destroy_process_group)
        host = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield Ranks(rank=ranks.rank, size=ranks.size, local_rank=ranks.local_rank, host=host)


def _heartbeat(ranks: Ranks, max_silence: float) -> Heartbeat:
    return Heartbeat(
        _of_this_start(_connect()),
        rank=ranks.rank,
        size=ranks.size,
        max_silence=max_silence,
        keeper=None if _torchrun_keeps_store() else 0,
        say=say,
        end=end_process,
    )


def _connect() -> Store:
    """A connection of its own to the processes' store."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]


def _of_this_start(store: Store) -> Store:
    """The part of the store in which nothing is left of an earlier start by the same torchrun (`--max-restarts`)."""
    return dist.PrefixStore(f"start-{_restarts()}", store)  # type: ignore[attr-defined]


def _torchrun_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _restarts() -> int:
    """Number of times that torchrun has started its processes anew."""
    given = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(given) if given.isdecimal() else 0


def mark_begun(name: str) -> None:
    """Let a later start by the same torchrun (`--max-restarts`) know that this one has begun what is called `name`."""
    if _torchrun_keeps_store() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        _connect().set(f"begun/{name}", "")


def was_begun(name: str) -> bool:
    """Tell whether an earlier start by the same torchrun has begun what is called `name` (`mark_begun`)."""
    return _torchrun_keeps_store() and _restarts() > 0 and _connect().check([f"begun/{name}"])


def local_processes() -> int:
    """Number of processes that torchrun started on this machine, which share its cores; 1 without it."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(given)) if given.isdecimal() else 1


def _read_environment() -> Ranks:
    values = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if not values:
        return ALONE
    if missing := [name for name in _VARIABLES if name not in values]:
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"environment: {shown} without {', '.join(missing)}; start with torchrun, which sets all, or unset them"
        )
    for name, value in values.items():
        if not value.isdecimal():
            raise UserError(f"environment: {name}={value}, expected a whole number as torchrun sets it")
    rank, size, local_rank = (int(values[name]) for name in _VARIABLES)
    if not local_rank <= rank < size:
        raise UserError(
            f"environment: RANK={rank} LOCAL_RANK={local_rank} WORLD_SIZE={size}, expected LOCAL_RANK <= RANK < "
            "WORLD_SIZE as torchrun sets them"
        )
    return Ranks(rank=rank, size=size, local_rank=local_rank)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one type, device and some `_BUCKET_BYTES`."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        num_bytes = 0
        for tensor in kind:
            if bucket and num_bytes + tensor.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(tensor)
            num_bytes += tensor.nbytes
        yield bucket


def _scatter_into(bucket: Sequence[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in bucket])
    torch._foreach_copy_(list(bucket), [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)])

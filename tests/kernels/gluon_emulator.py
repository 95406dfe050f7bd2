"""Runs a warp-specialised Gluon kernel on the CPU, as Triton's interpreter does not: its own source, on torch tensors.

Every partition is a thread of which one runs at a time. At each operation that other warps or the copy engine can see
the scheduler draws who goes on: a partition, or a copy on its way. A matrix product reads its operands at once or as
late as its partition's wait lets it, and gives its result then. So a tile that is overwritten too early, or read before
it came, gives wrong numbers, a wait that nothing ends is told as a deadlock, and bytes that a barrier expects in vain
are one.

Layouts are not emulated: who holds which element is the compiler's to check.
"""

from __future__ import annotations

import functools
import inspect
import random
import textwrap
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl


class Deadlock(AssertionError):
    """Every partition waits and nothing is on its way."""


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all bytes that were announced have come."""

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def _settle(self) -> None:
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def arrive(self, count: int = 1, announced: int = 0) -> None:
        self.pending -= count
        self.bytes += announced
        self._settle()

    def complete(self, number: int) -> None:
        self.bytes -= number
        self._settle()

    def is_over(self, parity: int) -> bool:
        return self.phase % 2 != parity


@dataclass
class Memory:
    """Shared memory, or a view of it."""

    of: Any

    def index(self, i: Any) -> Any:
        if isinstance(self.of, list):
            return self.of[int(i)]
        assert 0 <= int(i) < len(self.of)
        return Memory(self.of[int(i)])

    def reshape(self, shape: list[int]) -> Memory:
        return Memory(self.of.view(shape))

    def permute(self, order: list[int]) -> Memory:
        return Memory(self.of.permute(order))


@dataclass
class Pointer:
    """A tensor's memory and offsets into it, in elements."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        offset = torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else mask).expand(offset.shape)
        inside = (offset >= 0) & (offset < self.memory.numel())
        assert (inside | ~mask).all(), "an access outside a tensor"
        return offset, mask


@dataclass
class Program:
    """One program of a launch: its partitions, what is in flight, and who goes on."""

    seed: int
    copies: list[Callable[[], None]] = field(default_factory=list)
    products: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    waiting: dict[int, Callable[[], bool] | None] = field(default_factory=dict)

    def run(self, partitions: list[tuple[Any, tuple[Any, ...]]]) -> None:
        self.random = random.Random(self.seed)
        slowness = self.random.choice((0.02, 0.5, 0.98))  # of the partitions beside the copies
        self.turns = [threading.Semaphore(0) for _ in partitions]
        self.back = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.own = threading.local()
        threads = []
        for i, (function, arguments) in enumerate(partitions):
            self.waiting[i], self.products[i] = None, []
            threads.append(threading.Thread(target=self._partition, args=(i, function, arguments), daemon=True))
            threads[-1].start()
        while self.waiting and self.failure is None:
            ready = [i for i, condition in self.waiting.items() if condition is None or condition()]
            if not ready and not self.copies:
                raise Deadlock(f"partitions {sorted(self.waiting)} wait for ever")
            if ready and (not self.copies or self.random.random() > slowness):
                drawn = self.random.choice(ready)
                self.waiting[drawn] = None
                self.turns[drawn].release()
                self.back.acquire()
            else:
                self.copies.pop(self.random.randrange(len(self.copies)))()
        if self.failure is not None:
            raise self.failure
        assert not self.copies, "copies on their way after the program's end"

    def _partition(self, i: int, function: Any, arguments: tuple[Any, ...]) -> None:
        self.own.partition = i
        self.turns[i].acquire()
        try:
            function(*arguments)
            assert not self.products[i], "products in flight after their partition's end"
        except BaseException as error:  # of a thread: told by the one that started it
            self.failure = error
        del self.waiting[i]
        self.back.release()

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Let others go on; come back when `until` holds."""
        i = self.own.partition
        self.waiting[i] = until
        self.back.release()
        self.turns[i].acquire()

    def finish(self, left: int) -> None:
        """Carry out this partition's products but for the last `left`."""
        products = self.products[self.own.partition]
        while len(products) > left:
            products.pop(0)()


class _Layout:
    def __init__(self, *args: Any, **options: Any) -> None:
        pass


def _language(program: Program, i_program: int, programs: int) -> dict[str, Any]:
    """The names of Gluon that the kernels use, for one program."""

    def where(condition: Any, a: Any, b: Any) -> Tensor:
        of = next(x for x in (a, b) if isinstance(x, Tensor))
        return torch.where(condition, torch.as_tensor(a, dtype=of.dtype), torch.as_tensor(b, dtype=of.dtype))

    def load(p: Pointer, mask: Any = None, other: Any = None) -> Tensor:
        offset, mask = p.places(mask)
        nothing = other if other is not None else float("nan") if p.memory.is_floating_point() else 85
        return torch.where(mask, p.memory[torch.where(mask, offset, 0)], torch.tensor(nothing).to(p.memory.dtype))

    def store(p: Pointer, value: Tensor, mask: Any = None) -> None:
        offset, mask = p.places(mask)
        assert value.dtype == p.memory.dtype and value.shape == offset.shape
        p.memory[offset[mask]] = value[mask]

    def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
        if isinstance(layout, MBarrierLayout):
            return Memory([Barrier() for _ in range(shape[0])])
        return Memory(torch.full(shape, float("nan"), dtype=dtype))

    def async_load(box: Any, corner: list[Any], bar: Barrier, to: Memory) -> None:
        program.pause()
        assert list(to.of.shape) == list(box.block_shape)
        starts = [int(start) for start in corner]
        low = [min(max(-start, 0), n) for start, n in zip(starts, box.block_shape, strict=True)]
        high = [min(max(size - start, 0), n) for start, size, n in zip(starts, box.shape, box.block_shape, strict=True)]

        def arrived() -> None:
            to.of.zero_()  # outside
            if all(a < b for a, b in zip(low, high, strict=True)):
                inside = [slice(a, b) for a, b in zip(low, high, strict=True)]
                from_ = [slice(s + a, s + b) for s, a, b in zip(starts, low, high, strict=True)]
                to.of[tuple(inside)] = box.base[tuple(from_)]
            bar.complete(to.of.numel() * to.of.element_size())

        program.copies.append(arrived)

    def wait(bar: Barrier, parity: Any) -> None:
        program.pause(lambda: bar.is_over(int(parity)))

    def arrive(bar: Barrier, count: int = 1, pred: Any = True) -> None:
        program.pause()
        if pred:
            bar.arrive(count)

    def expect(bar: Barrier, number: int) -> None:
        program.pause()
        bar.arrive(1, number)

    def product(a: Memory, b: Memory, acc: Tensor, is_async: bool) -> Tensor:
        assert is_async
        program.pause()
        early = [x.of.float() for x in (a, b)] if program.random.randrange(2) else None
        products = program.products[program.own.partition]
        products.append(lambda: acc.add_(torch.matmul(*(early or [x.of.float() for x in (a, b)]))))
        return acc

    def product_wait(num_outstanding: int, deps: list[Tensor]) -> Any:
        program.pause()
        program.finish(num_outstanding)
        return deps[0] if len(deps) == 1 else tuple(deps)

    class MBarrierLayout:
        pass

    language = types.SimpleNamespace(
        arange=lambda start, end, layout=None: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        reshape=lambda x, shape: x.reshape(shape),
        permute=lambda x, order: x.permute(order),
        split=lambda x: (x[..., 0], x[..., 1]),
        join=lambda a, b: torch.stack((a, b), -1),
        convert_layout=lambda x, layout: x.clone(),
        sum=lambda x, axis: x.sum(axis),
        where=where,
        load=load,
        store=store,
        program_id=lambda axis: i_program,
        num_programs=lambda axis: programs,
        static_range=range,
        allocate_shared_memory=allocate,
        warp_specialize=lambda partitions, warps, registers: program.run(partitions),
        NVMMADistributedLayout=_Layout,
        SliceLayout=_Layout,
        **{name: getattr(torch, name) for name in ("float32", "bfloat16", "int32", "int64", "uint8")},
        int1=torch.bool,
    )
    barriers = types.SimpleNamespace(
        init=lambda bar, count: bar.init(count),
        wait=wait,
        arrive=arrive,
        expect=expect,
        MBarrierLayout=MBarrierLayout,
    )
    return {
        "gl": language,
        "mbarrier": barriers,
        "async_load": async_load,
        "barrier": program.pause,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": product,
        "warpgroup_mma_wait": product_wait,
        "range": lambda *limits: map(torch.tensor, range(*map(int, limits))),
    }


def emulate(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    options: dict[str, Any],
    *,
    seed: int,
    edits: Mapping[str, str] | None = None,
) -> None:
    """Run all programs of a recorded launch, one after another, each with a schedule of its own drawn from `seed`.

    `edits` (old text to new) change the kernel's source first, for tests that want to see it fail.
    """
    edits = dict(edits or {})
    constants = {name: value for name, value in options.items() if name not in ("num_warps", "maxnreg")}
    for i_program in range(grid[0]):
        program = Program(seed * grid[0] + i_program)
        names = dict(kernel.fn.__globals__)
        names |= {name: value.value for name, value in names.items() if isinstance(value, gl.constexpr)}
        names |= _language(program, i_program, grid[0])
        for name, value in list(names.items()):
            if hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
                source = _source(value.fn)
                for old, new in edits.items():
                    source = source.replace(old, new)
                exec(compile(source, name, "exec"), names)
        given = [Pointer(arg.view(-1)) if isinstance(arg, Tensor) else arg for arg in args]
        names[kernel.fn.__name__](*given, **constants)


@functools.cache
def _source(function: Any) -> str:
    """A function's source without its decorator; what it is annotated with stays text."""
    text = textwrap.dedent(inspect.getsource(function))
    return "from __future__ import annotations\n" + text[text.index("def ") :]

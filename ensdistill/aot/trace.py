"""Trace the kernels that a program launches, specialised by Triton's JIT for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from ensdistill.costs.dry_run import Program
from ensdistill.kernels import launch
from ensdistill.kernels.conv import tiles
from ensdistill.runtime.errors import UserError


@dataclass
class Variant:
    """Kernel as the JIT specialises it: what is compiled once."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    text: str
    recipes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the kernel's function."""
        return str(self.kernel.fn.__qualname__)


class StubDriver:
    """Stands in for Triton's CUDA driver: GPU number `arch` is one of that architecture. Nothing can be launched."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """Number of the device, by which the JIT keeps what it compiled: one an architecture."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """Number of the stream, for which the JIT asks also where it only compiles."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Architecture to compile for."""
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    """Tiles are chosen and kernels compiled for `arch`, on a machine without a GPU as on one with another."""
    if launch.INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    before, tiles.assumed_capability = tiles.assumed_capability, arch
    drivers: Any = triton.runtime.driver
    active, drivers._active = drivers._active, StubDriver(arch)
    try:
        yield
    finally:
        tiles.assumed_capability, drivers._active = before, active


def trace(sources: Iterable[tuple[str, Iterable[Program]]]) -> list[Variant]:
    """Run every program of every (name, programs) without launching, and list what the JIT would have to compile.

    Call it under `compiling_for`. Launches that need the same code are one variant.
    """
    variants: dict[tuple[str, str, str], Variant] = {}
    for source, thunks in sources:

        def record(kernel: Any, grid: Any, args: Any, options: Any, source: str = source) -> None:
            seen: dict[str, Any] = {}

            def before_compiling(**event: Any) -> bool:
                seen.update(event["compile"])
                return True  # which stops the JIT here

            before_hook, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, before_compiling
            try:
                kernel.warmup(*args, grid=grid, **options)
            finally:
                knobs.runtime.jit_cache_hook = before_hook
            key = (kernel.fn.__module__, kernel.fn.__qualname__, seen["key"])
            if key not in variants:
                variants[key] = Variant(kernel, grid, args, options, _describe(seen))
            if source not in variants[key].recipes:
                variants[key].recipes.append(source)

        with launch.recording(record):
            for program in thunks:
                program()
    return sorted(variants.values(), key=lambda variant: (variant.name, variant.text))


def _describe(event: dict[str, Any]) -> str:
    words = []
    (attributes,) = event["configs"]
    for position, (name, kind) in enumerate(event["signature"].items()):
        if kind == "constexpr":
            value = event["constants"][(position,)]
            if value is not None:
                words.append(f"{name}={int(value) if isinstance(value, bool) else value}")
        else:
            divisible = bool(attributes.get((position,)))
            mark = ("" if divisible else "!") if str(kind).startswith("*") else ("/16" if divisible else "")
            words.append(f"{name}:{kind}{mark}")
    return " ".join([*words, f"num_warps={event['num_warps']} num_stages={event['num_stages']}"])

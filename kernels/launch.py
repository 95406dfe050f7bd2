"""Launching kernels: one door for all of them, in which ahead-of-time compilation can stand.

`launch` starts a kernel on the device of its arguments. Under `recording` it starts nothing and hands every launch to
the recorder instead, so that a program run on `meta` tensors lists the kernels, specialised as the real run would have
them.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from ensdistill.kernels.interpreter import repair_bf16, repair_nan

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1` before the first import)."""
MAX_INTERPRETED_PROGRAMS = 16
"""Programs a launch in the interpreter: each costs 100 ms whatever its tile, so tiles grow instead."""
MAX_TILE = 1 << 20
"""Elements of a tile at most (a limit of Triton's)."""

if INTERPRETED:
    repair_bf16()
    repair_nan()

Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid`, or hand it to the recorder; `options` are its constexprs, num_warps and num_stages."""
    if _recorder is not None:
        _recorder(kernel, grid, args, options)
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if 0 in grid or device.type == "meta":
        return
    expected = "tensors on a GPU, or Triton's interpreter (TRITON_INTERPRET=1 in the environment)"
    check(device.type == "cuda" or INTERPRETED, "device", expected, device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def launch_fault() -> str:
    """Why Triton cannot launch kernels on this machine's GPU, empty where it can: what its C part needs is missing."""
    try:
        triton.runtime.driver.active  # noqa: B018 - loads the C part, or compiles it
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} cannot compile Triton's C part (without Python's headers, python3-dev, it cannot)"
    except (RuntimeError, OSError, AssertionError) as error:
        return " ".join(f"{error}".split())[:200]
    return ""


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Every launch goes to `recorder(kernel, grid, args, options)` and runs nothing."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@functools.cache
def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError `name: expected …, got …` unless `condition`; tensors are shown by type and shape."""
    if not condition:
        shown = f"{got.dtype} {tuple(got.shape)} on {got.device}" if isinstance(got, Tensor) else got
        raise ValueError(f"{name}: expected {expected}, got {shown}")

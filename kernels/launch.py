"""Launch kernels through one door, in which ahead-of-time compilation can stand.

`launch` starts a kernel on the device of its arguments. Under `recording` it starts nothing and hands every launch to
the recorder instead, so that a program run on `meta` tensors lists the kernels, specialised as the real run would have
them.

From compute capability 9.0 on, a kernel that opens with `begin()` is launched as dependent on the one before it in its
stream (programmatic dependent launch: CUDA C++ programming guide, section of that name): it is placed while the other
still runs, and waits there for what the other wrote. ENSDISTILL_DEPENDENT_LAUNCH=0 turns that off.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import target_info
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ensdistill.kernels.interpreter import hasten, repair_bf16, repair_nan

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True where kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1` before the first import)."""
MAX_INTERPRETED_PROGRAMS = 16
"""Programs a launch in the interpreter: each costs 100 ms whatever its tile, so tiles grow instead."""
MAX_TILE = 1 << 20
"""Elements of a tile at most (a limit of Triton's)."""

if INTERPRETED:
    repair_bf16()
    repair_nan()
    hasten()

dependent = os.environ.get("ENSDISTILL_DEPENDENT_LAUNCH", "1") != "0"
"""True where kernels are launched before the one before them has ended, where they and the device can."""
_COMPILED = tl.constexpr(not INTERPRETED)


@triton.jit
def begin():  # type: ignore[no-untyped-def]
    """Open a kernel: wait until the kernel before it has ended and its writes are seen, then let the next be placed.

    Nothing may be loaded before it. On its own, without a dependent launch, it does nothing.
    """
    if _COMPILED:  # noqa: SIM102 - the interpreter has no target to ask
        if target_info.cuda_capability_geq(9, 0):
            gdc_wait()
            gdc_launch_dependents()


Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_recorder: Recorder | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid`, or hand it to the recorder; `options` are its constexprs, num_warps and num_stages."""
    if _recorder is not None:
        _recorder(kernel, grid, args, options | _of_launch(kernel, target_info.current_target()))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if 0 in grid or device.type == "meta":
        return
    expected = "tensors on a GPU, or Triton's interpreter (TRITON_INTERPRET=1 in the environment)"
    check(device.type == "cuda" or INTERPRETED, "device", expected, device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, **options | _of_launch(kernel, target_info.current_target()))
    else:
        kernel[grid](*args, **options)


def launch_fault() -> str:
    """Say why Triton cannot launch kernels on this machine's GPU, as its C part lacks something; empty where it can."""
    try:
        triton.runtime.driver.active  # noqa: B018 - loads the C part, or compiles it
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} cannot compile Triton's C part (without Python's headers, python3-dev, it cannot)"
    except (RuntimeError, OSError, AssertionError) as error:
        return " ".join(f"{error}".split())[:200]
    return ""


def _of_launch(kernel: Any, target: Any) -> dict[str, Any]:
    """Options that a launch takes because of the device."""
    early = dependent and target is not None and target.backend == "cuda" and target.arch >= 90 and waits(kernel)
    return {"launch_pdl": True} if early else {}


@functools.cache
def waits(kernel: Any) -> bool:
    """Tell whether `kernel` opens with `begin()`, so that it may be placed before the one before it has ended."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0].body  # type: ignore[attr-defined]
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):  # a docstring
        body = body[1:]
    return ast.unparse(body[0]) == "begin()"


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Send every launch to `recorder(kernel, grid, args, options)` instead of running it."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def cdiv(a: int, b: int) -> int:
    """Divide a by b and round up."""
    return -(-a // b)


@functools.cache
def power_of_2(n: int) -> int:
    """Smallest power of 2 that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError `name: expected …, got …` unless `condition`; tensors are shown by type and shape."""
    if not condition:
        shown = f"{got.dtype} {tuple(got.shape)} on {got.device}" if isinstance(got, Tensor) else got
        raise ValueError(f"{name}: expected {expected}, got {shown}")


KERNEL_TYPES = (torch.float32, torch.bfloat16)
"""Types that kernels read and write; float64 belongs to the definitions."""


def use_kernel(kernel: bool | None, *tensors: Tensor | None) -> bool:
    """Decide by `kernel` what runs; None: the kernel on CUDA where it knows every type, the definition elsewhere.

    Whoever records launches on `meta` asks for the kernel.

    Raises:
        ValueError: the kernel is asked for where it cannot run.
    """
    given = [x for x in tensors if x is not None]
    known = all(x.dtype in KERNEL_TYPES for x in given if x.is_floating_point())
    if kernel is None:
        return known and given[0].is_cuda
    if kernel:
        check(known, "kernel", "float32 or bfloat16 tensors", [x.dtype for x in given])
        runs = given[0].device.type != "cpu" or INTERPRETED
        check(runs, "kernel", "tensors on a GPU, or Triton's interpreter", given[0])
    return kernel

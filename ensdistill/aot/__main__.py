"""Compile the kernels of the recipes ahead of time, without a GPU: `python -m ensdistill.aot`.

Every launch of a training step is traced on `meta` tensors, which have shapes and alignment and no values, and compiled
by Triton's own JIT, which is told that a GPU of the wanted architecture is there. The cache that this fills is the one
that a run on such a GPU reads (`TRITON_CACHE_DIR=FOLDER`), C launchers included where Triton has them (3.6): it then
compiles no kernel.

A run hits the cache if it has the same Python (its version), Triton, ptxas and kernels, and none of Triton's variables
that change code (TRITON_DEFAULT_FP_FUSION, TRITON_F32_DEFAULT, DISABLE_PTXAS_OPT, …) in its environment; driver, CUDA
and PyTorch do not matter. Triton writes absolute paths into its cache: after a move, run `--check FOLDER` once, which
mends them. `--check` asserts the hit: on a GPU by launching every variant on zeros, elsewhere for `--archs`.

The table of what each variant asks of the GPU lies beside the cache. Exit code 1, with kernel and variant, where one
spills, multiplies half-precision matrices without tensor cores or wants more shared memory than there is.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from triton import knobs

from ensdistill.aot.resources import Resources, format_table, read_resources, write_table
from ensdistill.aot.trace import Variant, compiling_for, trace
from ensdistill.config.recipes import RECIPES, find_recipe, require_named_builder
from ensdistill.costs.dry_run import Tiles, programs
from ensdistill.kernels import launch
from ensdistill.kernels.conv import tiles
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.errors import RunFailed, UserError, run_main
from ensdistill.runtime.files import read_json


@dataclass(frozen=True, kw_only=True)
class Command:
    """Compile the kernels of recipes ahead of time, without a GPU."""

    recipes: tuple[str, ...] = ()
    """Recipes whose kernels are compiled; default: all of them."""
    archs: tuple[int, ...] = (90,)
    """Compute capabilities of the GPUs, 90 for 9.0."""
    cache: Path = Path("build/aot/cache")
    """Triton cache to fill; its tables resources_sm*.csv are written into the folder above it."""
    tiles: Tiles = "default"
    """`all`: every tile that tuning may choose, too (six times the variants): it then compiles nothing either."""
    jobs: int = 0
    """Compilers at a time; 0: as many as there are processors."""
    keep_ir: bool = False
    """Keep every intermediate form in the cache (PTX, LLVM, TTGIR), not the first and the last alone."""
    check: Path | None = None
    """Compile nothing: assert that this cache has every variant."""
    builder: str | None = None
    """The function package.module:function that a recipe out of a file may call to build its network."""
    list: bool = False
    """Print the variants and stop."""


# ---- compiling ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Result of compiling one variant."""

    index: int
    seconds: float
    resources: Resources | None = None
    error: str = ""
    launcher_error: str = ""


_variants: list[Variant] = []  # workers are forked: arguments on `meta` and JIT functions need not be sent
_keep_ir = False


def _compile(arch: int, index: int, libcuda: str) -> Outcome:
    variant, start = _variants[index], time.perf_counter()
    with compiling_for(arch):
        try:
            kernel = variant.kernel.warmup(*variant.args, grid=variant.grid, **variant.options)
        except Exception as error:  # whatever a compiler raises is a line of the report
            return Outcome(index, time.perf_counter() - start, error=" ".join(f"{error}".split())[:500])
        launcher_error = _build_launcher(kernel, libcuda)
    files = {Path(path).suffix: Path(path) for path in kernel.metadata_group.values()}
    resources = read_resources(
        arch=arch,
        kernel=variant.name,
        variant=variant.text,
        cubin=files[".cubin"],
        ttir=files[".ttir" if ".ttir" in files else ".ttgir"].read_text(),  # Gluon starts from the latter
        shared=kernel.metadata.shared,
    )
    if not _keep_ir:
        for suffix in (".source", ".ttgir", ".llir", ".ptx"):
            if suffix in files:
                files[suffix].unlink(missing_ok=True)
        for group in files[".cubin"].parent.glob("__grp__*.json"):
            _note_files(group)
    return Outcome(index, time.perf_counter() - start, resources, launcher_error=launcher_error)


def _build_launcher(kernel: Any, libcuda: str) -> str:
    """Put what C a launch of `kernel` needs into the cache, as far as this Triton has it; the reason where that fails.

    Triton 3.6 compiles a launcher a signature when it first launches it; later ones hand the arguments to their one C
    module, which 3.8 keeps under the folder of the machine's libcuda: a cache made elsewhere cannot hold that. What is
    compiled is loaded, which without a GPU cannot be: the loader is taken out, in a process used for nothing else.
    """
    from triton.backends.nvidia import driver
    from triton.runtime import build

    class Unloaded:
        def __getattr__(self, name: str) -> None:
            return None

    loader: Any = build
    loader._load_module_from_path = lambda name, path: Unloaded()
    knobs.nvidia.libcuda_path = libcuda
    try:
        if hasattr(driver, "compile_module_from_src"):  # kept by its text alone, for every machine
            driver.CudaUtils()
        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(kernel.src, kernel.metadata)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return " ".join(f"{error}".split())[:200]
    return ""


def _make_libcuda(folder: Path) -> None:
    """An empty libcuda.so.1 in `folder`: launchers are linked against its name, and load the real one when they run."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler:
        subprocess.run(
            [compiler, "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"],
            check=True,
        )


def compile_all(arch: int, variants: list[Variant], *, jobs: int = 0, keep_ir: bool = False) -> list[Outcome]:
    """Compile `variants` for `arch` into the cache that `knobs.cache.dir` names, a line of output a kernel."""
    global _variants, _keep_ir
    _variants, _keep_ir = variants, keep_ir
    outcomes: list[Outcome] = []
    number, seconds = Counter(variant.name for variant in variants), defaultdict[str, list[float]](list)
    with tempfile.TemporaryDirectory() as libcuda:
        _make_libcuda(Path(libcuda))
        workers = min(jobs or len(os.sched_getaffinity(0)), max(1, len(variants)))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(_compile, arch, index, libcuda) for index in range(len(variants))]
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    outcomes.append(outcome)
                    name = variants[outcome.index].name
                    seconds[name].append(outcome.seconds)
                    if len(seconds[name]) == number[name]:
                        print(
                            f"[{len(outcomes)}/{len(variants)}] sm_{arch} {name}: {number[name]} variants, "
                            f"{sum(seconds[name]):.1f} s",
                            flush=True,
                        )
            except BrokenProcessPool:
                left = sorted({variants[i].name for i, future in enumerate(futures) if not future.done()})
                raise RunFailed(
                    f"a compiler process died (out of memory, or a crash of the compiler) at one of: {', '.join(left)}"
                ) from None
    return sorted(outcomes, key=lambda outcome: outcome.index)


def report(arch: int, variants: list[Variant], outcomes: list[Outcome]) -> tuple[list[Resources], list[str]]:
    """(rows of the table, faults with kernel and variant)."""
    rows, faults = [], []
    for outcome in outcomes:
        variant = variants[outcome.index]
        found = [f"does not compile: {outcome.error}"] if outcome.resources is None else outcome.resources.faults()
        if outcome.resources is not None:
            rows.append(outcome.resources)
        faults += [f"sm_{arch} {variant.name}: {fault} [{variant.text}]" for fault in found]
    return rows, faults


# ---- the cache ------------------------------------------------------------------------------------------------------


def use_cache(cache: Path) -> None:
    """Make `cache` Triton's, and right the paths in it if it was moved: Triton finds files by the paths it noted."""
    cache = cache.absolute()
    knobs.cache.dir = str(cache)
    for group in cache.glob("*/__grp__*.json"):
        _note_files(group)


def _note_files(group: Path) -> None:
    """Make a kernel's list in the cache name the files that are there, where they are: Triton 3.8 takes no other.

    A damaged list is deleted: its kernel is compiled again.
    """
    try:
        noted = msgspec.convert(read_json(group)["child_paths"], dict[str, str])
        if any(Path(name).name != name for name in noted):
            raise ValueError("files of another folder")
    except (ValueError, LookupError, TypeError) as error:
        warnings.warn(f"{group}: no list of a kernel's files ({error!r:.200}); it will be compiled again", stacklevel=2)
        group.unlink()
        return
    paths = {name: str(group.parent / name) for name in noted if (group.parent / name).exists()}
    if paths != noted:
        temporary = group.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"child_paths": paths}))
        temporary.replace(group)


def _on_device(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        # what is no multiple of 16 bytes away from an allocation's start stays none
        offset = arg.data_ptr() % 16 // arg.itemsize
        elements = 1 + sum((n - 1) * stride for n, stride in zip(arg.shape, arg.stride(), strict=True))
        return torch.zeros(offset + elements, dtype=arg.dtype, device="cuda").as_strided(
            arg.shape, arg.stride(), offset
        )
    if hasattr(arg, "block_shape"):  # a tensor descriptor, Triton's or Gluon's
        return replace(arg, base=_on_device(arg.base))
    return arg


def missing_from_cache(arch: int, variants: list[Variant]) -> list[str]:
    """List the variants that had to be compiled although the cache should have had them: `kernel [variant]` each.

    On a GPU of `arch` each is launched, on zeros, and a launcher that had to be compiled counts as well; elsewhere the
    JIT is asked as it was when the cache was filled. What was missing is in the cache afterwards.
    """
    missing: list[str] = []
    launching = torch.cuda.is_available()
    for variant in variants:
        text = f"sm_{arch} {variant.name} [{variant.text}]"

        def listener(*, cache_hit: bool, text: str = text, **event: Any) -> None:
            if not cache_hit:
                missing.append(text)

        before, knobs.compilation.listener = knobs.compilation.listener, listener
        try:
            if launching:
                launchers = set(Path(knobs.cache.dir).glob("*/*launcher*.so"))
                launch.launch(variant.kernel, variant.grid, *map(_on_device, variant.args), **variant.options)
                torch.cuda.synchronize()
                if set(Path(knobs.cache.dir).glob("*/*launcher*.so")) != launchers:
                    missing.append(f"launcher of {text}")
            else:
                variant.kernel.warmup(*variant.args, grid=variant.grid, **variant.options)
        finally:
            knobs.compilation.listener = before
    return missing


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the command `python -m ensdistill.aot`; its exit code."""
    command = parse_arguments(Command, "ensdistill.aot", description=__doc__)
    recipes = {name: find_recipe(name) for name in command.recipes or RECIPES}
    for name, config in recipes.items():
        require_named_builder(name, config.builder, [command.builder], "--builder")
    archs = command.archs
    if command.jobs < 0:
        raise UserError(f"--jobs: got {command.jobs}, expected 0 (all processors) or a positive number")
    if unknown := set(archs) - set(tiles.SHARED_LIMIT):
        raise UserError(f"--archs {min(unknown)}: expected some of {', '.join(map(str, tiles.SHARED_LIMIT))}")
    if command.check is not None:
        if not command.check.is_dir():
            raise UserError(
                f"--check {command.check}: no such folder; python -m ensdistill.aot --cache FOLDER fills one"
            )
        if torch.cuda.is_available():
            archs = (tiles.capability(torch.device("cuda")),)
    elif not command.list:
        _check_writable(command.cache)
    use_cache(command.check or command.cache)
    failed = False
    for arch in archs:
        start = time.perf_counter()
        with compiling_for(arch):
            variants = trace((name, programs(config, command.tiles)) for name, config in recipes.items())
        print(f"sm_{arch}: {len(variants)} variants of {len({v.name for v in variants})} kernels", flush=True)
        for name in [name for name in recipes if not any(name in variant.recipes for variant in variants)]:
            print(f"sm_{arch}: {name} launches none: its network runs through PyTorch's modules", flush=True)
        if command.list:
            for variant in variants:
                print(f"{variant.name} [{variant.text}] {', '.join(variant.recipes)}")
        elif command.check is not None:
            failed |= _check(arch, variants)
        else:
            outcomes = compile_all(arch, variants, jobs=command.jobs, keep_ir=command.keep_ir)
            rows, faults = report(arch, variants, outcomes)
            table = command.cache.absolute().parent / f"resources_sm{arch}.csv"
            write_table(table, rows)
            print(format_table(rows))
            slow = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:3]
            compiling = sum(outcome.seconds for outcome in outcomes)
            print(
                f"sm_{arch}: {time.perf_counter() - start:.0f} s, of compiling {compiling:.0f} s, "
                f"slowest {', '.join(f'{variants[o.index].name} {o.seconds:.1f} s' for o in slow)}; table: {table}"
            )
            if reasons := {outcome.launcher_error for outcome in outcomes if outcome.launcher_error}:
                print(f"C launchers are left to the first run: {'; '.join(sorted(reasons))}")
            for fault in faults:
                print(f"error: {fault}", file=sys.stderr)
            failed |= bool(faults)
    return int(failed)


def _check_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for folder in (cache, cache.absolute().parent):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"--cache {cache}: cannot be written, or the folder above it ({error.strerror}); choose another"
        ) from None


def _check(arch: int, variants: list[Variant]) -> bool:
    if torch.cuda.is_available():
        missing = missing_from_cache(arch, variants)
    else:
        with compiling_for(arch):
            missing = missing_from_cache(arch, variants)
    for text in missing:
        print(f"error: not in the cache: {text}", file=sys.stderr)
    how = "launched" if torch.cuda.is_available() else "asked for, without a GPU"
    print(f"sm_{arch}: {len(variants)} variants {how}, {len(missing)} compiled")
    return bool(missing)


if __name__ == "__main__":
    raise SystemExit(run_main(main))

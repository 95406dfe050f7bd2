"""Environment of a run: versions, device, commit, precision of its arithmetic."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch

from ensdistill.runtime.errors import UserError
from ensdistill.runtime.ranks import local_processes

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_PACKAGES = ("ensdistill", "torch", "triton", "ffcv", "numpy", "numba", "safetensors")


def environment(device: torch.device, precision: Precision) -> dict[str, object]:
    """Versions, processor, device and commit, as plain values."""
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "precision": precision,
        "commit": commit(),
        "versions": versions(),
    }
    if device.type == "cuda":
        facts["driver"] = driver_version()
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["capability"] = torch.cuda.get_device_capability(device)
    return facts


def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    return {package: _version(package) for package in _PACKAGES}


@functools.cache  # 70 ms for all of them, before every file that is exported
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """Name that the device gives itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@functools.cache
def driver_version() -> str:
    """The NVIDIA driver's version, by the kernel's or by NVML; else the CUDA version that it serves; else `unknown`."""
    try:
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", _DRIVER_FILE.read_text())
    except OSError:  # a container need not show it
        found = None
    return found[1] if found else _nvml_driver_version() or _served_cuda_version() or "unknown"


def _nvml_driver_version() -> str | None:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            version = nvml.nvmlSystemGetDriverVersion()
        finally:
            nvml.nvmlShutdown()
    except Exception:  # not installed, no library, no permission: all NVML's own kinds
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def _served_cuda_version() -> str | None:
    number = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else f"cuda{number.value}"


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; by default a GPU where there is one.

    Raises:
        UserError: no device has that name, or there is no such GPU here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: not a device; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} usable GPUs; choose another or cpu"
        )
    return device


def choose_precision(asked: str, device: torch.device) -> Precision:
    """`auto` becomes bf16 where the device computes in it, else fp32; what is asked for by name is given."""
    if asked in ("fp32", "bf16"):
        return asked  # type: ignore[return-value]
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


# Below this a second thread costs more than it brings. Measured on 2 cores with WRN-10-1 and threads that wait
# passively: 64 images of 28 px (53e6) break even or gain, of 16 px (17e6) take 1.0 to 1.7 x as long with two threads,
# and 50 of 8 px (3e6) 2.2 to 2.7 x.
_MIN_LAYER_MACS = 32e6


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, and no more than its control groups give it time for."""
    cores = len(os.sched_getaffinity(0))
    return max(1, int(min([cores, *_quotas()])))


def _quotas() -> list[float]:
    """Cores' worth of time that each control group of this process, and each above it, has."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for _, names, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if names and "cpu" not in names.split(","):
            continue
        root = _GROUPS / names if names else _GROUPS  # without a name: all of version 2
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            quotas += [quota for quota in (_quota(folder),) if quota is not None]
    return quotas


def _quota(group: Path) -> float | None:
    try:
        if (limit := group / "cpu.max").exists():
            used, period = limit.read_text().split()
        else:
            used, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(used) / int(period) if int(used) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return None


def choose_threads(asked: int | None, layer_macs: float) -> int:
    """CPU threads: what is asked for, else one for a network whose layers are tiny, else what PyTorch would take.

    Never more than `usable_cores`: on one core two threads are a hundred times as slow as one.

    Of several processes that torchrun started each takes its share of the cores in place of what PyTorch would. The
    choice depends on no measurement: sums in another order would make a resumed run another one.

    Args:
        layer_macs: multiply-accumulates of an average layer in a forward of a batch.
    """
    wanted = asked or (1 if is_tiny(layer_macs) else _default_threads())
    return min(wanted, usable_cores())


def is_tiny(layer_macs: float) -> bool:
    """Tell whether an average layer of a batch is too little work for more than one thread."""
    return layer_macs < _MIN_LAYER_MACS


def _default_threads() -> int:
    """Threads that PyTorch would take; of several processes on this machine, each its share of the cores.

    torchrun sets OMP_NUM_THREADS=1 where it is not set, however many cores there are: that is nobody's wish. Another
    number is.
    """
    processes = local_processes()
    if processes == 1 or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return torch.get_num_threads()
    return max(1, usable_cores() // processes)


@functools.cache
def commit() -> str:
    """The checkout's commit, with `+` where it has uncommitted changes; `unknown` outside a checkout.

    ENSDISTILL_COMMIT in the environment says it where the files came without their history.
    """
    if named := os.environ.get("ENSDISTILL_COMMIT"):
        return named
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


def _cpu_has_bf16() -> bool:
    return (
        torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX")
        and _cpu_flags() & {"avx512_bf16", "amx_bf16"} != set()
    )


def _cpu_flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision, *, cache: bool = True) -> AbstractContextManager[None]:
    """Convolutions and linear layers in bf16 where `precision` says so; everything else keeps its type.

    `cache`: weights are cast once; threads share what was cast.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=cache)

"""The GPU, its settings and what it gives at best: `python -m bench.gpu_facts FILE` writes one JSON object.

A process of its own, so that no CUDA context of ours is on the GPU while others measure. What driver or board do not
tell is null. Exit code 2 where PyTorch sees no GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ensdistill.monitor.gpu import GpuNames, limits_in_words
from ensdistill.runtime.environment import commit, versions
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.runtime.timing import device_seconds_of

_ROUNDS, _WARM_UPS = 9, 3


def facts(device: torch.device) -> dict[str, Any]:
    """Describe a GPU: the board, its settings and ceilings, what else runs on it, and the software."""
    board = torch.cuda.get_device_properties(device)
    return {
        "device": board.name,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
        **versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": 10 * board.major + board.minor,
        "multiprocessors": board.multi_processor_count,
        "memory_gb": round(board.total_memory / 1e9, 2),
        "l2_mb": round(board.L2_cache_size / 1e6, 1),
        **board_settings(GpuNames.of(device)),
        **ceilings(device),
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure the GPU at its best, on random data: a copy in TB/s, read and written, and a bf16 product in TFLOP/s.

    Medians of nine; `sm_busy_mhz` is the clock right behind the products.
    """
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (1 << 30,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = _milliseconds(lambda: target.copy_(source))
    product = _milliseconds(lambda: torch.matmul(a, b))
    busy = board_settings(GpuNames.of(device)).get("sm_mhz")
    rates = {"copy_tb_s": 2 * source.nbytes / copy / 1e9, "matmul_tflops": 2 * n**3 / product / 1e9}
    return {**{name: float(f"{rate:.4g}") for name, rate in rates.items()}, "sm_busy_mhz": busy}


def _milliseconds(call: Callable[[], object]) -> float:
    times = [1e3 * device_seconds_of(call, torch.device("cuda")) for _ in range(_WARM_UPS + _ROUNDS)]
    return max(statistics.median(times[_WARM_UPS:]), 1e-6)


def board_settings(names: GpuNames, nvml: Any = None) -> dict[str, Any]:
    """Ask NVML for driver, clocks in MHz, power in W, ECC, MIG, what holds the clock down, and other processes.

    Args:
        nvml: the module pynvml, or one like it.
    """
    settings: dict[str, Any] = {}
    try:
        nvml = nvml or importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # no package, or NVML's own errors without a driver
        return {"driver": None, "nvml": f"not available ({error})"}
    try:
        gpu = _find(nvml, names)
        questions: dict[str, Callable[[], Any]] = {
            "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, 1),
            "sm_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, 1),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, 2),
            "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(gpu)[0]),
            "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(gpu)[0]),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, 0),
            "memory_used_gb": lambda: round(nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9, 2),
            "clock_limits": lambda: "; ".join(limits_in_words(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))),
            # a container may show none, or number them otherwise
            "other_processes": lambda: len(
                {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)} - {os.getpid()}
            ),
        }
        for name, question in questions.items():
            settings[name] = None
            with contextlib.suppress(Exception):  # NVML's many kinds, and functions that this pynvml lacks
                settings[name] = question()
    except Exception as error:  # NVML's own, where it does not know the GPU
        settings |= {"driver": None, "nvml": f"does not know this GPU ({error})"}
    finally:
        with contextlib.suppress(Exception):
            nvml.nvmlShutdown()
    return settings


def _find(nvml: Any, names: GpuNames) -> Any:
    for uuid in names.uuids:
        with contextlib.suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(uuid)
    return nvml.nvmlDeviceGetHandleByPciBusId(names.pci)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def main() -> int:
    """Run the command, whose one argument is the file to write."""
    if not torch.cuda.is_available():
        raise UserError(
            f"gpu-check: PyTorch {torch.__version__} sees no NVIDIA GPU, and everything in it runs on one; "
            "on a machine with a GPU see that nvidia-smi answers and that torch is a CUDA build (make TORCH=…)"
        )
    found = facts(torch.device("cuda"))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    known = {name: value for name, value in found.items() if value not in (None, "")}
    print(json.dumps(known))
    print(
        f"{found['device']}: driver {found['driver']}, CUDA {found['cuda']}, torch {found['torch']}, copy "
        f"{found['copy_tb_s']} TB/s, bf16 product {found['matmul_tflops']} TFLOP/s at {found['sm_busy_mhz']} MHz"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

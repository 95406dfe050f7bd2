"""What GPU this is and how it is set, with the versions above it: `python -m bench.gpu_facts` prints one JSON object.

A process of its own: whoever measures afterwards shall not find a CUDA context of ours on the GPU. What driver or board
do not tell is null. Exit code 2 where PyTorch sees no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from ensdistill.environment import commit, versions
from ensdistill.errors import UserError, run_main
from ensdistill.gpu_readings import GpuNames, limits_in_words

_CLOCKS = {"sm": 1, "memory": 2}  # NVML_CLOCK_SM, NVML_CLOCK_MEM


def facts(device: torch.device) -> dict[str, Any]:
    """Of PyTorch's `device`, a GPU: itself, its settings, what else runs on it, and the software."""
    board = torch.cuda.get_device_properties(device)
    return {
        "device": board.name,
        **software(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": 10 * board.major + board.minor,
        "multiprocessors": board.multi_processor_count,
        "memory_gb": round(board.total_memory / 1e9, 2),
        "l2_mb": round(board.L2_cache_size / 1e6, 1),
        **board_settings(GpuNames.of(device)),
    }


def software() -> dict[str, Any]:
    """What does not need a GPU to be known."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
        **versions(),
    }


def board_settings(names: GpuNames, nvml: Any = None) -> dict[str, Any]:
    """Driver, clocks in MHz, power in W, ECC, MIG, what holds the clock down, and processes that compute on the GPU.

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
            "power_limit_default_w": lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(gpu) / 1e3,
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(gpu)[0]),
            "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(gpu)[0]),
            "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(gpu)),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(gpu, 0),
            "utilisation_before": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            "memory_used_gb": lambda: round(nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9, 2),
            "clock_limits": lambda: "; ".join(limits_in_words(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))),
            "other_processes": lambda: _others(nvml.nvmlDeviceGetComputeRunningProcesses(gpu)),
        }
        asked = {"": "nvmlDeviceGetClockInfo", "max_": "nvmlDeviceGetMaxClockInfo"}
        asked["application_"] = "nvmlDeviceGetApplicationsClock"
        for name, number in _CLOCKS.items():
            for kind, function in asked.items():
                questions[f"{name}_{kind}mhz"] = functools.partial(_clock, nvml, function, gpu, number)
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


def _others(processes: Any) -> int:
    """How many beside this one; a container may show none, or number them otherwise."""
    return len({process.pid for process in processes} - {os.getpid()})


def _clock(nvml: Any, function: str, gpu: Any, number: int) -> int:
    mhz: int = getattr(nvml, function)(gpu, number)
    return mhz


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def main() -> int:
    """The command."""
    if not torch.cuda.is_available():
        raise UserError(
            f"gpu-check: PyTorch {torch.__version__} sees no NVIDIA GPU, and everything in it runs on one; "
            "on a machine with a GPU see that nvidia-smi answers and that torch is a CUDA build (make TORCH=…)"
        )
    print(json.dumps(facts(torch.device("cuda"))))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

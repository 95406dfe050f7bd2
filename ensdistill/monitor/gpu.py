"""Readings of an NVIDIA GPU by NVML (the package nvidia-ml-py). Nothing here touches CUDA once the names are known.

NVML numbers the GPUs of the machine, PyTorch those that CUDA_VISIBLE_DEVICES leaves, in an order of its own: only the
UUID or the PCI address says which is which.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ensdistill.monitor.readings import Reading

T = TypeVar("T")

_IDLE = 0x1
# NVML's bits (nvmlClocksEventReason…, before driver 535 nvmlClocksThrottleReason…).
_LIMITS = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
_CLOCK_SM = 1  # NVML_CLOCK_SM
_TEMPERATURE_GPU = 0  # NVML_TEMPERATURE_GPU


@dataclass(frozen=True, kw_only=True)
class GpuNames:
    """Names that NVML may know a GPU by."""

    uuids: tuple[str, ...]
    """UUIDs as a whole GPU, and as a part (MIG) of one."""
    pci: str | None
    """PCI address domain:bus:device.function."""

    @classmethod
    def of(cls, device: torch.device) -> GpuNames:
        """Names of PyTorch's `device`."""
        facts = torch.cuda.get_device_properties(device)
        uuid = getattr(facts, "uuid", None)
        address = [getattr(facts, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
        numbers = [number for number in address if number is not None]
        return cls(
            uuids=() if uuid is None else (f"GPU-{uuid}", f"MIG-{uuid}"),
            pci="{:08X}:{:02X}:{:02X}.0".format(*numbers) if len(numbers) == 3 else None,
        )


class GpuSource:
    """A `readings.Source` of one GPU.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        Exception: NVML's own, without a driver or where it does not know the GPU.
    """

    def __init__(self, names: GpuNames) -> None:
        self.notes: list[str] = []
        self._lost: set[str] = set()
        self._nvml: Any = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        try:
            self._gpu = self._find(names)
        except BaseException:
            self._nvml.nvmlShutdown()
            raise

    def _find(self, names: GpuNames) -> Any:
        nvml = self._nvml
        error: Exception = LookupError("PyTorch tells neither the UUID nor the PCI address of the GPU")
        for uuid in names.uuids:
            try:
                return nvml.nvmlDeviceGetHandleByUUID(uuid)
            except nvml.NVMLError as unknown:
                error = unknown
        if names.pci is not None:
            return nvml.nvmlDeviceGetHandleByPciBusId(names.pci)
        raise error

    def read(self) -> Reading:
        """The GPU as it is."""
        nvml, gpu = self._nvml, self._gpu
        return Reading(
            device="GPU",
            utilisation=self._ask("utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
            clock_mhz=self._ask("SM clock", lambda: nvml.nvmlDeviceGetClockInfo(gpu, _CLOCK_SM)),
            power_w=self._ask("power", lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3),
            memory_gb=self._ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9),
            temperature_c=self._ask("temperature", self._temperature),
            limits=self._ask("throttle reasons", self._limits),
            other_processes=self._ask("other processes", self._other_processes),
            energy_j=self._ask("energy counter", lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3),
        )

    def close(self) -> None:
        """Let go of NVML: it counts its users."""
        self._nvml.nvmlShutdown()

    def _ask(self, name: str, question: Callable[[], T]) -> T | None:
        if name in self._lost:
            return None
        try:
            return question()
        except Exception as error:  # NVML's many kinds, and functions that this pynvml lacks
            self._lost.add(name)
            self.notes.append(f"{name} ({error})")
            return None

    def _first(self, *names: str) -> Any:
        """Answer of the first of NVML's functions `names` that package and driver have."""
        for name in names[:-1]:
            try:
                return getattr(self._nvml, name)(self._gpu)
            except (AttributeError, self._nvml.NVMLError_FunctionNotFound):
                continue
        return getattr(self._nvml, names[-1])(self._gpu)

    def _temperature(self) -> float:
        nvml = self._nvml
        if hasattr(nvml, "nvmlDeviceGetTemperature"):  # to be taken out of CUDA 14
            return nvml.nvmlDeviceGetTemperature(self._gpu, _TEMPERATURE_GPU)
        return nvml.nvmlDeviceGetTemperatureV(self._gpu, _TEMPERATURE_GPU)

    def _limits(self) -> tuple[str, ...]:
        bits = self._first("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return limits_in_words(bits)

    def _other_processes(self) -> int | None:
        """None where not even this process is listed: containers hide processes, or number them otherwise.

        Numbered otherwise, one of them is this process, which computes there.
        """
        listed = self._first("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetComputeRunningProcesses_v2")
        pids = {process.pid for process in listed}
        if not pids:
            raise LookupError("this process is not listed")
        return len(pids - {os.getpid()}) if os.getpid() in pids else len(pids) - 1


def limits_in_words(bits: int) -> tuple[str, ...]:
    """NVML's reasons for a clock below the highest; idling is none."""
    bits &= ~_IDLE
    known = [word for bit, word in _LIMITS.items() if bits & bit]
    rest = bits & ~sum(_LIMITS)
    return (*known, f"reason {rest:#x}") if rest else tuple(known)

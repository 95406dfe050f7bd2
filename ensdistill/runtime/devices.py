"""What processors give at best: arithmetic and memory rates, from measurements or data sheets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ensdistill.runtime.errors import UserError, nearest
from ensdistill.runtime.timing import seconds_of


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a processor gives at best."""

    name: str
    """As `--device` has it."""
    flops: float
    """FLOP/s of dense products in the type that `element_bytes` implies."""
    bandwidth: float
    """Bytes/s of main memory."""
    source: str
    """Where the two rates come from: `measured`, by a product of two random 8192x8192 matrices in bf16 and by a copy
    within the device (reads and writes counted), or `data sheet`, which programs stay some 10 to 20 % below."""
    element_bytes: int = 2
    """Bytes an activation: 2 in bf16, 4 in fp32."""
    torch_names: tuple[str, ...] = ()
    """What `torch.cuda.get_device_name` calls it."""

    @property
    def rates(self) -> str:
        """Both rates and where they come from: `788 TFLOP/s, 4.3 TB/s (measured)`."""
        return f"{self.flops / 1e12:.3g} TFLOP/s, {self.bandwidth / 1e12:.3g} TB/s ({self.source})"


DEVICES = {
    device.name: device
    for device in (
        Device(name="H100", flops=800e12, bandwidth=3.0e12, source="measured", torch_names=("NVIDIA H100 80GB HBM3",)),
        Device(name="H200", flops=788e12, bandwidth=4.3e12, source="measured", torch_names=("NVIDIA H200",)),
        Device(
            name="A100-80GB",
            flops=312e12,
            bandwidth=2.039e12,
            source="data sheet",
            torch_names=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ),
        Device(name="L40S", flops=362e12, bandwidth=0.864e12, source="data sheet", torch_names=("NVIDIA L40S",)),
        Device(name="L4", flops=121e12, bandwidth=0.3e12, source="data sheet", torch_names=("NVIDIA L4",)),
    )
}


def find_device(name: str) -> Device:
    """The device called `name`; `cpu` is measured now, in fp32 (0.4 s).

    Raises:
        UserError: no rates are known for it.
    """
    if name.lower() == "cpu":
        return measure_cpu("fp32")
    for device in DEVICES.values():
        if device.name.lower() == name.lower():
            return device
    known = ["cpu", *DEVICES]
    raise UserError(
        f"device '{name}': its rates are not known{nearest(name.upper(), known)}; expected one of {', '.join(known)}"
    )


def installed_gpu() -> Device | None:
    """The table's entry for the GPU that PyTorch sees, if there is one."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((device for device in DEVICES.values() if name in device.torch_names), None)


def measure_cpu(precision: Literal["fp32", "bf16"]) -> Device:
    """This machine's CPU, at the threads PyTorch uses: its best convolution and its best copy (0.4 s).

    A convolution, because on some processors a matrix product goes to a library that gives half of what they can. The
    copy fits in the cache, as a small network's activations do, so that the floor stays below what can be reached.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Large enough for the peak, short enough to fall between other programs' turns.
    B, size, C = 16, 14, 128
    x_BCHW = torch.randn(B, C, size, size).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(C, C, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    source = torch.randn(1 << 18)
    copy = torch.empty_like(source)
    conv_seconds = _best_seconds(lambda: torch.conv2d(x_BCHW, weight, padding=1), budget=0.3)
    copy_seconds = _best_seconds(lambda: copy.copy_(source), budget=0.05)
    return Device(
        name="cpu",
        flops=2 * x_BCHW.numel() * weight[0].numel() / conv_seconds,
        bandwidth=2 * source.nbytes / copy_seconds,
        source=f"measured now, {torch.get_num_threads()} threads, {precision}",
        element_bytes=dtype.itemsize,
    )


def _best_seconds(function: Callable[[], object], budget: float) -> float:
    function()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, seconds_of(function, torch.device("cpu")))
    return best

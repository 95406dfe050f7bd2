"""What every part of the comparison is told: the problem, the device, the budget; and what it fills its rows with."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness.calibrated import calibrated
from bench.harness.rows import Row
from bench.harness.turns import Timing
from ensdistill.config.methods import Method
from ensdistill.costs.floor import step_floor, step_parts
from ensdistill.costs.network import NetworkCost, network_cost
from ensdistill.models import build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import Student
from ensdistill.runtime.devices import Device, installed_gpu
from ensdistill.runtime.environment import Precision

ROOT = Path(__file__).resolve().parents[2]

WRONG = "wrong numbers"
FAILED = "failed"
"""How the notes of rows begin whose providers are not timed because of it: then the comparison ends with code 1."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Problem, device and budget of one comparison."""

    device: torch.device
    """Device that computes."""
    quick: bool
    """True: small sizes and few rounds, all parts together in under 5 minutes on a CPU."""
    precision: Precision
    """Arithmetic of convolutions, where a provider can be asked for it."""
    threads: int
    """Number of PyTorch's CPU threads."""
    network: str
    """Network of teachers and student."""
    E: int
    """Number of teachers, and of the student's members."""
    B: int
    """Images in a training step."""
    size: int
    """Side of an image in pixels."""
    classes: int = 100
    """Number of classes K."""
    providers: tuple[str, ...]
    """Providers of the step, names of bench/rivals."""
    rounds: int
    """Turns of each thing that is timed."""
    seconds: float
    """Seconds after which one measurement ends, three rounds at least."""
    identity: dict[str, str]
    """Device, versions and commit, as `Row` has them."""
    rates: Device | None = None
    """FLOPs and bytes a second that the device gives at best, where they are known."""
    runs: Path | None = None
    """Folder of a run whose quality is put beside the costs."""
    out: Path | None = None
    """Folder that results are written to."""
    say: Callable[[str], None] = field(default=print)
    """Function that shows a line of progress."""

    def row(self, **values: Any) -> Row:
        """Make a row of this context: its device, versions, commit, and its problem where `values` give no other."""
        problem: dict[str, Any] = {
            "network": self.network,
            "E": self.E,
            "B": self.B,
            "size": self.size,
            "precision": self.precision,
        }
        return Row(**(problem | self.identity | values))


class Batches:
    """Random batches on the device, together more bytes than its caches hold: `batches[i]` for any i, in rotation."""

    def __init__(self, context: Context) -> None:
        """Draw images uint8 (B, H, W, 3) and labels int64 (B,)."""
        B, size = context.B, context.size
        shape = (B, size, size, 3)
        num = max(2, math.ceil(_cache_bytes(context.device) / math.prod(shape)))
        generator = torch.Generator().manual_seed(0)
        images_NBHWC = torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=generator)
        labels_NB = torch.randint(0, context.classes, (num, B), generator=generator)
        self._images_NBHWC, self._labels_NB = images_NBHWC.to(context.device), labels_NB.to(context.device)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        n = i % len(self._images_NBHWC)
        return self._images_NBHWC[n], self._labels_NB[n]


def _cache_bytes(device: torch.device) -> int:
    """Give twice a GPU's L2; on a CPU 64 MB, a second's worth of random numbers at most."""
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 64_000_000


def networks_of(context: Context, method: Method) -> tuple[Teachers, Student]:
    """Build the context's teachers and the student of `method`, with activations of order one."""
    return calibrated(
        context.network, str(method), E=context.E, K=context.classes, size=context.size, device=context.device
    )


def release(device: torch.device) -> None:
    """Free the memory of runs that are gone, graphs and the cycles that hold them too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def percentile_columns(timing: Timing) -> dict[str, Any]:
    """Give rounds and percentiles of a timing, as columns of `Row`."""
    shares = (0.2, 0.5, 0.8)
    return {"n": len(timing.seconds)} | {f"p{100 * share:.0f}_ms": timing.quantile_ms(share) for share in shares}


def timing_columns(timing: Timing, images: int) -> dict[str, Any]:
    """Give what a timing tells of a call over so many images, as columns of `Row`."""
    middle = timing.quantile_ms(0.5)
    figures = timing.figures
    energy = figures.energy_wh
    return {
        **percentile_columns(timing),
        "images_per_s": 1e3 * images / middle,
        "wh_per_million": None if energy is None else 1e6 * energy / (timing.calls * images),
        "clock_mhz": timing.clock_mhz,
        "throttled": figures.throttled,
    }


def work_columns(context: Context, method: Method, timing: Timing) -> dict[str, Any]:
    """Relate the work that a step of `method` needs to its time, as columns of `Row`, whoever spent it on what."""
    cost = cost_of(context)
    parts = step_parts(cost, [cost] * context.E, method)
    seconds = timing.quantile_ms(0.5) / 1e3
    element_bytes = 2 if context.precision == "bf16" else 4
    columns: dict[str, Any] = {
        "tflops": sum(part.flops(context.B) for part in parts) / seconds / 1e12,
        "gbps": sum(part.bytes(context.B, element_bytes) for part in parts) / seconds / 1e9,
    }
    if context.rates is not None:
        columns["floor_share"] = sum(part.floor(context.B, context.rates) for part in parts) / seconds
    return columns


def cost_of(context: Context) -> NetworkCost:
    """Count the cost of one forward of the context's network."""
    return forward_cost(context.network, context.size, context.classes)


def forward_cost(network: str, size: int, K: int) -> NetworkCost:
    """Count the cost of one forward of `network` on an image of `size` pixels a side."""
    with torch.device("meta"):
        module = build(network, num_classes=K, image_size=size)
    return network_cost(module, in_channels=3, image_size=size)


def floor_seconds(network: str, method: Method, *, E: int, B: int, size: int, K: int) -> float | None:
    """Give the floor of a step on the installed GPU, in the order of work that needs least, in bf16.

    Returns: None where there is no GPU, or its rates are not known.
    """
    rates = installed_gpu()
    if rates is None:
        return None
    cost = forward_cost(network, size, K)
    return sum(step_floor(cost, [cost] * E, method, B, rates).values())

"""One captured training step, timed and taken apart: `python -m bench.step_profile --backend triton`.

The time is the median of nine turns of thirty steps, by events; the profile is of three replays: each kernel's launches
and microseconds a step, and the share of the time in which any kernel ran (kernels on several streams overlap, gaps are
what no kernel covers). OUT/kernels.csv gets a row a kernel, and first one of the step; rows of other backends stay.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.calibrated import calibrated
from bench.harness.context import floor_seconds
from bench.harness.rows import write_table
from ensdistill.config.methods import Method
from ensdistill.engine.networks import make_networks
from ensdistill.engine.operations import Backend
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.environment import commit, versions
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.runtime.timing import device_seconds_of
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig
from ensdistill.training.stepper import CudaGraph, Stepper

_TURNS, _STEPS, _REPLAYS = 9, 30, 3


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time one captured training step on a GPU, and take it apart by kernel."""

    backend: Backend = "triton"
    """triton: default tiles; tuned: what was measured before, default tiles elsewhere."""
    label: str = ""
    """Name in the rows. Default: the backend."""
    network: str = "wrn28x4"
    """Network of teachers and student."""
    method: str = "latentbe+tdiv-sdiv"
    """Method, written student[+data shown]."""
    members: int = 4
    """Number of members E."""
    batch: int = 128
    """Images in a training step."""
    size: int = 32
    """Side of an image in pixels."""
    classes: int = 100
    """Number of classes K."""
    out: Path | None = None
    """Folder of kernels.csv. Default: none is written."""


@dataclass
class Fixed:
    """Batch of random pixels on the device: `stepper.Inputs` for a step that nobody feeds."""

    images_BHWC: torch.Tensor
    labels_B: torch.Tensor

    def fill(self) -> None:
        """Leave the batch as it is: see `ensdistill.data.inputs.Inputs`."""

    def batch(self, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the same images and labels to every step."""
        return self.images_BHWC, self.labels_B


def busy_share(intervals: Iterable[tuple[float, float]]) -> float:
    """Compute the share of the time, first start to last end, that (start, end) `intervals` cover together."""
    ordered = sorted(intervals)
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered / max(reached - ordered[0][0], 1e-9)


def make_stepper(arguments: Arguments, device: torch.device) -> Stepper:
    """Capture the step over networks whose activations are of order one."""
    method = Method.parse(arguments.method)
    E, K, B, size = arguments.members, arguments.classes, arguments.batch, arguments.size
    teachers, student = calibrated(arguments.network, str(method), E=E, K=K, size=size, device=device)
    networks = make_networks(arguments.backend, teachers if method.needs_teachers else None, student, "bf16", device)
    images_BHWC = torch.randint(0, 256, (B, size, size, 3), dtype=torch.uint8, device=device)
    stepper = Stepper(
        State(networks=networks, optimizer=make_optimizer(student, 5e-4)),
        StepConfig(method=method, seed=0),
        inputs=Fixed(images_BHWC, torch.randint(0, K, (B,), device=device)),
        rates=[1e-3] * 4096,
        device=device,
        rows=4096,
        graph=CudaGraph(device),
    )
    stepper.prepare(0)
    return stepper


def step_times(stepper: Stepper) -> list[float]:
    """Time the turns: milliseconds a step, sorted."""

    def turn() -> None:
        for _ in range(_STEPS):
            stepper()

    for _ in range(20):
        stepper()
    return sorted(1e3 * device_seconds_of(turn, torch.device("cuda")) / _STEPS for _ in range(_TURNS))


def kernel_rows(stepper: Stepper) -> tuple[list[dict[str, Any]], float]:
    """Profile the replays.

    Returns: a row a kernel, those that take longest first; the share of the time in which any of them ran.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_REPLAYS):
            stepper()
        torch.cuda.synchronize()
    on_gpu = [one for one in profile.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, list[float]] = {}
    for one in on_gpu:
        by_name.setdefault(one.name, []).append(one.time_range.elapsed_us())
    ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    rows = [
        {"kernel": name, "launches": round(len(times) / _REPLAYS, 2), "us": round(sum(times) / _REPLAYS, 2)}
        for name, times in ordered
    ]
    share = busy_share((one.time_range.start, one.time_range.end) for one in on_gpu) if on_gpu else 0.0
    return rows, share


def write_rows(path: Path, backend: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` of `backend` to a CSV; what it has of others stays."""
    write_table(path, rows, keep=lambda row: row["backend"] != backend)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parse_arguments(Arguments, "bench.step_profile", argv)
    if not torch.cuda.is_available():
        raise UserError("step_profile: a captured step needs an NVIDIA GPU that PyTorch sees")
    warnings.simplefilter("ignore")
    device, start, label = torch.device("cuda"), time.perf_counter(), arguments.label or arguments.backend
    stepper = make_stepper(arguments, device)
    print(f"prepared in {time.perf_counter() - start:.1f} s, captured: {stepper.is_captured} {stepper.note or ''}")
    times = step_times(stepper)
    losses = [row[0]["loss"] for row in stepper.mark().read().rows]
    kernels, busy = kernel_rows(stepper)
    sizes = {"E": arguments.members, "B": arguments.batch, "size": arguments.size, "K": arguments.classes}
    middle, floor = statistics.median(times), floor_seconds(arguments.network, Method.parse(arguments.method), **sizes)
    found = versions()
    problem = {
        "device": torch.cuda.get_device_name(device),
        "versions": f"torch {found['torch']}, triton {found['triton']}, CUDA {torch.version.cuda}",
        "commit": commit(),
        "network": arguments.network,
        "method": arguments.method,
        "E": arguments.members,
        "B": arguments.batch,
        "backend": label,
    }
    launches = sum(row["launches"] for row in kernels)
    whole = {"kernel": "the step", "launches": launches, "us": round(1e3 * middle, 2)}
    whole |= {"low_us": round(1e3 * times[0], 2), "high_us": round(1e3 * times[-1], 2), "busy": round(busy, 4)}
    empty = dict.fromkeys(("low_us", "high_us", "busy"), "")
    if arguments.out is not None:
        rows = [problem | row for row in (whole, *(row | empty for row in kernels))]
        write_rows(arguments.out / "kernels.csv", label, rows)
    print(f"loss {losses[0]:.4g} … {losses[-1]:.4g}; peak {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")
    for row in kernels[:10]:
        print(f"  {row['us'] / 1e3:7.3f} ms {row['launches']:6g} × {row['kernel'][:90]}")
    share = "" if floor is None else f", {1e3 * floor / middle:.0%} of the floor's speed ({1e3 * floor:.2f} ms)"
    total = sum(row["us"] for row in kernels) / 1e3
    told = f"kernels {total:.3f} ms in {launches:g} launches, some of them running {busy:.1%} of the time"
    print(
        f"{arguments.network} {label}: {middle:.3f} ms ({times[0]:.3f} to {times[-1]:.3f}){share}; "
        f"{told if kernels else 'the profiler saw no kernel'}{'' if stepper.is_captured else '; NOT captured'}"
    )
    return 0 if stepper.is_captured else 1


if __name__ == "__main__":
    sys.exit(run_main(main))

"""A training's memory: what was predicted, what it took at its peak, and how the two are said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Bytes that a training takes at its peak, by what takes them."""

    parameters: int
    """Parameters and buffers of student and teachers."""
    state: int
    """Tensors that stay from step to step: momentum, the teachers' weights as the kernels read them."""
    step: int
    """Peak of what a step has beside those: its images, activations, gradients and temporaries."""
    allowance: int
    """Estimate of what no tensor counts: for temporaries and workspaces inside the library's operations as much as the
    step's largest tensor; on a GPU `CONTEXT_BYTES` and `SLACK` of the step, too."""

    @property
    def tensors(self) -> int:
        """Peak of the tensors' bytes."""
        return self.parameters + self.state + self.step

    @property
    def total(self) -> int:
        """Bytes that the device must have; compare with `costs.memory.capacity`."""
        return self.tensors + self.allowance

    def of_together(self, networks: int) -> Prediction:
        """Prediction of so many such trainings as one: every tensor has an axis more."""
        return Prediction(
            parameters=networks * self.parameters,
            state=networks * self.state,
            step=networks * self.step,
            allowance=networks * self.allowance,
        )


def read_table(path: Path) -> dict[str, int]:
    """Read lines of a name and a number, as /proc has them."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


class Peak:
    """The most memory that was taken since this was made.

    On a GPU the bytes of tensors, as the allocator counts them: what `Prediction.tensors` predicts and a little more,
    cuDNN's workspaces. A CPU's allocator counts nothing: there it is by how much the process's resident memory grew,
    which has everything else in it too, and of the tensors only what earlier ones had not already left behind.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory becomes what it is now
            self._before = _resident_peak()
        except (OSError, KeyError):
            pass  # not Linux, or not allowed: nothing is known

    @property
    def bytes(self) -> int | None:
        """Number of bytes at the peak so far; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # Linux counts pages a processor first, and adds them up late: a peak can read as less than what was before it
        return None if self._before is None else max(0, _resident_peak() - self._before)

    def text(self, prediction: Prediction) -> str:
        """`peak memory 5.21 GB, predicted 5.08 GB`; a CPU's measure is called by its name."""
        predicted = f"predicted {gigabytes(prediction.tensors)}"
        if self.bytes is None:
            return f"peak memory {predicted}"
        if self.device.type == "cuda":
            return f"peak memory {gigabytes(self.bytes)}, {predicted}"
        return f"resident memory grew by {gigabytes(self.bytes)}, tensors {predicted}"


def _resident_peak() -> int:
    return 1024 * read_table(Path("/proc/self/status"))["VmHWM:"]


def gigabytes(size: int) -> str:
    """Format a size by three digits: `5.08 GB`, `91.2 GB`, `0.034 GB`."""
    return f"{size / 1e9:.3g} GB"


CONTEXT_BYTES = 500_000_000
"""Bytes that a process has of a GPU before its first tensor: driver, cuBLAS and cuDNN, code of kernels. An estimate."""


SLACK = 0.05
"""Share of a step's tensors that the caching allocator loses between them. An estimate."""

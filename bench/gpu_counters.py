"""Hardware counters of the convolutions that lose most: `python -m bench.gpu_counters --out counters.csv`.

Of the layers of a step whose chosen candidate is our kernel, those with the most time above their floor, launches
counted, are run once more each under `ncu`, which leaves the clocks alone. Where there is no ncu it says so and ends.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness.rows import write_table
from ensdistill.config.methods import Method
from ensdistill.engine.launch_key import Key
from ensdistill.engine.tuning.choices import Candidate, TuningTable, arguments
from ensdistill.runtime.cli import parse_arguments
from ensdistill.runtime.devices import Device, installed_gpu
from ensdistill.runtime.errors import UserError, run_main
from ensdistill.tune import operation, operations_of

_OPTIONS = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
_SHOWN = ("Duration", "Throughput", "Hit Rate", "Achieved Occupancy", "Warp Cycles Per Issued")
_COLUMNS = ("Kernel Name", "Section Name", "Metric Name", "Metric Unit", "Metric Value")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Read hardware counters of the two convolutions with the most time above their floor."""

    network: str = "wrn28x4"
    """Network of teachers and student, E = 4, B = 128, 32 x 32 pixels, 100 classes."""
    layers: int = 2
    """Number of convolutions to read counters of."""
    out: Path | None = None
    """CSV to write. Default: none."""
    launch: bool = False
    """Launch the convolutions between a start and a stop of the profiler: this runs under ncu."""


def worst(
    keys: Mapping[Key, int], table: TuningTable, rates: Device | None, layers: int
) -> list[tuple[Key, Candidate]]:
    """Find the `layers` with the most time above their floor in a step; unmeasured ones count with their floor."""

    def lost(key: Key) -> float:
        choice, floor = table.get(key), key.floor(rates) if rates is not None else key.bytes * 1e-12
        return keys[key] * (floor if choice is None else 1e-6 * choice.measured[0].microseconds - floor)

    ours = [key for key in keys if (choice := table.get(key)) is None or choice.candidate.provider == "triton"]
    measured = [key for key in ours if table.get(key) is not None] or ours
    chosen = sorted(measured, key=lambda key: -lost(key))[:layers]
    return [(key, choice.candidate if (choice := table.get(key)) else Candidate(provider="triton")) for key in chosen]


def counter_rows(text: str) -> list[dict[str, str]]:
    """Read the metrics in what `ncu --csv` printed, a row each; what the program itself printed is passed over."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    return [{name: row[name] for name in _COLUMNS} for row in rows if row.get("Metric Name")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    command = parse_arguments(Arguments, "bench.gpu_counters", argv)
    if not torch.cuda.is_available():
        raise UserError("gpu_counters: counters need an NVIDIA GPU that PyTorch sees")
    if command.launch:
        _launch(command)
        return 0
    ncu = shutil.which("ncu") or next(map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))), None)
    if ncu is None:
        print("no ncu on the PATH: no hardware counters are read")
        return 0
    own = ["--launch", "--network", command.network, "--layers", str(command.layers)]
    sections = [word for name in _SECTIONS for word in ("--section", name)]
    done = subprocess.run(
        [ncu, *_OPTIONS, *sections, sys.executable, "-m", "bench.gpu_counters", *own], capture_output=True, text=True
    )
    for line in done.stdout.splitlines():
        if not line.startswith('"'):
            print(line)
    rows = counter_rows(done.stdout)
    if command.out is not None and rows:
        write_table(command.out, [{"device": torch.cuda.get_device_name(), **row} for row in rows])
    for row in rows:
        if any(name in row["Metric Name"] for name in _SHOWN):
            print(f"{row['Kernel Name'][:40]}: {row['Metric Name']} {row['Metric Value']} {row['Metric Unit']}")
    print(f"{len(rows)} counters" if rows else f"ncu read nothing: {done.stderr.strip()[-200:]}")
    return 0 if rows else 1


def _launch(command: Arguments) -> None:
    device, method = torch.device("cuda"), Method.parse("latentbe+tdiv-sdiv")
    keys = operations_of(command.network, method=method, E=4, B=128, image_size=32).keys
    for key, candidate in worst(keys, TuningTable.of_device(device), installed_gpu(), command.layers):
        print(f"{key.layer} {operation(key)}, {keys[key]} a step: {candidate}")
        given = arguments(key, device, seed=0)
        candidate.run(key, *given)  # compiles
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        candidate.run(key, *given)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    sys.exit(run_main(main))

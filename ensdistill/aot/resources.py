"""Resources that a compiled kernel asks of a GPU, read from its binary, and which of them are faults."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from triton import knobs

from ensdistill.kernels.conv.tiles import SHARED_LIMIT
from ensdistill.runtime.files import atomic_write

REGISTER_LIMIT = 255
"""Registers a thread at most, on every architecture that is compiled for."""
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
_MATRIX = re.compile(r"\b(?:HGMMA|HMMA|QGMMA|UTC[A-Z]*MMA)\b")
_REMOVED = re.compile(r"\bHGMMA\S* RZ,")
_WIDE_LOAD = re.compile(r"\b(?:(LDG)\.[\w.]*\b128\b|(LDGSTS)\.[\w.]*\b128\b|(UTMALDG)\b)")
_HALF_DOT = re.compile(r"\btt\.dot(?:_scaled)? .*: tensor<[\dx]+(?:bf16|f16)>|\bwarp_group_dot\b")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Row of the table: a kernel in one variant, on one architecture."""

    arch: int
    """Compute capability, as 10 · major + minor."""
    kernel: str
    """Name of the `@triton.jit` function."""
    variant: str
    """Constants by value, arguments by type: `!` a pointer that may not be a multiple of 16, `/16` a number that is."""
    registers: int
    """Registers a thread; 255 is the limit."""
    stack_bytes: int
    """Local memory a thread, where spilled registers go."""
    local_accesses: int
    """Instructions that read or write local memory (LDL, STL)."""
    shared_bytes: int
    """Bytes of shared memory that a block takes."""
    shared_limit: int
    """Bytes of shared memory that a block may have on this architecture."""
    matrix: str
    """Tensor-core instruction (HGMMA, HMMA, …), `missing` where half-precision products have none, or nothing."""
    wide_loads: str
    """Loads of 16 bytes and more, as far as there are any: LDG, LDGSTS (asynchronous), UTMALDG (boxes by TMA)."""

    def faults(self) -> list[str]:
        """Name in words what must not be; nothing for a kernel that is as it should be."""
        found = []
        if self.stack_bytes or self.local_accesses:
            found.append(f"spills: {self.stack_bytes} bytes a thread, {self.local_accesses} local loads and stores")
        if self.matrix == "missing":
            found.append("multiplies half-precision matrices without tensor cores")
        if self.shared_bytes > self.shared_limit:
            found.append(f"wants {self.shared_bytes} bytes of shared memory of {self.shared_limit}")
        return found


def read_resources(*, arch: int, kernel: str, variant: str, cubin: Path, ttir: str, shared: int) -> Resources:
    """Read `cubin` with the tools that come with Triton; `ttir` tells whether it has matrix products."""
    report = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", cubin],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    usage = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", report))
    expected = bool(_HALF_DOT.search(ttir))
    wide = {name for match in _WIDE_LOAD.findall(report) for name in match if name}
    return Resources(
        arch=arch,
        kernel=kernel,
        variant=variant,
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        local_accesses=len(_LOCAL.findall(report)),
        shared_bytes=shared + int(usage["SHARED"]),
        shared_limit=SHARED_LIMIT[arch],
        matrix=matrix_instructions(report) or ("missing" if expected else ""),
        wide_loads="+".join(sorted(wide)),
    )


def matrix_instructions(sass: str) -> str:
    """Tensor-core instructions of a binary; none where ptxas took a product for dead and left an empty one for it.

    Our kernels use every product, so that is a fault of the assembler's: the sums would silently be wrong.
    """
    return "" if _REMOVED.search(sass) else "+".join(sorted(set(_MATRIX.findall(sass))))


def write_table(path: Path, rows: Iterable[Resources]) -> None:
    """Write `rows` as CSV, sorted, so that the same kernels give the same file."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Resources))
        writer.writerows(sorted(astuple(row) for row in rows))


def read_table(path: Path) -> list[Resources]:
    """Read what `write_table` wrote."""
    with path.open(newline="") as file:
        numbers = {field.name for field in fields(Resources) if field.type == "int"}
        return [
            Resources(**{name: int(value) if name in numbers else value for name, value in row.items()})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]


def format_table(rows: Iterable[Resources]) -> str:
    """Format the table as text: a line a kernel with the range over its variants."""
    kernels: dict[tuple[int, str], list[Resources]] = {}
    for row in sorted(rows, key=astuple):
        kernels.setdefault((row.arch, row.kernel), []).append(row)
    lines = [("sm", "kernel", "variants", "registers", "spilled B", "shared KB", "of KB", "matrix", "16-byte loads")]
    for (arch, kernel), group in kernels.items():
        lines.append(
            (
                str(arch),
                kernel,
                str(len(group)),
                _range(row.registers for row in group),
                _range(row.stack_bytes for row in group),
                _range(round(row.shared_bytes / 1024) for row in group),
                str(group[0].shared_limit // 1024),
                ", ".join(sorted({row.matrix for row in group} - {""})) or "-",
                f"{sum(bool(row.wide_loads) for row in group)} of {len(group)}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _range(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}…{ordered[-1]}"

"""All kernels come from one assembler, whatever else compiles in the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton import knobs

ROOT = Path(__file__).resolve().parents[2]
# What torch.compile does before it compiles, with a ptxas of another version in PyTorch's wheel.
PROGRAM = """
import sys
from pathlib import Path
from torch._inductor.runtime import compile_tasks
from triton import knobs
if sys.argv[2] == "kernels":
    import ensdistill.kernels
compile_tasks.__file__ = sys.argv[1]
compile_tasks._set_triton_ptxas_path()
print(knobs.nvidia.ptxas.version, knobs.nvidia.ptxas.path)
"""


@pytest.mark.parametrize(("imports", "version"), [("kernels", knobs.nvidia.ptxas.version), ("nothing", "99.0")])
def test_torch_compile_changes_no_assembler(imports: str, version: str, tmp_path: Path) -> None:
    """Without the kernels' pin PyTorch's comes after Triton's: what the test would see if there were none."""
    for folder in (tmp_path, tmp_path / "_inductor"):  # PyTorch 2.11 looks in the first, 2.13 in the second
        ptxas = folder / "bin" / "ptxas"
        ptxas.parent.mkdir(parents=True)
        ptxas.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.0, V99.0.1'\n")
        ptxas.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_PTXAS_PATH"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "_inductor" / "runtime" / "compile_tasks.py"), imports],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[0] == version

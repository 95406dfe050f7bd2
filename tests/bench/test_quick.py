"""`python -m bench --quick`, two of its parts at the smallest size, as a user starts it: so that it never rots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.harness.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]

SMALLEST = "--batch 4 --size 8 --members 2 --rounds 3 --threads 1 --device cpu --providers official-order,pruned"


def test_the_quick_comparison(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--parts", "step,feed", *SMALLEST.split()]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    steps, feeds = (read_rows(tmp_path / f"{part}.csv") for part in ("step", "feed"))
    assert [row.provider for row in steps] == ["official-order", "pruned"]
    assert {"ffcv", "resident", "dataloader-0"} <= {row.provider for row in feeds}
    for row in (*steps, *feeds):
        assert row.n == 3 and row.p50_ms is not None and row.p50_ms > 0, row
        assert row.provider in done.stdout and row.device and row.versions and row.commit

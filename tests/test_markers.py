"""What `--no-values` forgives: a wrong value in a test marked `values`, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.values
def test_wrong_values():
    assert 1 == 2

@pytest.mark.values
def test_an_error_on_the_way():
    raise RuntimeError("out of resource: shared memory")

def test_that_compares_none():
    assert 1 == 2
"""


@pytest.mark.parametrize(
    ("options", "result"),
    [((), "3 failed"), (("--no-values",), "2 failed, 1 xfailed"), (("-m", "not values"), "1 failed")],
)
def test_wrong_values_alone_are_forgiven(options: tuple[str, ...], result: str, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = values: \nxfail_strict = true\n")
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])},
        text=True,
        capture_output=True,
    )
    assert done.stdout.splitlines()[-1].startswith(result), done.stdout + done.stderr

"""Which releases of PyTorch and Triton run, what is said of others, and that every place names the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ensdistill.runtime import releases
from ensdistill.runtime.releases import SUPPORTED, check_releases, faults

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("torch", "triton"),
    [("2.11.0+cu130", "3.6.0"), ("2.13.0+cpu", "3.7.1"), ("2.14.1", "3.8.0"), ("2.12.0a0+git1", "3.8")],
)
def test_supported_releases_are_silent(torch: str, triton: str) -> None:
    assert faults({"torch": torch, "triton": triton}) == ("", "")


@pytest.mark.parametrize(
    ("found", "unusable", "untested"),
    [
        (
            {"torch": "2.10.1", "triton": "3.6.0"},
            "torch 2.10.1 is too old; expected 2.11 to 2.14: pip install 'torch>=2.11,<2.15'",
            "",
        ),
        ({"torch": "2.13.0", "triton": None}, "triton is not installed; expected 3.6 to 3.8: ", ""),
        ({"torch": "2.13.0", "triton": "3.5.1"}, "triton 3.5.1 is too old; expected 3.6 to 3.8: ", ""),
        ({"torch": "2.15.0", "triton": "3.8.0"}, "", "torch 2.15.0 is newer than what was tested, 2.11 to 2.14; "),
        ({"torch": "3.0.0", "triton": "3.10.0"}, "", "torch 3.0.0 is newer than what was tested, 2.11 to 2.14; "),
        ({"triton": "unknown"}, "", ""),
    ],
)
def test_others_are_named_with_what_is_expected(found: dict[str, str | None], unusable: str, untested: str) -> None:
    for said, expected in zip(faults(found), (unusable, untested), strict=True):
        assert said.startswith(expected) and bool(said) == bool(expected) and "\n" not in said


def test_a_program_gets_an_error_or_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENSDISTILL_UNTESTED", raising=False)
    monkeypatch.setattr(releases, "found_releases", lambda: {"torch": "2.1.0", "triton": "9.9.0"})
    with pytest.raises(ImportError, match=r"torch 2\.1\.0 is too old"):
        check_releases()
    monkeypatch.setattr(releases, "found_releases", lambda: {"torch": "2.13.0", "triton": "9.9.0"})
    with pytest.warns(UserWarning, match=r"triton 9\.9\.0 is newer than what was tested"):
        check_releases()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_releases()  # it was said


def command(folder: Path, *, torch: str = "2.13.0", triton: str = "3.6.0") -> subprocess.CompletedProcess[str]:
    """`--help` of a command where metadata name these releases."""
    for package, version in (("torch", torch), ("triton", triton)):
        metadata = folder / f"{package}-{version}.dist-info/METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    environment = {key: value for key, value in os.environ.items() if key != "ENSDISTILL_UNTESTED"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), environment.get("PYTHONPATH", "")])
    line = [sys.executable, "-W", "ignore", "-m", "ensdistill.aot", "--help"]
    return subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True)


def test_a_command_ends_with_one_line_on_what_is_too_old(tmp_path: Path) -> None:
    done = command(tmp_path, triton="3.5.1")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: triton 3.5.1 is too old; expected 3.6 to 3.8: pip install 'triton>=3.6,<3.9'")


def test_a_command_goes_on_with_what_is_newer_and_says_so(tmp_path: Path) -> None:
    done = command(tmp_path, torch="2.99.0")
    assert done.returncode == 0 and "ahead of time" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: torch 2.99.0 is newer than what was tested, 2.11 to 2.14")


def test_every_place_names_the_same_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for package, (first, last) in SUPPORTED.items():
        bounds = f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"
        assert {str(one) for one in declared[package]} == set(bounds.split(","))
        name = {"torch": "PyTorch", "triton": "Triton"}[package]
        assert f"{name} {first[0]}.{first[1]} to {last[0]}.{last[1]}" in readme
        if package == "torch":
            assert f"TORCH_SUPPORTED := torch{bounds}" in makefile.splitlines()
            (newest,) = re.findall(r"^TORCH_NEWEST := torch==(.*)$", makefile, re.MULTILINE)
            assert tuple(map(int, newest.split(".")[:2])) == last

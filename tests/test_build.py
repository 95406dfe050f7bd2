"""The build: what CMake reports, what make would run, and where the package's modules end up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ensdistill.kernels

ROOT = Path(__file__).resolve().parents[1]
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="no cmake on this machine")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(
    *command: str | Path, cwd: Path = ROOT, check: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests hands its own flags (-n, jobs) down to the make that they start.
    inherited = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=cwd, env=inherited | (environment or {}), text=True, capture_output=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def bare_path(folder: Path, *programs: str) -> str:
    """A PATH of `programs` alone, as on a machine that has just been installed."""
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found, program
        (folder / program).symlink_to(found)
    return str(folder)


def configure(build: Path, *options: str, environment: dict[str, str] | None = None) -> str:
    return run("cmake", "-S", ROOT, "-B", build, "-G", "Unix Makefiles", *options, environment=environment).stdout


@needs_cmake
def test_cmake_says_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    path = bare_path(tmp_path / "bin", "cmake", "make")
    output = configure(
        tmp_path / "build",
        "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF",
        f"-DPYTHON_EXECUTABLE={sys.executable}",
        environment={"PATH": path, "CXX": "", "CUDACXX": "", "CUDA_HOME": ""},
    )
    lines = {line.split("leaves out ")[1].split(":")[0]: line for line in output.splitlines() if "leaves out" in line}
    assert sorted(lines) == ["CUDA", "ffcv", "ffcv-wheel"]
    assert "no nvcc found" in lines["CUDA"]
    for package in ("g++", "pkg-config", "libturbojpeg0-dev"):
        assert package in lines["ffcv"] and package in lines["ffcv-wheel"]
    assert "libopencv-imgproc-dev" in lines["ffcv"]
    assert "libopencv" not in lines["ffcv-wheel"]

    built = run("cmake", "--build", tmp_path / "build", "--target", "ffcv", check=False)
    assert built.returncode != 0
    assert "ffcv: this machine lacks a C++ compiler (apt: g++)" in built.stdout


@needs_cmake
@pytest.mark.skipif(not shutil.which("pkg-config"), reason="no pkg-config on this machine")
def test_cmake_writes_what_ffcv_looks_for(tmp_path: Path) -> None:
    build = tmp_path / "a folder"  # FFCV's set-up script splits pkg-config's output at blanks
    configure(build, f"-DPYTHON_EXECUTABLE={sys.executable}")
    header = build / "ffcv/include/opencv2/opencv.hpp"
    assert header.read_text().split() == ["#include", "<opencv2/core.hpp>", "#include", "<opencv2/imgproc.hpp>"]
    asked = run(
        "pkg-config", "--cflags", "--libs", "opencv4", environment={"PKG_CONFIG_PATH": str(build / "ffcv/shared")}
    )
    assert asked.stdout.split() == ["-lopencv_imgproc", "-lopencv_core"]


@needs_cmake
def test_cmake_does_nothing_when_it_installs_the_package(tmp_path: Path) -> None:
    path = bare_path(tmp_path / "bin", "cmake", "make")  # neither a compiler nor Python
    output = configure(tmp_path / "build", "-DSKBUILD=2", environment={"PATH": path})
    assert "nothing to compile" in output
    assert not (tmp_path / "build/ffcv").exists()


@pytest.mark.parametrize(
    ("target", "arguments", "commands"),
    [
        ("train", "", ["ensdistill.fast_train", "ensdistill.evaluate runs/digits --data digits --corruptions"]),
        ("train", "--recipe fashion-mnist", ["ensdistill.fast_train --recipe fashion-mnist"]),
        ("test", "-k metrics", ["pytest tests -n auto --dist loadfile --no-loadscope-reorder -k metrics"]),
    ],
)
def test_make_runs_the_command(target: str, arguments: str, commands: list[str]) -> None:
    lines = [line.strip() for line in run("make", "-n", target, f"ARGS={arguments}").stdout.strip().splitlines()]
    start = ".venv/bin/python -m "
    shown = [line.removeprefix(start) for line in lines if line.startswith((f"{start}ensdistill.", f"{start}pytest"))]
    assert shown == commands and lines[-1] == start + commands[-1]


def checkout(folder: Path) -> Path:
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_second_make_installs_nothing(tmp_path: Path) -> None:
    copy = checkout(tmp_path / "checkout")
    stamps = copy / ".venv/.made"
    stamps.mkdir(parents=True)
    for name in ("system", "venv", "torch", "dependencies", "package"):  # in the order of the set-up
        (stamps / name).touch()
    assert run("make", "-q", "setup", cwd=copy, check=False).returncode == 0
    later = (stamps / "package").stat().st_mtime + 10
    os.utime(copy / "pyproject.toml", (later, later))
    assert run("make", "-q", "setup", cwd=copy, check=False).returncode == 1
    planned = run("make", "-n", "setup", cwd=copy).stdout
    assert "pip --disable-pip-version-check install --editable" in planned
    assert "apt-get" not in planned  # a changed dependency is no reason to look at the machine again


@pytest.mark.parametrize(
    ("wheel", "missing"),
    [(False, "python3 python3-venv python3-dev g++ cmake pkg-config"), (True, "python3 python3-venv")],
)
def test_set_up_without_root_prints_the_command_to_run(tmp_path: Path, wheel: bool, missing: str) -> None:
    copy = checkout(tmp_path / "checkout")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    if wheel:
        (wheels / "ffcv-1.0.2-cp311-cp311-manylinux_2_34_x86_64.whl").touch()
    path = bare_path(tmp_path / "bin", "make", "bash", "sed", "mkdir", "touch")
    (tmp_path / "bin/id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "bin/id").chmod(0o755)
    done = run("make", "setup", f"WHEELS={wheels}", cwd=copy, check=False, environment={"PATH": path})
    assert done.returncode == 2
    assert "error: packages are missing" in done.stderr
    command = next(line for line in done.stderr.splitlines() if line.startswith("    sudo"))
    assert f"apt-get install --yes --no-install-recommends {missing}" in command
    assert ("libturbojpeg0-dev" in command) is not wheel
    assert not (copy / ".venv/.made/system").exists()


def test_set_up_refuses_an_old_python(tmp_path: Path) -> None:
    copy = checkout(tmp_path / "checkout")
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\ncase "$1" in -V) echo Python 3.10.13;; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = run("make", "setup", f"PYTHON={old}", cwd=copy, check=False)
    assert done.returncode == 2
    assert f"error: {old} is Python 3.10.13, 3.11 or newer is needed" in done.stderr


def test_kernels_are_imported_from_the_checkout(tmp_path: Path) -> None:
    assert Path(ensdistill.kernels.__file__).resolve() == ROOT / "kernels/__init__.py"
    for folder in (ROOT, tmp_path):  # from the checkout's root, its own ensdistill/ is first on sys.path
        where = "import ensdistill.kernels.philox as p, ensdistill.runtime.errors as e; print(p.__file__, e.__file__)"
        found = run(sys.executable, "-c", where, cwd=folder).stdout.split()
        assert [Path(path).resolve() for path in found] == [
            ROOT / "kernels/philox.py",
            ROOT / "ensdistill/runtime/errors.py",
        ]


@needs_cmake
def test_wheel_has_kernels_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("scikit_build_core.build", reason="the build backend is not installed here")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("ensdistill", "kernels"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=lambda _, names: {"__pycache__", "kernels"} & set(names)
        )
    monkeypatch.chdir(source)
    wheel = build.build_wheel(str(tmp_path))
    assert wheel == f"ensdistill-{PROJECT['project']['version']}-py3-none-any.whl"
    names = set(zipfile.ZipFile(tmp_path / wheel).namelist())
    assert {"ensdistill/py.typed", "ensdistill/own_loop/distiller.py"} <= names
    info = f"ensdistill-{PROJECT['project']['version']}.dist-info"
    scripts = zipfile.ZipFile(tmp_path / wheel).read(f"{info}/entry_points.txt").decode()
    assert "ensdistill = ensdistill.__main__:main" in scripts.replace("=", " = ").replace("  ", " ")
    top = {name.split("/")[0] for name in names}
    assert top == {"ensdistill", f"ensdistill-{PROJECT['project']['version']}.dist-info"}
    for folder, inside in (("ensdistill", "ensdistill"), ("kernels", "ensdistill/kernels")):
        for file in (source / folder).rglob("*.py"):
            assert f"{inside}/{file.relative_to(source / folder)}" in names


def test_tested_versions_lie_in_the_declared_ranges() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [
        *PROJECT["project"]["dependencies"],
        *(line for name in ("export", "test", "dev", "docs") for line in extras[name]),
    ]
    declared = [Requirement(line) for line in lines]
    pins = {
        pin.name: str(pin.specifier).removeprefix("==") for pin in map(Requirement, extras["tested"] + extras["triton"])
    }
    torch = next(
        line.split("==")[1] for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TORCH_TESTED")
    )
    pins["torch"] = torch
    assert sorted(pins) == sorted({requirement.name for requirement in declared})
    for requirement in declared:
        assert pins[requirement.name] in requirement.specifier, requirement


def test_one_version_of_ffcv() -> None:
    lines = [line for line in (ROOT / "CMakeLists.txt").read_text().splitlines() if line.startswith("set(FFCV_VERSION")]
    version = lines[0].split('"')[1]
    assert f"FFCV := ffcv=={version}" in (ROOT / "Makefile").read_text().splitlines()

"""Where a run runs: devices, precision, threads, and what is written of them."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from ensdistill.runtime import environment
from ensdistill.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def no_driver_file(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_DRIVER_FILE", tmp_path / "version")
    environment.driver_version.cache_clear()
    yield tmp_path / "version"
    environment.driver_version.cache_clear()


def nvml(version):
    """What pynvml is asked for, with a version that is made up or an error."""

    def tell():
        if isinstance(version, Exception):
            raise version
        return version

    nothing = lambda: None  # noqa: E731
    return types.SimpleNamespace(nvmlInit=nothing, nvmlShutdown=nothing, nvmlSystemGetDriverVersion=tell)


def test_the_driver_is_known_without_its_file(no_driver_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(b"580.159.04"))
    assert environment.driver_version() == "580.159.04"
    no_driver_file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC 12.2.0\n"
    )
    environment.driver_version.cache_clear()
    assert environment.driver_version() == "570.86.15"


@pytest.mark.parametrize("module", [nvml(RuntimeError("no NVML library")), None], ids=["no library", "not installed"])
def test_the_driver_is_known_without_nvml(module, no_driver_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", module)

    def library(name):
        def tell(number):
            number._obj.value = 13000
            return 0

        return types.SimpleNamespace(cuDriverGetVersion=tell)

    monkeypatch.setattr(environment.ctypes, "CDLL", library)
    assert environment.driver_version() == "cuda13000"
    environment.driver_version.cache_clear()
    monkeypatch.setattr(environment, "_served_cuda_version", lambda: None)
    assert environment.driver_version() == "unknown"


def test_facts_are_plain_and_complete():
    facts = json.loads(json.dumps(environment.environment(CPU, "bf16")))
    assert facts["device"] == facts["cpu"] and facts["cores"] >= 1 and facts["precision"] == "bf16"
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["ensdistill"]
    assert facts["commit"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "not a device"), ("mps", "not supported"), ("cuda:99", "this machine has")],
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(UserError, match=f"--device {name}: {message}"):
        environment.choose_device(name)


def test_the_default_device_is_a_gpu_where_there_is_one():
    assert environment.choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert environment.choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("flags", "capability", "precision"),
    [
        ({"avx512_bf16"}, "AVX512", "bf16"),
        ({"amx_bf16"}, "AVX512", "bf16"),
        ({"avx2"}, "AVX2", "fp32"),
        (set(), "AVX512", "fp32"),
    ],
)
def test_auto_is_bf16_where_the_processor_computes_in_it(monkeypatch, flags, capability, precision):
    monkeypatch.setattr(environment, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert environment.choose_precision("auto", CPU) == precision
    assert environment.choose_precision("fp32", CPU) == "fp32" and environment.choose_precision("bf16", CPU) == "bf16"


def test_tiny_layers_get_one_thread():
    assert environment.choose_threads(None, 1e6) == 1
    assert environment.choose_threads(None, 1e9) == torch.get_num_threads()


def test_never_more_threads_than_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(environment, "_OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(environment, "_GROUPS", tmp_path / "groups")
    assert environment.choose_threads(3, 1e6) == 3 and environment.choose_threads(10, 1e6) == 8
    inner = tmp_path / "groups" / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert environment.usable_cores() == 8
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert environment.usable_cores() == 2 and environment.choose_threads(3, 1e6) == 2
    (tmp_path / "cgroup").write_text("3:cpuset:/\n1:cpu,cpuacct:/c\n")
    old = tmp_path / "groups" / "cpu,cpuacct" / "c"
    old.mkdir(parents=True)
    for name, value in (("quota", 50000), ("period", 100000)):
        (old / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert environment.usable_cores() == 1
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert environment.usable_cores() == 8


@pytest.mark.parametrize(
    "processes, torchruns, expected",
    [("2", "1", 4), ("3", None, 2), ("16", "1", 1), ("2", "3", None), ("1", "1", None)],
)
def test_processes_share_the_cores_of_their_machine(processes, torchruns, expected, monkeypatch):
    """torchrun sets one thread for each of several; any other number is the user's."""
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if torchruns is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", torchruns)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert environment.choose_threads(None, 1e9) == (expected or 7)
    assert environment.choose_threads(None, 1e6) == 1 and environment.choose_threads(3, 1e9) == 3

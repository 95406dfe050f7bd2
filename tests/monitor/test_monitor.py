"""The monitor: what it reads of a GPU (a pretended NVML) and of this machine, and that a run never suffers from it."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from dataclasses import asdict, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console

from ensdistill.monitor import cpu, gpu, memory, monitor, readings
from ensdistill.monitor.cpu import CpuSource
from ensdistill.monitor.gpu import GpuNames, GpuSource, limits_in_words
from ensdistill.monitor.monitor import Monitor, source_of
from ensdistill.monitor.readings import Figures, Reading, spoiled, total_of
from ensdistill.run.display import Screen
from ensdistill.training.log import Log
from ensdistill.training.loop import Progress

UUID = "1a2b3c4d-0000-1111-2222-333344445555"


class NvmlError(Exception):
    pass


class NotSupported(NvmlError):
    def __str__(self):
        return "Not Supported"


class FunctionNotFound(NvmlError):
    def __str__(self):
        return "Function Not Found"


class Nvml(ModuleType):
    """What the monitor uses of pynvml, over a machine of two GPUs. A name in `refused` raises that error."""

    NVMLError = NvmlError
    NVMLError_FunctionNotFound = FunctionNotFound

    def __init__(self):
        super().__init__("pynvml")
        self.opened = 0
        self.asked: list[str] = []
        self.refused: dict[str, Exception] = {}
        self.by_uuid = {"GPU-other": 0, f"GPU-{UUID}": 1}
        self.by_pci = {"00000000:3B:00.0": 0, "00000001:AF:00.0": 1}
        self.bits, self.pids = [0, 0], [[77], [os.getpid()]]
        self.watts, self.joules = [10.0, 612.5], [1.0, 5000.0]

    def nvmlInit(self):
        if error := self.refused.get("nvmlInit"):
            raise error
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.by_uuid:
            raise NvmlError("Not Found")
        return self.by_uuid[uuid]

    def nvmlDeviceGetHandleByPciBusId(self, address):
        if address not in self.by_pci:
            raise NvmlError("Not Found")
        return self.by_pci[address]

    def __getattr__(self, name):
        """The questions to one GPU."""
        answers = {
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=[3, 97][gpu], memory=40),
            "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: [210, 1755][gpu]}[kind],
            "nvmlDeviceGetPowerUsage": lambda gpu: round(1000 * self.watts[gpu]),
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=80e9, used=[1e9, 12.5e9][gpu]),
            "nvmlDeviceGetTemperature": lambda gpu, sensor: {0: [30, 64][gpu]}[sensor],
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: self.bits[gpu],
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: self.bits[gpu] | 0x4,
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [SimpleNamespace(pid=pid) for pid in self.pids[gpu]],
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: round(1000 * self.joules[gpu]),
        }
        if name not in answers:
            raise AttributeError(name)

        def ask(gpu, *arguments):
            self.asked.append(name)
            if name in self.refused:
                raise self.refused[name]
            return answers[name](gpu, *arguments)

        return ask


@pytest.fixture
def nvml(monkeypatch):
    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


NAMES = GpuNames(uuids=(f"GPU-{UUID}", f"MIG-{UUID}"), pci="00000001:AF:00.0")
FULL = Reading(
    device="GPU", utilisation=0.97, clock_mhz=1755, power_w=612.5, memory_gb=12.5, temperature_c=64, limits=(),
    other_processes=0, energy_j=5000.0,
)  # fmt: skip


def test_every_field_of_the_gpu(nvml):
    source = GpuSource(NAMES)
    assert source.read() == FULL and source.notes == []
    source.close()
    assert nvml.opened == 0


def test_torch_s_gpu_is_found_whatever_its_number(nvml, monkeypatch):
    """The machine's second GPU is PyTorch's first where CUDA_VISIBLE_DEVICES leaves no other."""
    facts = SimpleNamespace(uuid=UUID, pci_domain_id=1, pci_bus_id=0xAF, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda", 0): facts}.__getitem__)
    assert GpuNames.of(torch.device("cuda", 0)) == NAMES
    source = source_of(torch.device("cuda", 0))()
    assert source.read().clock_mhz == 1755
    del facts.uuid  # an older PyTorch
    assert source_of(torch.device("cuda", 0))().read().clock_mhz == 1755
    del facts.pci_bus_id
    with pytest.raises(LookupError, match="neither the UUID nor the PCI address"):
        source_of(torch.device("cuda", 0))()


def test_a_gpu_is_found_by_uuid_part_or_address_or_not_at_all(nvml):
    nvml.by_uuid = {f"MIG-{UUID}": 1}
    assert GpuSource(replace(NAMES, pci=None)).read() == FULL
    nvml.by_uuid = {}
    assert GpuSource(NAMES).read() == FULL
    before = nvml.opened
    for names in (replace(NAMES, pci=None), replace(NAMES, pci="00000000:FF:00.0")):
        with pytest.raises(NvmlError, match="Not Found"):
            GpuSource(names)
    assert nvml.opened == before  # what was opened for nothing is closed


@pytest.mark.parametrize(
    ("bits", "words", "throttled"),
    [
        (0x0, (), ()),
        (0x1, (), ()),  # idle
        (0x5, ("power cap",), ("power cap",)),
        (0x102, ("application clocks", "display clocks"), ()),  # what somebody set is no throttling
        (0x6, ("application clocks", "power cap"), ("power cap",)),
        (0x48, ("hardware slowdown", "thermal slowdown by the hardware"), None),
        (0xB0, ("sync boost", "thermal slowdown by the driver", "power brake"), None),
        (0x1000, ("reason 0x1000",), None),
    ],
)
def test_throttle_reasons_in_words(nvml, bits, words, throttled):
    throttled = words if throttled is None else throttled
    assert limits_in_words(bits) == words
    nvml.bits[1] = bits
    reading = GpuSource(NAMES).read()
    assert (reading.limits, reading.throttled) == (words, throttled)
    assert reading.values()["throttled"] == float(bool(throttled))
    assert ("throttled" in reading.line()) == bool(throttled)


def test_a_driver_of_before_535_is_asked_by_the_older_name(nvml):
    nvml.refused["nvmlDeviceGetCurrentClocksEventReasons"] = FunctionNotFound()
    source = GpuSource(NAMES)
    assert source.read().limits == ("power cap",) and source.notes == []


@pytest.mark.parametrize(
    ("pids", "others"),
    [
        ([os.getpid()], 0),
        ([os.getpid(), 4000001, 4000002], 2),
        ([os.getpid(), os.getpid()], 0),
        ([4000001], 0),  # another numbering: it is this process
        ([4000001, 4000002], 1),
    ],
)
def test_other_processes_on_the_gpu(nvml, pids, others):
    nvml.pids[1] = pids
    assert GpuSource(NAMES).read().other_processes == others


def test_hidden_processes_are_not_known(nvml):
    nvml.pids[1] = []
    source = GpuSource(NAMES)
    assert source.read().other_processes is None and source.notes == ["other processes (this process is not listed)"]


@pytest.mark.parametrize(
    ("function", "field", "name"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilisation", "utilisation"),
        ("nvmlDeviceGetClockInfo", "clock_mhz", "SM clock"),
        ("nvmlDeviceGetPowerUsage", "power_w", "power"),
        ("nvmlDeviceGetMemoryInfo", "memory_gb", "memory"),
        ("nvmlDeviceGetTemperature", "temperature_c", "temperature"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "limits", "throttle reasons"),
        ("nvmlDeviceGetComputeRunningProcesses", "other_processes", "other processes"),
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_j", "energy counter"),
    ],
)
def test_what_a_gpu_does_not_support_is_none_and_noted_and_asked_once(nvml, function, field, name):
    nvml.refused[function] = NotSupported()
    source = GpuSource(NAMES)
    for _ in range(3):
        assert source.read() == replace(FULL, **{field: None})
    assert source.notes == [f"{name} (Not Supported)"] and nvml.asked.count(function) == 1


def reading(**fields):
    return Reading(device="GPU", **fields)


def test_energy_is_the_counter_s_or_else_the_power_s():
    def energy(before, now):
        return Figures.between(reading(**before), reading(**now), 7200.0).energy_wh

    counter = energy({"energy_j": 1000.0, "power_w": 500.0}, {"energy_j": 4600.0, "power_w": 500.0})
    assert counter == pytest.approx(1.0)
    assert energy({"power_w": 100.0}, {"power_w": 300.0}) == pytest.approx(400.0)
    # lost, or started anew
    assert energy({"energy_j": 9.0, "power_w": 100.0}, {"power_w": 100.0}) == pytest.approx(200.0)
    assert energy({"energy_j": 9.0, "power_w": 100.0}, {"energy_j": 1.0, "power_w": 100.0}) == pytest.approx(200.0)
    assert energy({"energy_j": 9.0}, {"energy_j": 1.0}) is None
    assert energy({}, {"power_w": 100.0}) is None


def test_figures_weigh_by_time_and_by_samples():
    idle = Figures.between(FULL, replace(FULL, utilisation=0.0, energy_j=8600.0), 1.0)
    busy = Figures.between(
        FULL, replace(FULL, utilisation=1.0, energy_j=5000.0, limits=("power cap", "display clocks")), 3.0
    )
    shared = Figures.between(FULL, replace(FULL, utilisation=0.5, other_processes=2, limits=("power cap",)), 4.0)
    total = total_of([idle, busy, shared])
    assert total == Figures(
        seconds=8.0,
        samples=3,
        utilisation=pytest.approx(5 / 8),
        energy_wh=pytest.approx(1.0),
        throttled=pytest.approx(2 / 3),
        limits={"power cap": pytest.approx(2 / 3), "display clocks": pytest.approx(1 / 3)},
        shared=pytest.approx(1 / 3),
    )
    assert Figures() + total == total == total + Figures()
    assert Figures(**json.loads(json.dumps(asdict(total)))) == total


def test_figures_that_lack_a_part_are_not_known():
    known = Figures.between(FULL, FULL, 1.0)
    for part in (Figures(seconds=2.0), Figures.between(reading(), reading(), 2.0)):
        for total in (known + part, part + known):
            assert total.seconds == 3.0 and total.limits == {}
            assert total.utilisation is total.energy_wh is total.throttled is total.shared is None
    unwatched = Figures(seconds=2.0, throttled=0.5)  # no sample, which no run writes
    assert (unwatched + unwatched).throttled is None


def test_what_spoils_a_measurement_is_said_with_reason_and_share():
    clean = Figures.between(FULL, replace(FULL, limits=("application clocks",)), 1.0)
    hot = Figures.between(FULL, replace(FULL, limits=("power cap", "application clocks")), 1.0)
    shared = Figures.between(FULL, replace(FULL, other_processes=1), 1.0)
    assert spoiled([clean, None, Figures(seconds=3.0)]) == []
    (line,) = spoiled([clean, hot, None, Figures(seconds=3.0), clean, clean])
    assert "throttled in 25 % of the samples (power cap 25 %)" in line and "application" not in line
    (line,) = spoiled([shared, clean])
    assert "other processes computed on the GPU in 50 % of the samples" in line
    assert "in under 1 % of the samples (power cap under 1 %)" in spoiled([hot, *[clean] * 499])[0]


class Scripted:
    """A source of readings that were written down; the last is repeated."""

    def __init__(self, *script, notes=()):
        self.script, self.notes = list(script), list(notes)
        self.reads = self.closed = 0

    def read(self):
        self.reads += 1
        found = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(found, Exception):
            raise found
        return found

    def close(self):
        self.closed += 1


def watch(source, interval=0.001, **options):
    said, warned = [], []
    made = Monitor(lambda: source, say=said.append, warn=warned.append, interval=interval, **options)
    return made, said, warned


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def monitors():
    return [thread for thread in threading.enumerate() if thread.name == "monitor"]


def test_the_thread_reads_until_the_run_ends_and_ends_with_it():
    source = Scripted(FULL)
    made, said, warned = watch(source)
    with made.watching(Figures()):
        assert [thread.daemon for thread in monitors()] == [True]
        wait_for(lambda: source.reads >= 4)
        wait_for(lambda: made.figures().samples >= 3)
    assert monitors() == [] and source.closed == 1 and said == warned == []
    figures, reads = made.figures(), source.reads
    assert figures.samples == reads - 1  # the first is what the others are compared with
    assert (figures.utilisation, figures.throttled, figures.shared) == (pytest.approx(0.97), 0.0, 0.0)
    assert figures.seconds > 0 and figures.energy_wh == pytest.approx(0.0)


def test_a_run_shorter_than_the_interval_has_one_sample():
    made, *_ = watch(Scripted(FULL, replace(FULL, energy_j=5036.0)), interval=3600.0)
    began = time.monotonic()
    with made.watching(Figures()):
        pass
    assert made.figures().samples == 1 and made.figures().energy_wh == pytest.approx(0.01)
    assert time.monotonic() - began < 20


def test_a_run_that_fails_ends_the_thread_too():
    made, *_ = watch(Scripted(FULL))
    with pytest.raises(KeyboardInterrupt), made.watching(Figures()):
        raise KeyboardInterrupt
    assert monitors() == []


def test_a_resumed_training_goes_on_with_its_figures():
    made, *_ = watch(Scripted(FULL, replace(FULL, energy_j=8600.0)), interval=3600.0)
    earlier = Figures(seconds=10.0, samples=9, utilisation=0.97, energy_wh=2.0, throttled=0.0, shared=1.0)
    with made.watching(earlier):
        assert made.figures() == earlier
    figures = made.figures()
    assert figures.energy_wh == pytest.approx(3.0) and figures.samples == 10 and figures.shared == pytest.approx(0.9)
    assert figures.seconds > 10.0


def test_what_came_up_is_shown_by_the_thread_that_polls_and_once():
    hot = replace(FULL, limits=("power cap",), other_processes=2)
    source = Scripted(FULL, hot, notes=["temperature (Not Supported)"])
    made, said, warned = watch(source)
    shown_by = []
    made._warn = lambda text: (warned.append(text), shown_by.append(threading.current_thread()))
    with made.watching(Figures()):
        wait_for(lambda: made.figures().samples >= 2)
        assert said == warned == []
        assert made.poll() == hot
        assert said == ["GPU figures that are not known: temperature (Not Supported)"]
        assert [text.split(":")[0] for text in warned] == [
            "the GPU is throttled (power cap)",
            "2 other processes on this GPU",
        ]
        before = made.figures().samples
        wait_for(lambda: made.figures().samples > before)
        made.poll()
    assert len(said) == 1 and len(warned) == 2 and set(shown_by) == {threading.main_thread()}


def test_a_reading_is_given_once():
    made, *_ = watch(Scripted(FULL), interval=3600.0)
    assert made.poll() is None
    with made.watching(Figures()):
        assert made.poll() is None  # nothing to compare the first with
    made._latest = FULL
    assert made.poll() == FULL and made.poll() is None


def test_errors_cost_the_figures_and_not_the_run():
    for source in (Scripted(OSError("gone")), Scripted(FULL, FULL, ValueError())):
        made, said, _ = watch(source)
        with made.watching(Figures(seconds=5.0, samples=5, energy_wh=1.0)):
            wait_for(lambda: not monitors())
        figures = made.figures()
        assert figures.energy_wh is None and figures.utilisation is None and figures.seconds > 5.0
        assert said in (["the device is not watched (gone)"], ["the device is not watched (ValueError)"])
        assert source.closed == 1


def test_a_source_that_cannot_be_closed_keeps_its_figures():
    source = Scripted(FULL)
    source.close = lambda: 1 / 0
    made, said, _ = watch(source)
    with made.watching(Figures()):
        pass
    assert made.figures().utilisation == pytest.approx(0.97) and said == []


def test_a_machine_without_the_package_or_the_driver_is_told_so(nvml, monkeypatch):
    for break_it, message in (
        (lambda: nvml.refused.update(nvmlInit=NvmlError("NVML Shared Library Not Found")), "NVML Shared Library"),
        (lambda: monkeypatch.setitem(sys.modules, "pynvml", None), "pynvml"),
    ):
        break_it()
        said = []
        made = Monitor(lambda: GpuSource(NAMES), say=said.append, warn=said.append)
        with made.watching(Figures()):
            wait_for(lambda: not monitors())
        assert len(said) == 1 and said[0].startswith("the device is not watched (") and message in said[0]
        assert made.figures().utilisation is None


def test_a_driver_that_does_not_answer_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(monitor, "_PATIENCE", 0.05)
    release = threading.Event()
    source = Scripted(FULL)
    source.read = lambda: release.wait(30)
    made, said, _ = watch(source)
    began = time.monotonic()
    with made.watching(Figures()):
        made.poll()
        made.figures()
    assert time.monotonic() - began < 10
    assert len(said) == 1 and "it has not answered" in said[0] and made.figures().energy_wh is None
    release.set()
    wait_for(lambda: not monitors())


def test_no_thread_where_none_is_wanted_or_given(monkeypatch):
    made, said, _ = watch(Scripted(FULL), interval=0)
    with made.watching(Figures()):
        assert monitors() == []
    assert said == [] and made.figures().utilisation is None
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no more threads")))
    made, said, _ = watch(Scripted(FULL))
    with made.watching(Figures()):
        pass
    assert said == ["the device is not watched (no more threads)"]


def test_the_cpu_of_this_machine():
    source = CpuSource()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    busy = source.read()
    time.sleep(0.3)
    idle = source.read()
    assert busy.device == "CPU" and 0 < idle.utilisation < busy.utilisation <= 1
    assert busy.machine_utilisation is None or 0 <= busy.machine_utilisation <= 1
    assert 0.01 < busy.memory_gb < 1000
    assert busy.clock_mhz is busy.temperature_c is busy.limits is busy.other_processes is None
    assert source_of(torch.device("cpu")) is CpuSource


def package(folder, zone, name, microjoules, wraps_at=1_000_000_000):
    path = folder / zone
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    return path / "energy_uj"


def test_the_energy_of_the_packages_and_of_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "POWERCAP", tmp_path)
    first = package(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = package(tmp_path, "intel-rapl:1", "package-1", 999_000_000)
    for zone, name in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")):
        package(tmp_path, zone, name, 0).write_text("7")
    source = CpuSource()
    assert source.read().energy_j == 0.0
    first.write_text("8000000")
    second.write_text("1000000")  # went round: 1 J to the end, 1 J from the beginning
    time.sleep(0.01)
    read = source.read()
    assert read.energy_j == pytest.approx(5.0) and read.power_w > 0 and source.notes == []
    first.unlink()
    for _ in range(2):
        assert source.read().energy_j is None and source.read().power_w is None
    assert len(source.notes) == 1 and source.notes[0].startswith("energy and power (")


def test_counters_that_cannot_be_read_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "POWERCAP", tmp_path)
    assert CpuSource().read().power_w is None and CpuSource().notes == []  # no counters, nothing to say
    package(tmp_path, "intel-rapl:0", "package-0", 1)
    package(tmp_path, "intel-rapl:1", "package-1", 1).unlink()
    source = CpuSource()
    assert source.read().energy_j is None and source.read().power_w is None
    assert len(source.notes) == 1 and "energy_uj" in source.notes[0]


def test_a_machine_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "PROC", tmp_path)
    found = CpuSource().read()
    assert found.machine_utilisation is None and found.memory_gb is None and found.utilisation is not None
    (tmp_path / "stat").write_text("cpu  10 0 10 70 10 0 0 0 0 0\n")
    source = CpuSource()
    (tmp_path / "stat").write_text("cpu  40 0 10 75 15 0 0 0 0 0\n")
    assert source.read().machine_utilisation == pytest.approx(30 / 40)


def test_the_progress_line_says_what_is_known():
    assert FULL.line() == "GPU 97 %  1,755 MHz  612 W"
    assert replace(FULL, utilisation=None, clock_mhz=None, limits=("power cap",)).line() == "GPU  612 W  throttled"
    on_cpu = Reading(device="CPU", utilisation=0.5, machine_utilisation=0.991)
    assert on_cpu.line() == "CPU 50 % (machine 99 %)"
    for terminal in (True, False):
        out = io.StringIO()
        screen = Screen(Console(file=out, force_terminal=terminal, width=200))
        values = {"loss": 1.25, "images_per_s": 1234.5}
        with screen.training("kd", epochs=3, steps=12, first_step=0) as display:
            display.stepped(epoch=1, step=4, values=values, device=FULL)
            display.stepped(epoch=1, step=5, values=values, device=None)  # no news: what was known stays
            display.validated(epoch=1, values={"acc": 0.5, "nll": 0.7})
            display.stepped(epoch=2, step=6, values=values, device=None)
        last = [line for line in out.getvalue().splitlines() if "1,234 images/s" in line][-1]
        assert "GPU 97 %  1,755 MHz  612 W" in last


def test_the_log_has_null_where_a_figure_is_not_known(tmp_path):
    log = Log(tmp_path, 0)
    log.write("device", 3, replace(FULL, temperature_c=None, limits=("power cap",)).values())
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {
        "kind": "device", "step": 3, "utilisation": 0.97, "machine_utilisation": None, "clock_mhz": 1755,
        "power_w": 612.5, "memory_gb": 12.5, "temperature_c": None, "throttled": 1.0, "other_processes": 0,
    }  # fmt: skip


def test_an_outcome_of_before_the_figures_is_read():
    old = {"epochs": 3, "best_epoch": 2, "best_acc": 0.5, "last_acc": 0.4, "seconds": 9.0, "waited": 1.0, "images": 60}
    assert Progress.from_values(old) == Progress(**old, busy=None) and Progress.from_values(old).device is None
    new = Progress(**old, device=Figures(seconds=9.5, samples=9, limits={"power cap": 0.5}))
    assert Progress.from_values(json.loads(json.dumps(asdict(new)))) == new
    for wrong in ({"seconds": "nine"}, {"device": {"samples": "nine"}}):
        with pytest.raises(ValueError, match="Expected"):
            Progress.from_values(old | wrong)


def test_energies_are_short():
    assert [readings.format_wh(value) for value in (0.01234, 4.564, 99.94, 1234.5)] == [
        "0.0123", "4.56", "99.9", "1,234"
    ]  # fmt: skip
    assert Figures(seconds=1.0, utilisation=0.5, energy_wh=2.0).text() == ", utilisation 50 %, 2 Wh"
    assert Figures(seconds=1.0).text() == ""


def test_the_words_are_nvml_s():
    """The bits that the package itself names; those it lacks are of drivers that it does not know yet."""
    real = pytest.importorskip("pynvml")
    names = {
        "GpuIdle": gpu._IDLE, "SwPowerCap": 0x4, "HwSlowdown": 0x8, "SyncBoost": 0x10,
        "SwThermalSlowdown": 0x20, "HwThermalSlowdown": 0x40, "HwPowerBrakeSlowdown": 0x80,
        "ApplicationsClocksSetting": 0x2, "DisplayClockSetting": 0x100,
    }  # fmt: skip
    for name, bit in names.items():
        assert getattr(real, f"nvmlClocksThrottleReason{name}") == bit
        assert bit == gpu._IDLE or bit in gpu._LIMITS
    assert (real.NVML_CLOCK_SM, real.NVML_TEMPERATURE_GPU) == (
        gpu._CLOCK_SM,
        gpu._TEMPERATURE_GPU,
    )
    for name in (
        "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId", "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetClockInfo", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetTotalEnergyConsumption", "nvmlShutdown",
    ):  # fmt: skip
        assert callable(getattr(real, name)), name
    assert issubclass(real.NVMLError_FunctionNotFound, real.NVMLError)


@pytest.mark.gpu
def test_a_real_gpu():
    source = source_of(torch.device("cuda"))()
    kept = torch.zeros(1, device="cuda")
    found = source.read()
    source.close()
    assert found.clock_mhz > 0 and found.power_w > 0 and found.memory_gb > 0, source.notes
    assert found.utilisation is not None and found.limits is not None and kept.item() == 0


def test_a_peak_is_never_less_than_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_resident_peak", iter([5_000_000, 4_800_000]).__next__)
    assert memory.Peak(torch.device("cpu")).bytes == 0

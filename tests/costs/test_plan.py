"""The plan: times from a given calibration by hand, memory against the process's own, disk, what is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from ensdistill.config.configs import Command, Config, Training
from ensdistill.config.methods import Method
from ensdistill.costs import calibration
from ensdistill.costs.calibration import Calibration, calibrate
from ensdistill.costs.data_size import DataSize
from ensdistill.costs.floor import step_floor
from ensdistill.costs.memory import Workload, predict
from ensdistill.costs.network import network_cost
from ensdistill.costs.plan import (
    Plan,
    format_bytes,
    format_count,
    format_seconds,
    plan,
    render,
)
from ensdistill.engine.cpu.crew import Crew
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.runtime.devices import DEVICES, Device
from ensdistill.runtime.errors import UserError

METHODS = ("ce", "kd+tdiv", "latentbe+tdiv-sdiv", "be", "hydra")
SIZE = DataSize(num_classes=7, image_shape=(9, 9, 1), num_train=101, num_valid=23, num_test=31)
COMMAND = Command(
    config=Config(
        recipe="a test",
        source="digits",
        network="wrn10x1",
        members=3,
        teacher=Training(epochs=4, warmup_epochs=0, batch_size=10),
        student=Training(epochs=5, warmup_epochs=0, batch_size=20),
        methods=METHODS,
        precision="fp32",
    ),
    seeds=2,
    device="cpu",
)
# A backward is 4 times a forward; the student's layers take 1.5 times the plain network's.
CALIBRATION = Calibration(forward=1e-3, step=5e-3, member_step=7.5e-3, images=20, where="a test")
CPU = Device(name="cpu", flops=1e11, bandwidth=1e11, element_bytes=4, source="made up")
ELSEWHERE = (Path("teachers"),)


def command(**changes: Any) -> Command:
    return replace(COMMAND, config=replace(COMMAND.config, **changes))


def planned_for(size: DataSize = SIZE, *, rates: Device = CPU, **changes: Any) -> Plan:
    return plan(command(**changes), size, calibration=CALIBRATION, rates=rates)


def rows_of(planned: Plan) -> dict[str, float | None]:
    return {row.name: row.seconds for row in planned.stages}


def test_predicted_times_by_hand() -> None:
    planned = planned_for()
    seconds = rows_of(planned)
    network = build("wrn10x1", num_classes=7, in_channels=1, image_size=9)
    layers = network_cost(network, in_channels=1, image_size=9).layers
    head = sum(layer.macs for layer in layers if layer.in_head) / sum(layer.macs for layer in layers)
    hydra = 1 - head + 3 * head
    trained, valid = 2 * 5 * 100, 2 * 5 * 23  # one incomplete batch an epoch is dropped
    expected = {
        "3 teachers": 3 * 4 * 100 * 5e-3 + 3 * 4 * 23 * 1e-3,
        "ce ×2": trained * 5e-3 + valid * 1e-3,
        "kd+tdiv ×2": trained * (2e-3 + 2e-3 + 3e-3 + 5e-3) + valid * 1e-3,
        "latentbe+tdiv-sdiv ×2": trained * (4e-3 + 1.5 * 4e-3 + 3e-3 + 3 * 7.5e-3) + valid * 4e-3,
        "be ×2": trained * (3e-3 + 3 * 7.5e-3) + valid * 3e-3,
        "hydra ×2": trained * (3e-3 + hydra * 5e-3) + valid * hydra * 1e-3,
        "evaluation": (23 + 31) * 1e-3 * (3 + 2 * (1 + 1 + 4 + 3 + hydra)),
    }
    assert {name: seconds[name] for name in expected} == pytest.approx(expected)
    assert seconds["data"] is not None and 0 < seconds["data"] < 1
    assert planned.total.seconds == pytest.approx(sum(expected.values()) + seconds["data"])


def test_images_that_are_not_square() -> None:
    network = build("wrn10x1", num_classes=7, in_channels=1, image_size=8)
    costs = [network_cost(network, in_channels=1, image_size=size) for size in (8, (8, 8), (8, 16))]
    convs = [sum(layer.macs for layer in cost.layers if not layer.in_head) for cost in costs]
    assert convs[0] == convs[1] and costs[2].layers[0].macs == 2 * costs[0].layers[0].macs


def test_images_and_forwards() -> None:
    rows = {row.name: row for row in planned_for().stages}
    assert (rows["data"].images, rows["evaluation"].images) == (101 + 23 + 31, 23 + 31)
    assert (rows["3 teachers"].images, rows["3 teachers"].F) == (3 * 4 * 100, 3)
    assert (rows["be ×2"].images, rows["be ×2"].F) == (2 * 5 * 100, 3 + 9)
    F = rows["latentbe+tdiv-sdiv ×2"].F
    assert F is not None and abs(F - (6 + 3 + 9)) < 1e-9


def test_floor_is_the_steps_and_the_validations() -> None:
    H100 = DEVICES["H100"]
    planned = planned_for(rates=H100, methods=("be+ods",), teachers=ELSEWHERE)
    network = build("wrn10x1", num_classes=7, in_channels=1, image_size=9)
    cost = network_cost(network, in_channels=1, image_size=9)
    step = sum(step_floor(cost, [cost] * 3, Method.parse("be+ods"), 20, H100).values())
    forward = sum(max(2 * layer.macs / H100.flops, 2.5 * 2 * layer.outputs / H100.bandwidth) for layer in cost.layers)
    assert [row.name for row in planned.stages] == ["data", "be+ods ×2", "evaluation"]
    assert planned.stages[1].floor == pytest.approx(2 * 5 * 5 * step + 2 * 5 * 23 * 3 * forward)
    assert planned.stages[2].floor == pytest.approx((23 + 31) * (3 + 2 * 3) * forward)
    assert planned.total.floor == pytest.approx(sum(row.floor or 0 for row in planned.stages))


def test_what_moments_and_averages_add_by_hand() -> None:
    """AdamW moves 28 bytes a parameter, an EMA 8 more; it is validated too, and SWA's statistics are a pass more."""
    plain = {row.name: row for row in planned_for(rates=CPU).stages}
    more = {row.name: row for row in planned_for(rates=CPU, optimizer="adamw", ema=0.9, swa=2).stages}
    network = build("wrn10x1", num_classes=7, in_channels=1, image_size=9)
    params, forward = sum(p.numel() for p in network.parameters()), 1e-3
    assert more["ce ×2"].seconds - plain["ce ×2"].seconds == pytest.approx((2 * 5 * 23 + 2 * 101) * forward)
    members = more["latentbe+tdiv-sdiv ×2"].seconds - plain["latentbe+tdiv-sdiv ×2"].seconds
    assert members == pytest.approx((4 * 2 * 5 * 23 + 3 * 2 * 101) * forward)
    evaluated = more["evaluation"].seconds - plain["evaluation"].seconds
    assert evaluated == pytest.approx((plain["evaluation"].F * 2) * (23 + 31) * forward)
    layers = network_cost(network, in_channels=1, image_size=9).layers
    pass_ = sum(max(2 * layer.macs / CPU.flops, 2.5 * 4 * layer.outputs / CPU.bandwidth) for layer in layers)
    update = 2 * 5 * 5 * (28 + 8 - 20) * params / CPU.bandwidth
    assert more["ce ×2"].floor - plain["ce ×2"].floor == pytest.approx((2 * 5 * 23 + 2 * 101) * pass_ + update)
    assert more["ce ×2"].disk == 2 * 5 * 4 * params and more["ce ×2"].checkpoint == 2 * 5 * 4 * params
    assert more["ce ×2"].memory >= plain["ce ×2"].memory + 3 * 4 * params


def test_stages_are_those_that_the_command_runs() -> None:
    assert "3 teachers" not in rows_of(planned_for(teachers=ELSEWHERE))
    distil = plan(replace(COMMAND, stage="distill"), SIZE, calibration=CALIBRATION, rates=CPU)
    assert [row.name for row in distil.stages] == ["data", *(f"{name} ×2" for name in METHODS), "evaluation"]
    teachers = plan(replace(COMMAND, stage="teachers"), SIZE, calibration=CALIBRATION, rates=CPU)
    assert [row.name for row in teachers.stages] == ["data", "3 teachers", "evaluation"]


def test_disk() -> None:
    planned = planned_for()
    rows = {row.name: row for row in planned.stages}
    network: Any = build("wrn10x1", num_classes=7, in_channels=1, image_size=9)
    params = sum(p.numel() for p in network.parameters())
    factors = 3 * sum(
        layer.weight.shape[0] + layer.weight.shape[1]
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    )
    head = sum(p.numel() for p in network.split_head()[1].parameters())
    assert rows["3 teachers"].disk == 3 * 2 * 4 * params
    assert rows["latentbe+tdiv-sdiv ×2"].disk == 2 * 2 * 4 * params
    assert rows["be ×2"].disk == 2 * 2 * 4 * (params + factors)
    assert rows["hydra ×2"].disk == 2 * 2 * 4 * (params + 2 * head)
    assert rows["be ×2"].checkpoint == 2 * 2 * 4 * (params + factors)
    assert rows["data"].disk is not None and 155 * 81 < rows["data"].disk < 155 * 81 + 155 * 100
    assert planned.total.disk == sum(row.disk or 0 for row in planned.stages)
    assert planned.total.checkpoint == rows["hydra ×2"].checkpoint == 2 * 2 * 4 * (params + 2 * head)


_PEAK = """
import torch
from ensdistill.config.configs import Command, Config, Training
from ensdistill.config.methods import Method
from ensdistill.models import Classifier, build
from ensdistill.models.students import build_student
torch.set_num_threads(1)

def peak():  # ru_maxrss would begin with what the parent process has
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

def run(E, B):
    def make(seed):
        return Classifier(build("wrn10x2", num_classes=7, in_channels=3, image_size=33, seed=seed), [.5] * 3, [.2] * 3)
    teachers = [make(t).eval() for t in range(E)]
    student = build_student(Method(student="latentbe"), make, E=E, seed=0).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    for _ in range(2):
        x = torch.rand(B, 3, 33, 33).to(memory_format=torch.channels_last)
        with torch.no_grad():
            t = torch.stack([teacher(x) for teacher in teachers]).softmax(-1)
        (-(t * student(x).log_softmax(-1)).sum(-1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

run(2, 2)  # libraries and their own buffers
before = peak()
run(3, 29)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's alone")
def test_memory_is_within_a_factor_of_two_of_the_process() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _PEAK], env=environment, capture_output=True, text=True, check=True)
    measured = int(done.stdout)
    large = replace(SIZE, image_shape=(33, 33, 3))
    student = replace(COMMAND.config.student, batch_size=29)
    predicted = planned_for(large, network="wrn10x2", student=student, methods=("latentbe",)).stages[2].memory
    assert predicted is not None and predicted > 100e6  # large beside what the process takes anyway
    assert 0.5 < predicted / measured < 2, (predicted, measured)


def test_memory_in_bf16_and_of_the_methods() -> None:
    rows = {row.name: row.memory or 0 for row in planned_for().stages}
    half = planned_for(precision="bf16")
    halved = {row.name: row.memory or 0 for row in half.stages}
    assert rows["3 teachers"] < rows["ce ×2"] < rows["kd+tdiv ×2"] < rows["be ×2"]
    assert rows["ce ×2"] < rows["hydra ×2"] < rows["be ×2"]
    assert rows["be ×2"] / 2 < halved["be ×2"] < rows["be ×2"]
    assert half.total.memory == max(halved.values())


def test_memory_is_the_prediction_of_the_backend() -> None:
    method = Method.parse("latentbe+tdiv-sdiv")

    def make(seed: int) -> Classifier:
        return Classifier(build("wrn10x1", num_classes=7, in_channels=1, image_size=9, seed=seed), [0.5], [0.25])

    memories = []
    for backend in ("auto", "reference", "library"):
        workload = Workload(
            teachers=Teachers([make(t) for t in range(3)], 7),
            student=build_student(method, make, E=3, seed=0),
            method=method,
            image_shape=(9, 9, 1),
            precision="fp32",
            backend=backend,
            device_type="cpu",
        )
        planned = planned_for(backend=backend, methods=(str(method),), teachers=ELSEWHERE)
        memories.append(planned.stages[1].memory)
        assert memories[-1] == predict(workload, 20).tensors
    assert memories[0] == memories[1] != memories[2]


def test_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = planned_for()
    rows = {row.name: row.memory or 0 for row in needed.stages}
    assert all(row.too_large is None for row in needed.stages)
    monkeypatch.setattr("ensdistill.costs.plan.capacity", lambda device: int(rows["be ×2"]) - 1)
    planned = planned_for()
    found = {row.name: row.too_large for row in planned.stages if row.too_large is not None}
    assert "be ×2" in found and "3 teachers" not in found
    assert re.fullmatch(
        r"student\.batch-size: 20 images a step of be need about 0\.\d+ GB of this device's 0\.\d+ GB; "
        r"the largest batch that fits is 1\d",
        found["be ×2"],
    )
    assert found["be ×2"] in " ".join(printed(planned, width=400).split())


def test_calibration_is_quick_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdistill.costs.calibration.CALIBRATION_SECONDS", 1.0)
    network = build("wrn10x1", num_classes=7, in_channels=1, image_size=9)
    start = time.perf_counter()
    calibration = calibrate(
        Classifier(network, [0.5], [0.2]),
        SIZE,
        list(map(Method.parse, METHODS)),
        B=20,
        device=torch.device("cpu"),
        precision="fp32",
    )
    assert time.perf_counter() - start < 5
    assert 0 < calibration.forward < calibration.step < 1 and 0 < calibration.member_step < 1
    assert 2 <= calibration.images <= 20
    assert calibration.where == f"cpu, {torch.get_num_threads()} threads, fp32"


def test_plan_measures_this_machine_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdistill.costs.calibration.CALIBRATION_SECONDS", 0.6)
    text = printed(plan(command(methods=("kd", "latentbe+tdiv-sdiv")), SIZE))
    assert "predicted from a calibration of" in text and "images a step on this machine (cpu, " in text
    assert "(measured now, " in text


def printed(planned: Plan, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(planned))
    return console.export_text()


def test_table_fits_eighty_columns() -> None:
    large = replace(SIZE, num_train=1_200_000, image_shape=(64, 64, 1))
    teacher, student = (replace(one, epochs=90) for one in (COMMAND.config.teacher, COMMAND.config.student))
    lines = printed(planned_for(large, teacher=teacher, student=student, members=4), width=80).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if not line.strip())]
    names = ["data", "4 teachers", "ce ×2", "kd+tdiv ×2", "latentbe+tdiv-sdiv ×2", "be ×2", "hydra ×2"]
    assert [line[:23].strip() for line in table[1:]] == [*names, "evaluation", "total"]
    assert not any("…" in line for line in lines)
    assert table[0].split() == ["images", "F/image", "floor", "cpu", "predicted", "memory", "disk"]


def test_numbers_read_well() -> None:
    seconds = (0.43, 3.14, 12.4, 185, 3599.9, 7620, 31 * 3600, 27 * 86400)
    assert [format_seconds(s) for s in seconds] == [
        "0.4 s",
        "3.1 s",
        "12 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
        "31 h",
        "27 days",
    ]
    sizes = (512e3, 3.14e6, 12e9, 196e9, 2.5e12)
    assert [format_bytes(size) for size in sizes] == ["512 kB", "3.1 MB", "12 GB", "196 GB", "2.5 TB"]
    assert [format_count(n) for n in (1797, 35_942_400)] == ["1,797", "35.9 M"]


@pytest.mark.parametrize("stage", ["student", "teacher"])
def test_refuses_batches_that_are_larger_than_the_data(stage: str) -> None:
    training = replace(COMMAND.config.student, batch_size=102)
    expected = rf"^plan: the {stage}s' batch-size is 102, expected 1 to the number of training images, 101; choose"
    with pytest.raises(UserError, match=expected):
        planned_for(**{stage: training})


def test_refuses_what_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^network 'wrn11x1': no such network"):
        planned_for(network="wrn11x1")
    with pytest.raises(UserError, match=r"^--device H20: not a device; expected cpu, cuda or cuda:N"):
        plan(replace(COMMAND, device="H20"), SIZE)


def test_a_busy_machine_is_noticed_and_times_are_ranges() -> None:
    planned = plan(COMMAND, SIZE, calibration=replace(CALIBRATION, fastest=0.5, slowest=4.0), rates=CPU)
    text = printed(planned, width=200)
    assert planned.total.seconds is not None
    ends = [format_seconds(factor * planned.total.seconds) for factor in (0.5, 4.0)]
    assert f"{ends[0]} to {ends[1]}" in text
    assert "this machine is busy: repeats of one measurement took 0.50 to 4.00 times" in text
    idle = printed(planned_for(), width=200)
    assert "busy" not in idle and " to " not in idle.split("predicted from")[0]


def test_repeats_that_differ_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # two runs of two rows, which build what later ones reuse, and seven repeats, of which the median is 2
    seconds = iter([9.0, 2.0, 1.0, 8.0, 2.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(calibration, "seconds_of", lambda run, device: next(seconds))
    timing = calibration._timed(
        lambda x_BCHW: None, lambda rows: torch.zeros(rows), torch.device("cpu"), B=2, members=1, budget=60.0
    )
    assert timing == (1.0, 2, 0.5, 4.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_crew_is_timed_at_what_it_will_do(threads: int) -> None:
    network = build("wrn10x1", num_classes=7, in_channels=1, image_size=9)
    found = calibrate(
        Classifier(network, [0.5], [0.25]), SIZE, [Method.parse("latentbe+tdiv-sdiv")], B=4,
        device=torch.device("cpu"), precision="fp32", crew=Crew(threads),
    )  # fmt: skip
    assert 0 < found.forward < found.step and found.member_step > 0
    assert found.fastest <= 1 <= found.slowest

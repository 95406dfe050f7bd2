"""The plan: times from a given calibration by hand, memory against the process's own, disk, what is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from ensdistill.config.methods import Method
from ensdistill.costs.calibration import Calibration, calibrate
from ensdistill.costs.floor import step_floor
from ensdistill.costs.job_size import JobSize
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
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.runtime.devices import DEVICES, Device
from ensdistill.runtime.errors import UserError

METHODS = ("ce", "kd+tdiv", "latentbe+tdiv-sdiv", "be", "hydra")
JOB = JobSize(
    network="resnet20x1",
    num_classes=7,
    in_channels=1,
    image_size=9,
    num_train=101,
    num_valid=23,
    num_test=31,
    members=3,
    teacher_epochs=4,
    student_epochs=5,
    teacher_batch_size=10,
    student_batch_size=20,
    methods=tuple(Method.parse(text) for text in METHODS),
    seeds=2,
    teacher_validations=2,
    student_validations=3,
)
# A backward is 4 times a forward; the student's layers take 1.5 times the plain network's.
CALIBRATION = Calibration(forward=1e-3, step=5e-3, member_step=7.5e-3, images=20, where="a test")
CPU = Device(name="cpu", flops=1e11, bandwidth=1e11, element_bytes=4, source="made up")


def rows_of(planned: Plan) -> dict[str, float | None]:
    return {row.name: row.seconds for row in planned.rows}


def test_predicted_times_by_hand() -> None:
    planned = plan(JOB, calibration=CALIBRATION, device=CPU)
    seconds = rows_of(planned)
    network = build("resnet20x1", num_classes=7, in_channels=1, image_size=9)
    layers = network_cost(network, in_channels=1, image_size=9).layers
    head = sum(layer.macs for layer in layers if layer.in_head) / sum(layer.macs for layer in layers)
    hydra = 1 - head + 3 * head
    trained, valid = 2 * 5 * 100, 2 * 3 * 23  # one incomplete batch an epoch is dropped
    expected = {
        "3 teachers": 3 * 4 * 100 * 5e-3 + 3 * 2 * 23 * 1e-3,
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


def test_images_and_forwards() -> None:
    rows = {row.name: row for row in plan(JOB, calibration=CALIBRATION, device=CPU).rows}
    assert (rows["data"].images, rows["evaluation"].images) == (101 + 23 + 31, 23 + 31)
    assert (rows["3 teachers"].images, rows["3 teachers"].F) == (3 * 4 * 100, 3)
    assert (rows["be ×2"].images, rows["be ×2"].F) == (2 * 5 * 100, 3 + 9)
    F = rows["latentbe+tdiv-sdiv ×2"].F
    assert F is not None and abs(F - (6 + 3 + 9)) < 1e-9


def test_floor_is_the_steps_and_the_validations() -> None:
    job = replace(JOB, methods=(Method.parse("be+ods"),), device="H100", train_teachers=False)
    planned = plan(job)
    network = build("resnet20x1", num_classes=7, in_channels=1, image_size=9)
    cost = network_cost(network, in_channels=1, image_size=9)
    H100 = DEVICES["H100"]
    step = sum(step_floor(cost, [cost] * 3, Method.parse("be+ods"), 20, H100).values())
    forward = sum(max(2 * layer.macs / H100.flops, 2.5 * 2 * layer.outputs / H100.bandwidth) for layer in cost.layers)
    assert [row.name for row in planned.rows] == ["data", "be+ods ×2", "evaluation"]
    assert planned.rows[1].floor == pytest.approx(2 * 5 * 5 * step + 2 * 3 * 23 * 3 * forward)
    assert planned.rows[2].floor == pytest.approx((23 + 31) * (3 + 2 * 3) * forward)
    assert planned.total.floor == pytest.approx(sum(row.floor or 0 for row in planned.rows))
    assert planned.calibration is None and planned.total.seconds is None


def test_what_is_there_already_takes_no_time() -> None:
    job = replace(JOB, write_data=False, train_teachers=False)
    planned = plan(job, calibration=CALIBRATION, device=CPU)
    assert planned.rows[0].seconds == 0
    assert "3 teachers" not in rows_of(planned)


def test_disk() -> None:
    planned = plan(JOB, calibration=CALIBRATION, device=CPU)
    rows = {row.name: row for row in planned.rows}
    network: Any = build("resnet20x1", num_classes=7, in_channels=1, image_size=9)
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
    assert planned.total.disk == sum(row.disk or 0 for row in planned.rows)
    assert planned.total.checkpoint == rows["hydra ×2"].checkpoint == 2 * 2 * 4 * (params + 2 * head)
    stored = plan(replace(JOB, stored_image_bytes=1000), calibration=CALIBRATION, device=CPU).rows[0].disk
    assert stored is not None and 155 * 1000 < stored < 155 * 1100


_PEAK = """
import torch
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
    job = replace(JOB, network="wrn10x2", in_channels=3, image_size=33, student_batch_size=29)
    job = replace(job, methods=(Method.parse("latentbe"),))
    predicted = plan(job, calibration=CALIBRATION, device=CPU).rows[2].memory
    assert predicted is not None and predicted > 100e6  # large beside what the process takes anyway
    assert 0.5 < predicted / measured < 2, (predicted, measured)


def test_memory_in_bf16_and_of_the_methods() -> None:
    rows = {row.name: row.memory or 0 for row in plan(JOB, calibration=CALIBRATION, device=CPU).rows}
    half = plan(replace(JOB, precision="bf16"), calibration=CALIBRATION, device=CPU)
    halved = {row.name: row.memory or 0 for row in half.rows}
    assert rows["3 teachers"] < rows["ce ×2"] < rows["kd+tdiv ×2"] < rows["be ×2"]
    assert rows["ce ×2"] < rows["hydra ×2"] < rows["be ×2"]
    assert rows["be ×2"] / 2 < halved["be ×2"] < rows["be ×2"]
    assert half.total.memory == max(halved.values())


def test_memory_is_the_prediction_of_the_backend() -> None:
    job = replace(JOB, methods=(Method.parse("latentbe+tdiv-sdiv"),), train_teachers=False)

    def make(seed: int) -> Classifier:
        return Classifier(build("resnet20x1", num_classes=7, in_channels=1, image_size=9, seed=seed), [0.5], [0.25])

    memories = []
    for backend in ("auto", "reference", "library"):
        workload = Workload(
            teachers=Teachers([make(t) for t in range(3)], 7),
            student=build_student(job.methods[0], make, E=3, seed=0),
            method=job.methods[0],
            image_shape=(9, 9, 1),
            precision="fp32",
            backend=backend,
            device_type="cpu",
        )
        memories.append(plan(replace(job, backend=backend), calibration=CALIBRATION, device=CPU).rows[1].memory)
        assert memories[-1] == predict(workload, 20).tensors
    assert memories[0] == memories[1] != memories[2]


def test_memory_of_a_device_that_is_elsewhere() -> None:
    job = replace(JOB, methods=(Method.parse("kd"),), train_teachers=False)
    here, there = (plan(replace(job, device=name), calibration=CALIBRATION, device=CPU) for name in ("cpu", "H100"))
    assert here.rows[1].memory != there.rows[1].memory  # there `auto` is the kernels
    assert there.rows[1].too_large is None


def test_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = plan(JOB, calibration=CALIBRATION, device=CPU)
    rows = {row.name: row.memory or 0 for row in needed.rows}
    assert all(row.too_large is None for row in needed.rows)
    monkeypatch.setattr("ensdistill.costs.plan.capacity", lambda device: int(rows["be ×2"]) - 1)
    planned = plan(JOB, calibration=CALIBRATION, device=CPU)
    found = {row.name: row.too_large for row in planned.rows if row.too_large is not None}
    assert "be ×2" in found and "3 teachers" not in found
    assert re.fullmatch(
        r"student\.batch-size: 20 images a step of be need about 0\.\d+ GB of this device's 0\.\d+ GB; "
        r"the largest batch that fits is 1\d",
        found["be ×2"],
    )
    assert found["be ×2"] in " ".join(printed(planned, width=400).split())


def test_calibration_is_quick_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdistill.costs.calibration.CALIBRATION_SECONDS", 1.0)
    network = build("resnet20x1", num_classes=7, in_channels=1, image_size=9)
    start = time.perf_counter()
    calibration = calibrate(JOB, Classifier(network, [0.5], [0.2]))
    assert time.perf_counter() - start < 5
    assert 0 < calibration.forward < calibration.step < 1 and 0 < calibration.member_step < 1
    assert 2 <= calibration.images <= 20
    assert calibration.where == f"cpu, {torch.get_num_threads()} threads, fp32"


def test_plan_measures_this_machine_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdistill.costs.calibration.CALIBRATION_SECONDS", 0.6)
    job = replace(JOB, methods=(Method.parse("kd"), Method.parse("latentbe+tdiv-sdiv")))
    text = printed(plan(job))
    assert "predicted from a calibration of" in text and "images a step on this machine (cpu, " in text
    assert "(measured now, " in text


def printed(planned: Plan, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(planned))
    return console.export_text()


def test_table_fits_eighty_columns() -> None:
    job = replace(JOB, num_train=1_200_000, student_epochs=90, teacher_epochs=90, image_size=64, members=4)
    lines = printed(plan(job, calibration=CALIBRATION, device=CPU), width=80).splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if not line.strip())]
    names = ["data", "4 teachers", "ce ×2", "kd+tdiv ×2", "latentbe+tdiv-sdiv ×2", "be ×2", "hydra ×2"]
    assert [line[:23].strip() for line in table[1:]] == [*names, "evaluation", "total"]
    assert not any("…" in line for line in lines)
    assert table[0].split() == ["images", "F/image", "floor", "cpu", "predicted", "memory", "disk"]


def test_other_devices_get_a_floor_alone() -> None:
    text = printed(plan(replace(JOB, device="A100-80GB", precision="bf16")))
    assert "floor A100-80GB" in text and "(data sheet)" in text
    assert "predicted: not known, the device is not at hand" in text


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, r"^plan: seeds is 0, expected at least 1; give a positive number$"),
        (
            {"student_batch_size": 102},
            r"^plan: the students' batch-size is 102, expected 1 to the number of training images, 101; choose",
        ),
        (
            {"teacher_batch_size": 0},
            r"^plan: the teachers' batch-size is 0, expected 1 to the number of training images",
        ),
    ],
)
def test_refuses_impossible_jobs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(JOB, **changes)


def test_refuses_devices_that_are_not_known_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^device 'H20': its rates are not known \(did you mean 'H200'\?\)"):
        plan(replace(JOB, device="H20"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device 'cuda:1': PyTorch sees no GPU here; expected cpu or one of H100, "):
        plan(replace(JOB, device="cuda:1"))
    with pytest.raises(UserError, match=r"^network 'wrn11x1': no such network"):
        plan(replace(JOB, network="wrn11x1"), calibration=CALIBRATION, device=CPU)

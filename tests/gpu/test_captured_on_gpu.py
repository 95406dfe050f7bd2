"""Captured steps on a GPU: bit for bit those launched one by one, no synchronisation between two marks, fed by FFCV."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.harness.calibrated import calibrated
from ensdistill.config.methods import SHOWN, STUDENTS, Method
from ensdistill.config.updates import SGD, Updates
from ensdistill.data.beton_file import write_arrays
from ensdistill.data.feed import Feed
from ensdistill.data.inputs import Inputs, ResidentInputs, StagedInputs
from ensdistill.engine.networks import make_networks
from ensdistill.runtime.errors import UserError
from ensdistill.training.from_config import make_state
from ensdistill.training.step import State, StepConfig
from ensdistill.training.stepper import CudaGraph, Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
        reason="the kernels need compute capability 8.0",
    ),
]
METHOD = "latentbe+tdiv-sdiv"
K, SIZE, B, EPOCH, STEPS = 10, 32, 16, 10, 200


def every_method() -> list[str]:
    """Every student with all that it may be shown."""
    methods = []
    for student in STUDENTS:
        for shown in SHOWN:
            with contextlib.suppress(UserError):
                methods.append(str(Method(student=student, shown=shown)))
    return sorted(methods)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("captured") / "images.beton"
    images_NHWC = rng.integers(0, 256, (B * EPOCH, SIZE, SIZE, 3), dtype=np.uint8)
    write_arrays(path, images_NHWC, rng.integers(0, K, B * EPOCH), (SIZE, SIZE, 3), lambda: None)
    return path


def make_inputs(path: Path, kind: str, device: torch.device) -> Inputs:
    feed = Feed(path, batch_size=B, seed=5, shuffle=True, drop_last=True, cache="none", pin=True)
    return ResidentInputs(feed, device) if kind == "resident" else StagedInputs(feed, device)


def make_stepper(
    method: str,
    inputs: Inputs,
    device: torch.device,
    *,
    capture: bool,
    backend: str = "triton",
    network: str = "wrn10x1",
    updates: Updates = SGD,
) -> Stepper:
    teachers, student = copy.deepcopy(calibrated(network, method, E=3, K=K, size=SIZE, device=device))
    networks = make_networks(backend, teachers, student, "bf16", device)  # type: ignore[arg-type]
    state = make_state(networks, updates, weight_decay=5e-4)
    config = StepConfig(method=Method.parse(method), seed=3)
    rates = [0.05 * (1 + step % 7) / 7 for step in range(STEPS)]
    graph = CudaGraph(device) if capture else None
    return Stepper(state, config, inputs=inputs, rates=rates, device=device, rows=STEPS, graph=graph)


def run(stepper: Stepper, steps: int = STEPS) -> list[dict[str, float]]:
    """The measures of so many steps, which nothing waits for: but in the first epoch of those that are not captured,
    whose first step compiles, measures and keeps indices on the device, as the warm-up of a capture does.
    """
    stepper.prepare(first_row=0)
    rows = []
    for epoch in range(steps // EPOCH):
        with stepper.inputs.epoch(epoch) as batches:
            torch.cuda.set_sync_debug_mode("error" if epoch > 0 or stepper.is_captured else "default")
            try:
                for ready in stepper.batches(batches):
                    stepper(ready)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        measured = stepper.mark().read()
        assert measured.waited >= 0 and (measured.busy is None) == (not stepper.is_captured)
        rows += [row for (row,) in measured.rows]
    return rows


def everything(state: State) -> dict[str, Tensor]:
    return {f"tensor {i}": tensor for i, tensor in enumerate(state.tensors())}


def assert_same(one: State, other: State) -> None:
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


@pytest.mark.values
@pytest.mark.parametrize("kind", ["resident", "staged"])
def test_200_captured_steps_are_the_eager_ones_bit_for_bit(kind: str, path: Path, device: torch.device) -> None:
    steppers = [make_stepper(METHOD, make_inputs(path, kind, device), device, capture=c) for c in (False, True)]
    eager, captured = (run(stepper) for stepper in steppers)
    assert [stepper.is_captured for stepper in steppers] == [False, True], steppers[1].note
    assert eager == captured
    assert_same(steppers[0].state, steppers[1].state)


@pytest.mark.parametrize("method", every_method())
def test_every_method_is_captured_and_replays_without_a_wait(method: str, path: Path, device: torch.device) -> None:
    stepper = make_stepper(method, make_inputs(path, "resident", device), device, capture=True)
    rows = run(stepper, EPOCH)
    assert stepper.is_captured, stepper.note
    assert len(rows) == EPOCH


@pytest.mark.values
@pytest.mark.parametrize(
    "method", ["ce", "kd", "latentbe", "be+gaussian", "kd+tdiv", "latentbe+ods", "kd+confods", "hydra+tdiv-sdiv"]
)
def test_methods_captured_are_the_eager_ones_bit_for_bit(method: str, path: Path, device: torch.device) -> None:
    steppers = [make_stepper(method, make_inputs(path, "resident", device), device, capture=c) for c in (False, True)]
    eager, captured = (run(stepper, 2 * EPOCH) for stepper in steppers)
    assert steppers[1].is_captured, steppers[1].note
    assert eager == captured
    assert_same(steppers[0].state, steppers[1].state)


@pytest.mark.values
@pytest.mark.parametrize("updates", [Updates(optimizer="adamw"), Updates(optimizer="adamw", ema=0.99)])
def test_other_updates_captured_are_the_eager_ones_bit_for_bit(
    updates: Updates, path: Path, device: torch.device
) -> None:
    inputs = make_inputs(path, "resident", device)
    steppers = [make_stepper(METHOD, inputs, device, capture=c, updates=updates) for c in (False, True)]
    eager, captured = (run(stepper, 2 * EPOCH) for stepper in steppers)
    assert steppers[1].is_captured, steppers[1].note
    assert eager == captured
    assert_same(steppers[0].state, steppers[1].state)


@pytest.mark.values
@pytest.mark.parametrize("backend", ["library", "auto"])
def test_the_library_s_layers_are_captured_too(backend: str, path: Path, device: torch.device) -> None:
    inputs = make_inputs(path, "resident", device)
    steppers = [make_stepper(METHOD, inputs, device, capture=c, backend=backend) for c in (False, True)]
    eager, captured = (run(stepper, EPOCH) for stepper in steppers)
    assert steppers[1].is_captured, steppers[1].note
    # cuDNN need not repeat its sums to the bit
    assert [row["loss"] for row in captured] == pytest.approx([row["loss"] for row in eager], rel=2e-2)


@pytest.mark.values
def test_the_feed_s_way_changes_nothing(path: Path, device: torch.device) -> None:
    steppers = [
        make_stepper(METHOD, make_inputs(path, k, device), device, capture=True) for k in ("resident", "staged")
    ]
    first, second = (run(stepper, 3 * EPOCH) for stepper in steppers)
    assert first == second
    assert_same(steppers[0].state, steppers[1].state)


@pytest.mark.values
def test_warm_up_and_capture_leave_no_trace(path: Path, device: torch.device) -> None:
    stepper = make_stepper(METHOD, make_inputs(path, "resident", device), device, capture=True)
    before = {name: tensor.clone() for name, tensor in everything(stepper.state).items()}
    rng = torch.cuda.get_rng_state(device)
    stepper.prepare(first_row=0)
    assert stepper.is_captured, stepper.note
    after = everything(stepper.state)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert stepper.state.step == 0 and torch.equal(torch.cuda.get_rng_state(device), rng)

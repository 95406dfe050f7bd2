"""Steps that ask PyTorch's modules, captured on a GPU: replays draw anew, wait for nothing, and are the eager steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensdistill.config.methods import Method
from ensdistill.engine import rehearsal
from ensdistill.engine.networks import make_networks
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.students import build_student
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig
from ensdistill.training.stepper import CudaGraph, Stepper

pytestmark = pytest.mark.gpu
E, B, K, SIZE, STEPS = 3, 8, 10, 16, 20


class Asking(nn.Module):
    """Asks the host while it trains, which no capture survives."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + (x.mean().item() > 1e9)) if self.training else x


class Fixed:
    """One batch."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        images_BHWC = torch.randint(0, 256, (B, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
        self._batch = images_BHWC.to(device), (torch.arange(B) % K).to(device)

    def fill(self) -> None:
        pass

    def batch(self, step: Tensor) -> tuple[Tensor, Tensor]:
        return self._batch


def classifier(seed: int, *layers: nn.Module) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(), nn.Dropout(0.3), *layers,
        nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, K),
    )  # fmt: skip
    return Classifier(network.to(memory_format=torch.channels_last), [0.5] * 3, [0.25] * 3)  # type: ignore[call-overload]


def make_stepper(method: str, device: torch.device, *, capture: bool, asks: bool = False) -> Stepper:
    parsed = Method.parse(method)
    layers = [Asking()] if asks else []
    teachers = Teachers([classifier(1 + t) for t in range(E)], K).to(device)

    def of_student(seed: int) -> Classifier:
        if parsed.student == "hydra":  # which splits networks of ours alone
            return Classifier(build("wrn10x1", num_classes=K, image_size=SIZE, seed=seed), [0.5] * 3, [0.25] * 3)
        return classifier(seed, *layers)

    student = build_student(parsed, of_student, E=E, seed=0).to(device)
    networks = make_networks("auto", teachers if parsed.needs_teachers else None, student, "fp32", device)
    inputs: Any = Fixed(device)
    return Stepper(
        State(networks=networks, optimizer=make_optimizer(student, 5e-4)),
        StepConfig(method=parsed, seed=3),
        inputs=inputs,
        rates=[0.05 * (1 + step % 7) / 7 for step in range(STEPS)],
        device=device,
        rows=STEPS,
        graph=CudaGraph(device) if capture else None,
    )


def run(stepper: Stepper) -> list[list[dict[str, float]]]:
    stepper.prepare(first_row=0)
    torch.cuda.set_sync_debug_mode("error" if stepper.is_captured else "default")
    try:
        for _ in range(STEPS):
            stepper()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return stepper.mark().read().rows


@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "hydra+tdiv-sdiv", "kd+confods", "ce"])
def test_modules_are_captured_and_replay_without_a_wait(
    method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the numbers are: the next test compares them."""
    monkeypatch.setattr(rehearsal, "TOLERANCE", {"fp32": float("inf")})
    stepper = make_stepper(method, device, capture=True)
    assert len(run(stepper)) == STEPS and stepper.is_captured, stepper.note


@pytest.mark.values
@pytest.mark.parametrize("method", ["latentbe+tdiv-sdiv", "hydra+tdiv-sdiv", "kd+confods", "ce"])
def test_captured_modules_draw_and_compute_what_eager_ones_do(method: str, device: torch.device) -> None:
    eager, captured = (make_stepper(method, device, capture=capture) for capture in (False, True))
    rows, same = run(eager), run(captured)
    assert captured.is_captured, captured.note
    for (right,), (found,) in zip(rows, same, strict=True):
        assert found == pytest.approx(right, rel=1e-3)
    losses = {row["loss"] for (row,) in same}
    assert len(losses) == STEPS  # a step's dropout is not another's


def test_a_capture_that_fails_leaves_generators_that_draw(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "TOLERANCE", {"fp32": float("inf")})
    stepper = make_stepper("ce", device, capture=True, asks=True)
    assert len(run(stepper)) == STEPS and not stepper.is_captured
    assert stepper.note is not None and "not captured as one CUDA graph, for " in stepper.note

"""Small networks and teachers for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensdistill.methods import Method
from ensdistill.models import Classifier, build
from ensdistill.networks import Networks
from ensdistill.step import State, StepConfig, make_optimizer
from ensdistill.students import build_student
from ensdistill.teachers import Teachers

K = 7


def small_classifier(seed: int, network: str = "wrn10x1", channels: int = 3, size: int = 9) -> Classifier:
    """A network whose every parameter and statistic has moved off its initial value."""
    classifier = Classifier(
        build(network, num_classes=K, in_channels=channels, image_size=size, seed=seed),
        [0.4] * channels,
        [0.3] * channels,
    )
    move_(classifier, seed)
    return classifier


def move_(module: nn.Module, seed: int) -> None:
    """Shift every parameter and running statistic by a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and "pixel" not in name:
                shift = 0.1 * torch.randn(tensor.shape, generator=generator)
                tensor.add_(shift.abs() if name.endswith("running_var") else shift)


def small_state(method: str, *, E: int = 3, seed: int = 0, moved: bool = True) -> tuple[State, StepConfig]:
    """A state of `method` with E teachers, ready to step."""
    parsed = Method.parse(method)
    student = build_student(parsed, small_classifier, E=E, seed=seed)
    if moved:
        move_(student, seed + 1)
    teachers = Teachers([small_classifier(100 + t) for t in range(E)], K)
    state = State(
        networks=Networks(teachers if parsed.needs_teachers else None, student, "fp32"),
        optimizer=make_optimizer(student, 5e-4),
    )
    return state, StepConfig(method=parsed, seed=3, pad=1)


def small_batch(B: int = 5, size: int = 9, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Random uint8 images and labels."""
    generator = torch.Generator().manual_seed(B)
    images = torch.randint(0, 256, (B, size, size, channels), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, K, (B,), generator=generator)


def foreign_network(width: int) -> nn.Module:
    """A network of somebody else's, as `--network networks:foreign_network` builds it: unbiased BatchNorm, a bias."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 10),
    )  # fmt: skip


def mixing_network() -> nn.Module:
    """A network that mixes the images of a batch, which members cannot share."""

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(0, keepdim=True)

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Mixing(), nn.Linear(16, 10))

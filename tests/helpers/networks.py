"""Small networks and teachers for tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ensdistill.config.methods import Method
from ensdistill.config.updates import SGD, Updates
from ensdistill.engine.networks import Networks
from ensdistill.models import Classifier, build
from ensdistill.models.ensembles import Teachers
from ensdistill.models.layers import GlobalAveragePool
from ensdistill.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet
from ensdistill.models.students import build_student
from ensdistill.training.from_config import make_state
from ensdistill.training.step import State, StepConfig

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


def small_state(
    method: str, *, E: int = 3, seed: int = 0, moved: bool = True, updates: Updates = SGD
) -> tuple[State, StepConfig]:
    """A state of `method` with E teachers, ready to step."""
    parsed = Method.parse(method)
    student = build_student(parsed, small_classifier, E=E, seed=seed)
    if moved:
        move_(student, seed + 1)
    teachers = Teachers([small_classifier(100 + t) for t in range(E)], K)
    networks = Networks(teachers if parsed.needs_teachers else None, student, "fp32")
    return make_state(networks, updates, weight_decay=5e-4), StepConfig(method=parsed, seed=3, pad=1)


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


def small_foreign_network(habit: str) -> nn.Module:
    """A network of somebody else's with a habit: a softmax at its end, or in evaluation alone, a look at its values."""

    class Habit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if habit == "softmax" or (habit == "softmax in evaluation" and not self.training):
                return x.softmax(dim=1)
            return x * 2 if habit == "values" and x.sum().item() > 0 else x

    norm = nn.BatchNorm2d(4, momentum=None if habit == "momentum" else 0.1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), norm, nn.Flatten())
    network.extend([nn.Linear(4, 10), Habit()])
    return network


def network_of(name: str, seed: int, *, classes: int = 10, size: int = 9) -> nn.Module:
    """A small network of each kind whose every parameter and statistic has moved."""
    if name == "resnet8":
        network: nn.Module = CifarResNet(8, 1, classes)
    elif name == "pooled":
        network = Pooled(classes)
    elif name == "narrow":
        network = NarrowImagenet(classes)
    elif name.startswith("imagenet"):
        network = ResNet(int(name.removeprefix("imagenet")), classes)
    elif "_" in name:
        network = pytest.importorskip("pytorchcv.model_provider").get_model(
            name.removesuffix("_of_pytorchcv"), num_classes=classes, in_size=(size, size)
        )
        network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    else:
        network = build(name, num_classes=classes, image_size=size, seed=seed)
    move_(network, seed)
    return network.eval()


class TwoNorms(nn.Module):
    """Two norms of one value, which training has a form for."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.main, self.side = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 1)
        self.norms, self.linear = nn.ModuleList([nn.BatchNorm2d(5), nn.BatchNorm2d(5)]), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.linear((self.main(self.norms[0](y).relu()) + self.side(self.norms[1](y))).mean((2, 3)))


class NarrowImagenet(nn.Module):
    """ImageNet's ResNets in small: their stem and max-pool, a bottleneck with its shortcut, a basic block."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Bottleneck(16, 8, 2), BasicBlock(32, 32, 1))
        self.avgpool, self.fc = GlobalAveragePool(), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.blocks(self.maxpool(self.relu(self.bn1(self.conv1(x)))))))


class Pooled(nn.Module):
    """Max-pools at odd places: of a convolution, of a norm that a convolution reads too, in a sum, before the mean."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.main = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, 2, padding=1)
        self.side, self.last = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 3, padding=1)
        self.norm, self.norm2, self.pool = nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.MaxPool2d(3, stride=2, padding=1)
        self.linear = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y).relu()
        h = self.main(z) + self.pool(z)
        g = self.last(self.norm2(h).relu()) + self.side(self.pool(y))
        return self.linear(nn.functional.max_pool2d(g, 3, stride=2, padding=1).mean((2, 3)))


class ResidualFirst(nn.Module):
    """A value behind a norm that a sum reads before a convolution does, so that the sum's share comes last."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.main = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.side, self.last = nn.Conv2d(5, 4, 1), nn.Conv2d(5, 4, 3, padding=1)
        self.norm, self.norm2, self.linear = nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y).relu()
        h = self.main(y) + z
        return self.linear((self.last(self.norm2(h).relu()) + self.side(z)).mean((2, 3)))


def folding(operations: Any, folds: bool) -> Any:
    """Operations of the class `operations` that apply all norms they can where the next convolution loads, or none."""

    class Told(operations):
        def folds_norm(self, y_MBHWC: Tensor, readers: Any, device: torch.device, /) -> bool:
            return folds

    return Told()


class CountConvs(TorchDispatchMode):
    """Images that go through convolutions of the stem's kind: forward, backward to the input and to the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.to_input = self.to_weight = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name == "aten::convolution":
            self.forward += args[0].shape[0]
        elif name == "aten::convolution_backward":
            rows, mask = args[0].shape[0], args[-1]
            self.to_input += rows * mask[0]
            self.to_weight += rows * mask[1]
        return function(*args, **(kwargs or {}))

"""Files of tiny networks for the tests of what reads such files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ensdistill.formats.ours import NetworkInfo, save_network
from ensdistill.models.ensembles import MemberNetworks

BUILDER = "saved_networks:tiny"
CLASSES = ("cat", "dog", "Käfer")


class Exported(nn.Module):
    """What gives other logits while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1) if torch.compiler.is_exporting() else x


def tiny(classes: int = 3, channels: int = 1, changes: bool = False, seed: int = 0) -> nn.Module:
    """A network of somebody else's, whose every value has moved, for images of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(16, classes),
        )  # fmt: skip
        with torch.no_grad():
            for value in network.state_dict().values():
                if value.is_floating_point():
                    value.add_(0.3 * torch.rand(value.shape))
    if changes:
        network.append(Exported())
    return network


def save_tiny(path: Path, *, channels: int = 1, seeds: tuple[int, ...] = (0,), size: int = 8, **changes: Any) -> Path:
    """Write the file of a `tiny` network, or of an ensemble of them."""
    arguments = {"classes": 3, "channels": channels, **changes.pop("arguments", {})}
    values: dict[str, Any] = {
        "architecture": BUILDER,
        "arguments": arguments,
        "class_names": CLASSES,
        "image_shape": (size, size, channels),
        "pixel_mean": (0.3, 0.4, 0.5)[:channels],
        "pixel_std": (0.2, 0.3, 0.25)[:channels],
        "method": "latentbe+tdiv-sdiv",
        "temperature": 1.37,
        "members": len(seeds),
        "measures": {"test_acc": 0.875, "test_nll": 0.4},
    }
    networks = [tiny(**arguments, seed=seed) for seed in seeds]
    save_network(path, networks[0] if len(seeds) == 1 else MemberNetworks(networks), NetworkInfo(**(values | changes)))
    return path

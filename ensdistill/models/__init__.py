"""Networks by name.

`build("wrn28x4", num_classes=100, image_size=32)` gives a plain `nn.Module` that maps normalised images (B, C, H, W) to
logits (B, K); `Classifier` puts the pixel normalisation in front, so that it takes images in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensdistill.models.layers import initialise_
from ensdistill.models.resnet import CifarResNet, ResNet
from ensdistill.models.wide_resnet import WideResNet
from ensdistill.runtime.errors import UserError

NAMES = (
    "wrn{depth}x{width} (depth 6n + 4), resnet{20,32,44,56,110}[x{width}], depth and width below 10,000, "
    "resnet18, resnet34, resnet50"
)


def build(name: str, *, num_classes: int, in_channels: int = 3, image_size: int = 32, seed: int = 0) -> nn.Module:
    """Build the network called `name`, with the official initialisation drawn from `seed`.

    Args:
        name: `wrn28x4` (pre-activation WRN-28-4), `resnet20x2` (CIFAR ResNet-20, twice as wide), `resnet18` | `34` |
            `50` (for 64 px with a 3x3 stem and no max-pool, from 96 px on with ImageNet's 7x7 stem and max-pool).
        image_size: side of the images in pixels. Convolutions do not depend on it but for the stem of resnet18 | 34 |
            50.

    Raises:
        UserError: no network has that name.
    """
    module: nn.Module
    if (
        (match := re.fullmatch(r"wrn(\d{1,4})x(\d{1,4})", name))  # a name out of a file may ask for anything
        and int(match[1]) >= 10
        and int(match[1]) % 6 == 4
        and int(match[2]) > 0
    ):
        module = WideResNet(int(match[1]), int(match[2]), num_classes, in_channels)
    elif (match := re.fullmatch(r"resnet(20|32|44|56|110)(?:x([1-9]\d{0,3}))?", name)) is not None:
        module = CifarResNet(int(match[1]), int(match[2] or 1), num_classes, in_channels)
    elif (match := re.fullmatch(r"resnet(18|34|50)", name)) is not None:
        module = ResNet(int(match[1]), num_classes, in_channels, stem="conv3x3" if image_size < 96 else "conv7x7")
    else:
        raise UserError(f"network '{name}': no such network; expected one of {NAMES}")
    initialise_(module, seed)
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not among torch's overloads


def final_layer(network: nn.Module) -> nn.Linear | None:
    """Return the layer whose outputs are the logits, of a network that `build` gives; None for others."""
    if type(network) is WideResNet:  # a class derived from ours may do anything with its layers
        return network.linear
    return network.fc if type(network) in (CifarResNet, ResNet) else None  # type: ignore[return-value]


class Classifier(nn.Module):
    """A network behind its pixel normalisation: images (B, C, H, W) in [0, 1] -> logits (B, K).

    Perturbing and clipping happen in [0, 1]; every network, whoever trained it, brings its own mean and std.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, network: nn.Module, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer(
            "pixel_mean", torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1), persistent=False
        )
        self.register_buffer("pixel_std", torch.tensor(pixel_std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def around(self, network: nn.Module) -> Classifier:
        """Put the same normalisation in front of another network, on the same device and in the same mode."""
        mean, std = self.pixel_mean.flatten().tolist(), self.pixel_std.flatten().tolist()
        return Classifier(network, mean, std).to(self.pixel_mean.device).train(self.training)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network((x_BCHW - self.pixel_mean) / self.pixel_std)

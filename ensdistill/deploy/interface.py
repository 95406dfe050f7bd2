"""What an exported file takes and gives, as a module and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ensdistill.formats.ours import NetworkInfo
from ensdistill.models import Classifier
from ensdistill.run.metrics import EPSILON

Takes = Literal["float", "uint8", "normalised"]
Gives = Literal["probabilities", "logits"]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The images that a file takes, and what it gives for them."""

    takes: Takes
    """`float`: values in [0, 1]; `uint8`: values from 0 to 255; `normalised`: less the mean, divided by the std."""
    gives: Gives
    """`probabilities`: with the temperature, where the network has one; `logits`."""
    info: NetworkInfo
    """The network's description."""

    @property
    def input_in_words(self) -> str:
        """Type, shape and range of the images."""
        H, W, C = self.info.image_shape
        shape = f"(batch, {C}, {H}, {W})"
        if self.takes == "uint8":
            return f"uint8 {shape} from 0 to 255"
        if self.takes == "float":
            return f"float32 {shape} in [0, 1]"
        mean, std = list(self.info.pixel_mean), list(self.info.pixel_std)
        return f"float32 {shape}, normalised: (x - {mean}) / {std} of x in [0, 1]"

    @property
    def output_in_words(self) -> str:
        """Type, shape and meaning of what comes out."""
        shape, T = f"float32 (batch, {self.info.num_classes})", self.info.temperature
        if self.gives == "probabilities":
            return f"probabilities {shape}, " + (
                "not calibrated: no temperature is known" if T is None else f"calibrated at temperature {T:.4g}"
            )
        if T is None:
            return f"logits {shape}; probabilities are softmax(logits), no temperature is known"
        return f"logits {shape}; calibrated probabilities are softmax(log(softmax(logits) + {EPSILON}) / {T})"

    def images(self, images_BCHW: Tensor) -> Tensor:
        """Turn uint8 images (B, C, H, W) into what the file takes."""
        if self.takes == "uint8":
            return images_BCHW
        x_BCHW = images_BCHW.to(torch.float32) / 255
        if self.takes == "float":
            return x_BCHW
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.info.pixel_mean, self.info.pixel_std))
        return (x_BCHW - mean) / std


class Deployed(nn.Module):
    """A classifier as an exported graph computes it: images of its interface -> probabilities or logits (B, K)."""

    def __init__(self, classifier: Classifier, interface: Interface) -> None:
        super().__init__()
        self.classifier = classifier
        self.takes, self.gives, self.temperature = interface.takes, interface.gives, interface.info.temperature

    def forward(self, images: Tensor) -> Tensor:
        if self.takes == "uint8":
            images = images.to(torch.float32) / 255
        logits = self.classifier.network(images) if self.takes == "normalised" else self.classifier(images)
        if self.gives == "logits":
            return logits
        probs = logits.softmax(dim=-1)
        if self.temperature is None:
            return probs
        return ((probs + EPSILON).log() / self.temperature).softmax(dim=-1)

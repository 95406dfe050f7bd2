"""Several networks as one module: members that predict together, and the frozen teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ensdistill.models import Classifier


class MemberNetworks(nn.Module):
    """Plain networks that predict together: normalised images (B, C, H, W) -> log of the mean probabilities (B, K).

    These are logits like any others: their softmax is the ensemble's prediction.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        log_probs_MBK = torch.stack([member(x_BCHW).float().log_softmax(dim=-1) for member in self.members])
        return log_probs_MBK.logsumexp(dim=0) - math.log(len(self.members))


class Teachers(nn.Module):
    """Ensemble of E frozen classifiers, always in evaluation mode: images (B, C, H, W) in [0, 1] -> logits (E, B, K).

    Each brings its own normalisation and may have its own architecture. `train()` does not switch them.
    """

    def __init__(self, classifiers: Sequence[Classifier], num_classes: int) -> None:
        """Freezes the given classifiers themselves, not copies of them."""
        super().__init__()
        assert len(classifiers) > 0, "no teachers"
        self.E = len(classifiers)
        self.num_classes = num_classes
        self.classifiers = nn.ModuleList(classifiers)
        self.requires_grad_(False)
        self.classifiers.eval()
        self.training = False

    def train(self, mode: bool = True) -> Self:
        return self

    def member(self, m: int, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of teacher `m`."""
        return self.classifiers[m](x_BCHW)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.stack([classifier(x_BCHW) for classifier in self.classifiers])

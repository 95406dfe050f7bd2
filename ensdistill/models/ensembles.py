"""Several networks as one module: members that predict together, the frozen teachers, one code with others' tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

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


def call_with(module: nn.Module, own: dict[str, Tensor], /, *args: Any, **options: Any) -> Tensor:
    """Call `module` with the tensors `own`, named as in `slots`, in the place of those that it has.

    Each place is filled by itself: left to tie them, PyTorch leaves a module that stands in two places with tensors of
    the call.
    """
    result: Tensor = functional_call(module, own, args, options, tie_weights=False)
    return result


def slots(module: nn.Module) -> dict[str, Tensor]:
    """Every place of a parameter or buffer by name: a tensor of two modules twice, a module that has two names once."""
    return {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, child in module.named_modules()
        for name, tensor in (child._parameters | child._buffers).items()
        if tensor is not None
    }

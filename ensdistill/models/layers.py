"""The layers that differ from PyTorch's, and the official initialisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the *biased* variance in the running statistics too, as the official code has it.

    PyTorch keeps the unbiased one, which differs by n / (n − 1), n = rows x pixels.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training or not self.track_running_stats:
            return super().forward(x_BCHW)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # Momentum 1 writes this batch's own statistics, which then enter the running ones with the right variance.
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y = F.batch_norm(x_BCHW, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
        n = x_BCHW.numel() // x_BCHW.shape[1]
        biased = variance * ((n - 1) / n)  # not in place: autograd keeps both
        if self.momentum is None:  # cumulative average: torch.optim.swa_utils.update_bn asks for it
            share = self.num_batches_tracked.reciprocal()
            self.running_mean.add_((mean - self.running_mean) * share)
            self.running_var.add_((biased - self.running_var) * share)
        else:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(biased, self.momentum)
        return y


class GlobalAveragePool(nn.Module):
    """(B, C, H, W) -> (B, C)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean(dim=(2, 3))


# The standard deviation of a standard normal truncated at ±2.
_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def initialise_(module: nn.Module, seed: int) -> None:
    """Draw conv and linear weights He-normal (fan-in) from a normal truncated at 2σ, rescaled to std √(2 / fan_in).

    Biases 0; norms 1 and 0. PyTorch's own default is 2.4 x smaller and trains to other numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = math.sqrt(2 / layer.weight[0].numel()) / _TRUNCATED_STD
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()

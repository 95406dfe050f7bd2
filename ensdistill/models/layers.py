"""Layers that differ from PyTorch's, and the official initialisation."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdistill.runtime.ranks import ALONE


class NormGroup(Protocol):
    """Those who normalise their rows together, each with as many: processes (`Ranks`), or threads of one."""

    @property
    def size(self) -> int:
        """Number of those who have rows."""

    @property
    def tracks(self) -> bool:
        """True for who writes the running statistics."""

    @property
    def is_precise(self) -> bool:
        """True: sums in two passes, ten times as long on a CPU; else as exact as those of one process."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Everyone's `tensor`, (size, …), in order."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the sum of everyone's."""


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the *biased* variance in the running statistics too, as the official code has it.

    PyTorch keeps the unbiased one, which differs by n / (n − 1), n = rows x pixels.
    """

    ranks: NormGroup = ALONE
    """Those whose rows are normalised together in training (see `synced_norm.synchronise_norms`)."""
    unbiased = False
    """True where the running variance is that of n − 1."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training or (not self.track_running_stats and self.ranks.size == 1):
            return super().forward(x_BCHW)
        n = x_BCHW.numel() // x_BCHW.shape[1] * self.ranks.size
        if self.ranks.size > 1:
            y, mean, biased = _NormaliseTogether.apply(x_BCHW, self.weight, self.bias, self.eps, self.ranks)
        else:
            assert self.running_mean is not None and self.running_var is not None
            # Momentum 1 writes this batch's own statistics, which then enter the running ones with the right variance.
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            y = F.batch_norm(x_BCHW, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps)
            biased = variance * ((n - 1) / n)  # not in place: autograd keeps both
        if self.track_running_stats and self.ranks.tracks:
            self._track(mean, biased * (n / (n - 1)) if self.unbiased else biased)
        return y

    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # cumulative average: torch.optim.swa_utils.update_bn asks for it
            share = self.num_batches_tracked.reciprocal()
            self.running_mean.add_((mean_C - self.running_mean) * share)
            self.running_var.add_((variance_C - self.running_var) * share)
        else:
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance_C.to(self.running_var.dtype), self.momentum)


class UnbiasedBatchNorm2d(BatchNorm2d):
    """Statistics as `nn.BatchNorm2d` keeps them, for other people's networks that several ranks normalise together."""

    unbiased = True


class _NormaliseTogether(torch.autograd.Function):
    """Normalise by the statistics of all ranks' rows, of which each has as many: (y, mean, biased variance).

    dγ and dβ are of this rank's rows, as is every other gradient: their mean over ranks is that of the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: NormGroup) -> Any:
        own_mean, own_variance = _mean_and_variance(x, precise=ranks.is_precise)
        # each rank's mean and variance, as sums of squares would cancel
        mean_RC, variance_RC = ranks.gather(torch.stack((own_mean, own_variance))).unbind(1)
        mean = mean_RC.mean(0)
        variance = (variance_RC + (mean_RC - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.ranks = eps, ranks
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, variance = ctx.saved_tensors
        # with the statistics held constant; what reaches x through them comes on top
        dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, variance, None, None, False, ctx.eps, [True] * 3
        )
        n = x.numel() // x.shape[1] * ctx.ranks.size
        mean_dgamma, mean_dbeta = (ctx.ranks.sum_(torch.stack((dgamma, dbeta))) / n).unbind(0)
        rstd = (variance + ctx.eps).rsqrt()
        scale = rstd if weight is None else weight * rstd
        c1 = -scale * rstd * mean_dgamma
        c2 = -scale * mean_dbeta - c1 * mean
        if ctx.ranks.is_precise:
            dx.add_(torch.addcmul(c2[:, None, None], c1[:, None, None], x))
        else:  # by the one operation that reads channels in every layout at the speed of memory
            zeros, ones = torch.zeros_like(mean), torch.ones_like(mean)
            dx.add_(F.batch_norm(x, zeros, ones, c1, c2, training=False, eps=0.0))
        return dx, None if weight is None else dgamma, None if weight is None else dbeta, None, None


def _mean_and_variance(x_BCHW: Tensor, *, precise: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,), in fp32 at least."""
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    if not precise and x_BCHW.device.type == "cpu":
        running = x_BCHW.new_zeros(2, x_BCHW.shape[1], dtype=wide)
        return torch.ops.aten.batch_norm_update_stats(x_BCHW, running[0], running[1], 1.0)
    variance, mean = torch.var_mean(x_BCHW.to(wide), (0, 2, 3), correction=0)
    return mean, variance


class GlobalAveragePool(nn.Module):
    """Mean over all pixels: (B, C, H, W) -> (B, C)."""

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

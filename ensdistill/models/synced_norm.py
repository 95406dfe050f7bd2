"""BatchNorm's statistics where several processes train one network: taken together, averaged, or stored apart.

Without `synchronise_norms` each process normalises its own rows, as the official code does on several devices, and has
running statistics of its own; evaluation uses their mean (`averaged_statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ensdistill.models.layers import BatchNorm2d, NormGroup, UnbiasedBatchNorm2d
from ensdistill.runtime.errors import UserError
from ensdistill.runtime.ranks import Ranks


def synchronise_norms(network: nn.Module, ranks: NormGroup) -> None:
    """Let every norm of `network` take its training statistics of all ranks' rows, in place; names of tensors stay.

    Each rank must have as many rows. With `ALONE` the norms are what they were before: what one rank alone runs in
    training mode, such as a copy whose statistics are measured anew, needs that.

    Raises:
        UserError: a norm keeps statistics of the batch in a way that is not known here.
    """
    norms = []
    for name, module in network.named_modules():
        if type(module) in (nn.BatchNorm2d, UnbiasedBatchNorm2d, BatchNorm2d):
            norms.append(module)
        elif isinstance(module, _BatchNorm) or _own_statistics(module):
            raise UserError(
                f"--sync-bn: {type(module).__name__} '{name}' keeps statistics of the batch in a way that cannot be "
                "synchronised; expected nn.BatchNorm2d; replace it, or train without --sync-bn"
            )
    for norm in norms:
        alone = isinstance(ranks, Ranks) and ranks.size == 1
        if type(norm) is nn.BatchNorm2d and not alone:
            cast(Any, norm).__class__ = UnbiasedBatchNorm2d
        elif type(norm) is UnbiasedBatchNorm2d and alone:
            del norm.ranks
            cast(Any, norm).__class__ = nn.BatchNorm2d
        if isinstance(norm, BatchNorm2d):
            norm.ranks = ranks


@contextmanager
def averaged_statistics(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Let every running mean and variance of `network` be the mean over ranks; afterwards each rank has its own."""
    tensors = list(_statistics(network).values()) if ranks.size > 1 else []
    own = [tensor.clone() for tensor in tensors]
    ranks.average_(tensors)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, own, strict=True):
                tensor.copy_(before)


def gather_statistics(network: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Gather every rank's running means and variances by name, each (ranks, C) on the CPU, for a checkpoint."""
    return {name: ranks.gather(tensor).cpu() for name, tensor in _statistics(network).items()}


def scatter_statistics(network: nn.Module, statistics: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Give this rank its own of the gathered `statistics`; nothing communicates.

    Raises:
        UserError: they are of another number of processes.
        ValueError: they are of another network.
    """
    tensors = _statistics(network)
    expected = {name: (ranks.size, *tensor.shape) for name, tensor in tensors.items()}
    found = {name: tuple(tensor.shape) for name, tensor in statistics.items()}
    sizes = {shape[0] for shape in found.values()}
    if len(sizes) == 1 and sizes != {ranks.size}:
        raise UserError(
            f"written by {max(sizes)} processes, each with running statistics of its own, and resumed by "
            f"{ranks.size}; start as many as before"
        )
    if found != expected:
        names = sorted(dict(found.items() ^ expected.items()))
        raise ValueError(f"running statistics: {', '.join(names[:3])} are not those of this network")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(statistics[name][ranks.rank])


def _statistics(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}".lstrip("."): tensor
        for prefix, module in network.named_modules()
        for name, tensor in _own_statistics(module).items()
    }


def _own_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Find the running statistics that `module` itself holds."""
    buffers = module.named_buffers(recurse=False)
    return {name: tensor for name, tensor in buffers if name in ("running_mean", "running_var")}

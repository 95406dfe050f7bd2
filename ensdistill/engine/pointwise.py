"""Everything of a network's passes that is no convolution, by our kernels or by PyTorch.

The two classes have the same methods: weights of members, norms, pools. The library's are the kernels' definitions; on
a GPU their chains of element-wise work are compiled, which is what the convolutions' library path gets too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ensdistill.kernels.norm import fused as norm_fused
from ensdistill.kernels.norm import pool, pool_gradient
from ensdistill.kernels.norm import statistics as norm
from ensdistill.kernels.operation import Operation, P, R
from ensdistill.kernels.weights import gradient as weights_gradient
from ensdistill.kernels.weights import member_weights as weights

_LATER_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6)
FOLDS = os.environ.get("ENSDISTILL_FOLDED_NORMS", "0" if _LATER_TRITON else "1") != "0"
"""Whether our kernels apply norms where the next convolution loads its tile, as far as nothing was measured.

It saves a pass over the activations, and costs some four instructions a value and tap in forward and weight gradient.
Not by default after Triton 3.6: 3.8 spills up to 72 bytes a thread of the row kernels that do, on 9.0.
"""


class KernelPointwise:
    """Our kernels."""

    kernel = True
    """What `use_kernel` gets for the work on images and logits."""
    member_weights = staticmethod(weights.member_weights)
    member_weights_gradient = staticmethod(weights_gradient.member_weights_gradient)
    batch_norm_statistics = staticmethod(norm.batch_norm_statistics)
    batch_norm = staticmethod(norm_fused.batch_norm)
    batch_norm_backward = staticmethod(norm_fused.batch_norm_backward)
    global_pool = staticmethod(pool.global_pool)
    global_pool_gradient = staticmethod(pool_gradient.global_pool_gradient)

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """The kernel of `operation`."""
        return operation.kernel

    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Any], device: torch.device, /) -> bool:
        """Wherever it can be, by the bytes: see `FOLDS`."""
        return FOLDS

    def folds_second(self, kept: Sequence[Any], folded: Sequence[Any], device: torch.device, /) -> bool:
        """Wherever it can be, by the bytes: see `FOLDS`."""
        return FOLDS


class LibraryPointwise:
    """The definitions."""

    kernel = False
    """See `KernelPointwise`."""
    member_weights = staticmethod(weights.member_weights.library)
    member_weights_gradient = staticmethod(weights_gradient.member_weights_gradient.library)
    batch_norm_statistics = staticmethod(norm.batch_norm_statistics.library)
    batch_norm = staticmethod(norm_fused.batch_norm.library)
    batch_norm_backward = staticmethod(norm_fused.batch_norm_backward.library)
    global_pool = staticmethod(pool.global_pool.library)
    global_pool_gradient = staticmethod(pool_gradient.global_pool_gradient.library)

    def __call__(self, operation: Operation[P, R], /) -> Callable[P, R]:
        """The library's form of `operation`."""
        return operation.library

    def folds_norm(self, y_MBHWC: Tensor, readers: Sequence[Any], device: torch.device, /) -> bool:
        """Not here: a library's convolution has no prologue."""
        return False

    def folds_second(self, kept: Sequence[Any], folded: Sequence[Any], device: torch.device, /) -> bool:
        """Not here either."""
        return False

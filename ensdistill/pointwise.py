"""Everything of a network's passes that is no convolution, by our kernels or by PyTorch.

The two classes have the same methods: weights of members, norms, pools. The library's are the kernels' definitions; on a
GPU their chains of element-wise work are compiled, which is what the convolutions' library path gets too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ensdistill.kernels import batch_norm as norm
from ensdistill.kernels import batch_norm_apply as norm_apply
from ensdistill.kernels import batch_norm_gradient as norm_gradient
from ensdistill.kernels import member_weights as weights
from ensdistill.kernels import pool, pool_gradient


class KernelPointwise:
    """Our kernels."""

    kernel = True
    """What `use_kernel` gets for the work on images and logits."""
    member_weights = staticmethod(weights.member_weights)
    member_weights_into = staticmethod(weights.member_weights_into)
    member_weights_gradient = staticmethod(weights.member_weights_gradient)
    batch_norm_statistics = staticmethod(norm.batch_norm_statistics)
    batch_norm_apply = staticmethod(norm_apply.batch_norm_apply)
    batch_norm_coefficients = staticmethod(norm_gradient.batch_norm_coefficients)
    batch_norm_input_gradient = staticmethod(norm_gradient.batch_norm_input_gradient)
    global_pool = staticmethod(pool.global_pool)
    global_pool_gradient = staticmethod(pool_gradient.global_pool_gradient)


def compiled_on_gpu(definition: Callable[..., Any]) -> Callable[..., Any]:
    """`definition`, compiled at its first call with tensors on a GPU; as it is on a CPU."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(definition, dynamic=False)

    @functools.wraps(definition)
    def run(first: Tensor, *args: Any, **options: Any) -> Any:
        return (compiled() if first.is_cuda else definition)(first, *args, **options)

    return run


class LibraryPointwise:
    """The definitions."""

    kernel = False
    """See `KernelPointwise`."""
    member_weights = staticmethod(compiled_on_gpu(weights.member_weights_ref))
    member_weights_gradient = staticmethod(compiled_on_gpu(weights.member_weights_gradient_ref))
    batch_norm_statistics = staticmethod(norm.batch_norm_statistics_ref)
    batch_norm_apply = staticmethod(compiled_on_gpu(norm_apply.batch_norm_apply_ref))
    batch_norm_coefficients = staticmethod(norm_gradient.batch_norm_coefficients_ref)
    batch_norm_input_gradient = staticmethod(compiled_on_gpu(norm_gradient.batch_norm_input_gradient_ref))
    global_pool = staticmethod(compiled_on_gpu(pool.global_pool_ref))
    global_pool_gradient = staticmethod(compiled_on_gpu(pool_gradient.global_pool_gradient_ref))

    @classmethod
    def member_weights_into(
        cls, out_EKKIO: Tensor, weight: Tensor, r_E_CI: Tensor | None = None, s_E_CO: Tensor | None = None
    ) -> None:
        """W ∘ r sᵀ into a slice of other members' weights."""
        out_EKKIO.copy_(cls.member_weights(weight, r_E_CI, s_E_CO, E=len(out_EKKIO), dtype=out_EKKIO.dtype))

"""The perturbation: one step of fixed length along an image gradient, inside [0, 1].

    x'_i = clip(x_i + scale_i · (√D / 255) · g_i / ‖g_i‖₂, 0, 1)        D = C·H·W, the norm per image

x, g (B, …) -> x' (B, …). Reads x and g, writes x': 3 passes over the images. A zero gradient leaves its image as it is
(the official code divides 0 by 0 there). Source: Nam et al. 2022, section 3.2; `scale` is the confidence of ConfODS
(Nam et al. 2021) and absent elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def perturb_ref(x: Tensor, g: Tensor, scale_B: Tensor | None = None) -> Tensor:
    """The definition. The norm is taken of g / max|g|: the square of a small float32 gradient underflows."""
    dims = tuple(range(1, x.ndim))
    g = g.to(x.dtype)
    largest = g.abs().amax(dims, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    g = g / largest.clamp_min(tiny)
    length = math.sqrt(x[0].numel()) / 255
    step = length * g / torch.linalg.vector_norm(g, dim=dims, keepdim=True).clamp_min(tiny)
    if scale_B is not None:
        step = step * scale_B.to(x.dtype).view(-1, *[1] * len(dims))
    return (x + step).clamp(0, 1)


def perturb(x: Tensor, g: Tensor, scale_B: Tensor | None = None) -> Tensor:
    """Step from `x` along `g`; see the module's docstring.

    Args:
        x: images (B, …) in [0, 1].
        g: gradient, shape of `x`; any scale.
        scale_B: factor of each image's step, or None for 1.

    Raises:
        ValueError: shapes differ.
    """
    if x.shape != g.shape:
        raise ValueError(f"g: expected the shape of x, {tuple(x.shape)}, got {tuple(g.shape)}")
    if scale_B is not None and scale_B.shape != x.shape[:1]:
        raise ValueError(f"scale_B: expected shape {tuple(x.shape[:1])}, got {tuple(scale_B.shape)}")
    return perturb_ref(x, g, scale_B)

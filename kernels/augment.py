"""Augmentation: uint8 images -> zero-padded random crop, random flip, [0, 1].

    y[i, h, w] = x[i, h + dy_i, w' + dx_i] / 255   where that pixel exists, else 0;   w' = W − 1 − w if flip_i else w
    dy_i, dx_i in {−P, …, P}, flip_i in {0, 1}: Philox words 0, 1, 2 of (seed, row_i, step, STREAM_CROP_FLIP)

x (B, H, W, C) uint8 -> y (B, H, W, C) float32. Reads B·H·W·C bytes and writes four times as many; no arithmetic to
speak of. `row` is the image's row in the *global* batch, so that splitting a batch over devices changes no crop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensdistill.kernels.philox import STREAM_CROP_FLIP, below, philox


def augment_ref(x_BHWC: Tensor, *, seed: int, step: int, first_row: int = 0, pad: int = 4, flip: bool = True) -> Tensor:
    """The definition: crop after padding by `pad` zeros a side, flip with probability ½ (if `flip`), scale to [0, 1].

    Returns: (B, H, W, C) float32. With pad 0 and no flip it is the conversion alone.
    """
    B, H, W, _ = x_BHWC.shape
    if pad == 0 and not flip:
        return x_BHWC.to(torch.float32) / 255
    device = x_BHWC.device
    rows = torch.arange(first_row, first_row + B, device=device)
    word_y, word_x, word_flip, _ = philox(seed, rows, step, STREAM_CROP_FLIP)
    dy_B, dx_B = below(word_y, 2 * pad + 1) - pad, below(word_x, 2 * pad + 1) - pad
    h_BH = torch.arange(H, device=device) + dy_B[:, None]
    w_W = torch.arange(W, device=device).expand(B, W)
    if flip:
        w_W = torch.where((word_flip >> 31).bool()[:, None], w_W.flip(1), w_W)
    w_BW = w_W + dx_B[:, None]
    inside_BHW = ((h_BH >= 0) & (h_BH < H))[:, :, None] & ((w_BW >= 0) & (w_BW < W))[:, None, :]
    i_B = torch.arange(B, device=device)
    y_BHWC = x_BHWC[i_B[:, None, None], h_BH.clamp(0, H - 1)[:, :, None], w_BW.clamp(0, W - 1)[:, None, :]]
    return torch.where(inside_BHW[..., None], y_BHWC, y_BHWC.new_zeros(())).to(torch.float32) / 255


def augment(x_BHWC: Tensor, *, seed: int, step: int, first_row: int = 0, pad: int = 4, flip: bool = True) -> Tensor:
    """Augment a batch; see `augment_ref`.

    Raises:
        ValueError: `x_BHWC` is not a uint8 tensor of four dimensions, or `pad` is negative or not below H and W.
    """
    if x_BHWC.dtype != torch.uint8 or x_BHWC.ndim != 4:
        raise ValueError(f"x_BHWC: expected a uint8 tensor (B, H, W, C), got {x_BHWC.dtype} {tuple(x_BHWC.shape)}")
    if not 0 <= pad < min(x_BHWC.shape[1:3]):
        raise ValueError(
            f"pad: expected 0 ≤ pad < {min(x_BHWC.shape[1:3])} for images {tuple(x_BHWC.shape[1:3])}, got {pad}"
        )
    return augment_ref(x_BHWC, seed=seed, step=step, first_row=first_row, pad=pad, flip=flip)

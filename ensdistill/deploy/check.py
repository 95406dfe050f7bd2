"""The comparison that every exported file passes before it gets its name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensdistill.deploy.interface import Interface
from ensdistill.models import Classifier
from ensdistill.run.metrics import probabilities
from ensdistill.run.predict import batch_logits
from ensdistill.runtime.errors import UserError

BATCH_SIZES = (1, 2, 5)
"""Images of the batches that are compared; no graph was recorded with the first and the last."""
TOLERANCE = 1e-4
"""Largest difference of a probability between the file and its network."""


def check(where: str, run: Callable[[Tensor], Tensor], classifier: Classifier, interface: Interface) -> float:
    """Compare what an exported file computes with its network in float32; return the largest |Δp|.

    Args:
        where: the file, for messages.
        run: images of the interface -> what the file gives for them.

    Raises:
        UserError: it cannot be run, gives another shape, or probabilities that differ by more than `TOLERANCE`.
    """
    worst = 0.0
    for step, B in enumerate(BATCH_SIZES):
        images_BCHW = _images(B, interface)
        logits_B1K = batch_logits(
            classifier, images_BCHW.permute(0, 2, 3, 1), step, device=torch.device("cpu"), precision="fp32"
        )
        temperature = interface.info.temperature if interface.gives == "probabilities" else None
        expected_BK = probabilities(logits_B1K, temperature)
        try:
            with torch.inference_mode():
                found_BK = run(interface.images(images_BCHW)).double()
        except Exception as error:  # another runtime's: the message is what there is to know
            raise UserError(
                f"{where}: the exported file cannot be run on {B} images ({_first_line(error)}); nothing was written"
            ) from error
        if found_BK.shape != expected_BK.shape:
            raise UserError(
                f"{where}: the exported file gives {tuple(found_BK.shape)} for {B} images, the network "
                f"{tuple(expected_BK.shape)}; nothing was written"
            )
        if interface.gives == "logits":
            found_BK = found_BK.softmax(dim=-1)
        delta = (found_BK - expected_BK).abs().max().item()
        if not delta <= TOLERANCE:  # not a number, either
            raise UserError(
                f"{where}: the exported file's probabilities differ from the network's by {delta:.2g} on {B} images, "
                f"expected at most {TOLERANCE:g}; nothing was written: the network does something else when it is "
                "exported"
            )
        worst = max(worst, delta)
    return worst


def _images(B: int, interface: Interface) -> Tensor:
    """Make uint8 images (B, C, H, W) of noise around a grey, of contrasts from little to all there is."""
    H, W, C = interface.info.image_shape
    generator = torch.Generator().manual_seed(B)
    contrast_B = torch.linspace(1, 0.1, B).view(-1, 1, 1, 1)
    grey_B = torch.rand(B, 1, 1, 1, generator=generator)
    noise_BCHW = torch.rand(B, C, H, W, generator=generator)
    return (255 * (grey_B + contrast_B * (noise_BCHW - grey_B))).round().to(torch.uint8)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"

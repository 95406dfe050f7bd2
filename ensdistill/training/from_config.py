"""Networks and steps as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from ensdistill.config.configs import Config, Training
from ensdistill.config.methods import Method
from ensdistill.formats.pytorch import build_foreign
from ensdistill.models import Classifier, build
from ensdistill.training.step import StepConfig


def make_classifier(
    config: Config,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    seed: int = 0,
) -> Classifier:
    """A fresh network of `config`, teacher or student, behind its normalisation.

    Args:
        image_shape: (H, W, C).
        pixel_mean, pixel_std: by channel, of images in [0, 1]; by default 0.5 and 0.25, where values do not matter.
    """
    H, _, C = image_shape
    if config.builder is not None:
        network = build_foreign(config.builder, config.builder_arguments(), seed)
    else:
        network = build(config.network, num_classes=num_classes, in_channels=C, image_size=H, seed=seed)
    return Classifier(network, pixel_mean or [0.5] * C, pixel_std or [0.25] * C)


def step_config(config: Config, method: Method, training: Training, seed: int) -> StepConfig:
    """The step of one training of `config`; `seed` is the key of its draws."""
    return StepConfig(
        method=method,
        seed=seed,
        tau=config.tau,
        alpha=config.alpha,
        weight_decay=training.weight_decay,
        pad=config.pad if config.crop == "pad" else 0,
        flip=config.flip,
    )

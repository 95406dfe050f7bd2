"""Networks, states and steps as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from ensdistill.config.configs import Config, Training
from ensdistill.config.methods import Method
from ensdistill.config.updates import Updates
from ensdistill.engine.networks import Networks
from ensdistill.formats.pytorch import build_foreign
from ensdistill.models import Classifier, build
from ensdistill.runtime.ranks import ALONE, Ranks
from ensdistill.training.averaging import Ema, Swa
from ensdistill.training.optimizer import make_optimizer
from ensdistill.training.step import State, StepConfig


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


def make_state(
    networks: Networks, updates: Updates, *, weight_decay: float, factor_rate: float = 1.0, ranks: Ranks = ALONE
) -> State:
    """The state in which a training of `networks` begins."""
    student = networks.student
    return State(
        networks=networks,
        optimizer=make_optimizer(student, weight_decay, factor_rate, updates.optimizer),
        ranks=ranks,
        ema=None if updates.ema is None else Ema(student, updates.ema),
        swa=None if updates.swa is None else Swa(student, updates.swa),
    )


def step_config(config: Config, method: Method, training: Training, seed: int) -> StepConfig:
    """The step of one training of `config`; `seed` is the key of its draws."""
    return StepConfig(
        method=method,
        seed=seed,
        tau=config.tau,
        alpha=config.alpha,
        weight_decay=training.weight_decay if config.optimizer == "sgd" else 0.0,
        pad=config.pad if config.crop == "pad" else 0,
        flip=config.flip,
    )

"""Sizes of data sets: counted where the data are at hand, else as published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ensdistill.config.configs import Config
from ensdistill.data.prepare import many_sizes, shown_shape
from ensdistill.data.sources.registry import open_source
from ensdistill.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Sizes of a data set."""

    num_classes: int
    """Number of classes K."""
    image_shape: tuple[int, int, int]
    """(H, W, C) that the networks see."""
    num_train: int
    """Number of training images."""
    num_valid: int
    """Number of validation images."""
    num_test: int
    """Number of test images."""

    @property
    def num_images(self) -> int:
        """Number of images of all splits."""
        return self.num_train + self.num_valid + self.num_test


def _sizes(num_classes: int, image_shape: tuple[int, int, int], train: int, valid: int, test: int) -> DataSize:
    return DataSize(num_classes=num_classes, image_shape=image_shape, num_train=train, num_valid=valid, num_test=test)


PUBLISHED = {
    "digits": _sizes(10, (8, 8, 1), 400, 397, 1_000),
    "fashion-mnist": _sizes(10, (28, 28, 1), 55_000, 5_000, 10_000),
    "cifar10": _sizes(10, (32, 32, 3), 45_000, 5_000, 10_000),
    "cifar100": _sizes(100, (32, 32, 3), 45_000, 5_000, 10_000),
    "tiny-imagenet": _sizes(200, (64, 64, 3), 90_000, 10_000, 10_000),
    "imagenet": _sizes(1000, (224, 224, 3), 1_231_167, 50_000, 50_000),
}
"""Sizes of the sources that recipes name, with the splits that data/ makes: they serve where the data are not there."""


def published_size(source: str) -> DataSize:
    """The size of the data set that recipes call `source`.

    Raises:
        UserError: it is not known.
    """
    if source not in PUBLISHED:
        raise UserError(f"source {source}: its shape is not known; expected one of {', '.join(PUBLISHED)}")
    return PUBLISHED[source]


def data_size(config: Config, say: Callable[[str], None]) -> DataSize:
    """The size of what a run of `config` reads; nothing is written.

    Args:
        say: told where the data are not at hand and their published sizes are taken.

    Raises:
        UserError: the data are not at hand and their size is not known, or a run would refuse them.
    """
    if config.image_size is None and config.crop == "random-resized":
        raise many_sizes(config.source)
    found = _full_size(config, say)
    if config.train_images is None:
        return found
    if config.train_images > found.num_train:
        raise UserError(f"train-images: got {config.train_images}, but there are {found.num_train}; give fewer")
    return replace(found, num_train=config.train_images)


def _full_size(config: Config, say: Callable[[str], None]) -> DataSize:
    side = config.image_size
    try:
        source = open_source(config.source, config.data)
        splits = source.splits
    except UserError:
        if config.data is not None or config.source not in PUBLISHED:
            raise
        say(f"{config.source}: not at hand, planned with its published size")
        published = PUBLISHED[config.source]
        return published if side is None else replace(published, image_shape=(side, side, published.image_shape[2]))
    shape, _ = shown_shape(source, side, one_size=side is None)
    if shape is None or (config.crop != "pad" and side is not None):
        assert side is not None
        shape = (side, side, 3 if shape is None else shape[2])
    train, valid, test = (len(splits[name].labels) for name in ("train", "valid", "test"))
    return _sizes(source.num_classes, shape, train, valid, test)

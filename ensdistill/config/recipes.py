"""The recipes: one function each, whose docstring says data, time, expected accuracy. `RECIPES` finds them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ensdistill.config.configs import Config, Training, read_config
from ensdistill.runtime.errors import UserError, nearest

# A short schedule on a narrow network is not the method's regime. At the official rate, E times the learning rate,
# factors can change sign (|rho| > 1): their member fares well, and the average of the members does not. On digits one
# student in ten collapsed at 1 and one in ten at 1/2, none of 26 at 1/4; on Fashion-MNIST one in four at 1/4 and a
# learning rate of 0.1, none of ten at 0.03.
_STABLE_FACTOR_RATE = 0.25

RECIPES: dict[str, Callable[[], Config]] = {}


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Register a recipe under its function's name, with dashes."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def find_recipe(name: str) -> Config:
    """The configuration of the recipe called `name`, or the one in a file, where `name` is the path of a `config.json`.

    Raises:
        UserError: no recipe has that name, and the nearest one is suggested; or the file is no configuration.
    """
    if name.endswith(".json"):
        return read_config(Path(name))
    if name not in RECIPES:
        raise UserError(
            f"--recipe {name}: no such recipe{nearest(name, RECIPES)}; expected one of {', '.join(RECIPES)}"
        )
    return RECIPES[name]()


def require_named_builder(file: str, builder: str | None, named: Sequence[str | None], option: str) -> None:
    """Check that a builder which a `config.json` names is one that the command line names as well.

    A builder is a function that a run calls. Files are exchanged, and reading one must not run what its writer chose.

    Args:
        file: path of the `config.json`.
        builder: what it names; None where it names none.
        named: what the command line names by `option`.

    Raises:
        UserError: the file alone names it.
    """
    if builder is not None and builder not in named:
        raise UserError(
            f"{file}: names the builder {builder}, a function that is not part of ensdistill; "
            f"give {option} {builder} as well if you trust the file to call it"
        )


def values_of(option: str, arguments: Sequence[str]) -> list[str]:
    """List the values that `arguments` give to `option`."""
    values = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            values.append(value if equals else following)
    return values


@recipe
def digits() -> Config:
    """scikit-learn's digits, 8x8 grey: 400 / 397 / 1,000 images. WRN-10-1. Two minutes on one CPU core.

    Accuracy / NLL, 5 students: kd 96.6 / .166, latentbe 96.8 / .177, latentbe + tdiv-sdiv 96.8 / .177; teachers 96.2 /
    .182 each, their ensemble 97.0 / .148.
    """
    return Config(
        recipe="digits",
        source="digits",
        network="wrn10x1",
        teacher=Training(epochs=80, warmup_epochs=8, batch_size=50),
        student=Training(epochs=120, warmup_epochs=24, batch_size=50),
        factor_rate=_STABLE_FACTOR_RATE,
        pad=1,
        flip=False,
    )


@recipe
def fashion_mnist() -> Config:
    """Fashion-MNIST, 28x28 grey: the first 4,000 / 5,000 / 10,000 images. WRN-10-1. 9 minutes on one CPU core.

    Accuracy / NLL, 5 students: kd 82.6 / .468, latentbe 83.0 / .459, latentbe + tdiv-sdiv 83.1 / .461; teachers 84.6 /
    .426 each, their ensemble 85.3 / .410. `--train-images 55000` and more epochs for the real thing.
    """
    return Config(
        recipe="fashion-mnist",
        source="fashion-mnist",
        train_images=4_000,
        network="wrn10x1",
        teacher=Training(epochs=15, warmup_epochs=2, batch_size=64),
        student=Training(epochs=15, warmup_epochs=3, lr=0.03, batch_size=64),
        factor_rate=_STABLE_FACTOR_RATE,
        pad=2,
    )


@recipe
def cifar10_wrn28x1() -> Config:
    """CIFAR-10, 45,000 / 5,000 / 10,000 at 32x32. WRN-28-1, the official schedule of 200 epochs. Not measured yet.

    Computed floor on an H100: 1.7 minutes a student shown tdiv-sdiv, at a batch of 128.
    """
    return Config(recipe="cifar10-wrn28x1", source="cifar10", network="wrn28x1")


@recipe
def cifar100_wrn28x4() -> Config:
    """CIFAR-100, 45,000 / 5,000 / 10,000 at 32x32. WRN-28-4: the table of Nam et al. 2022, 200 epochs.

    The official code's accuracy / NLL, mean of 4 students: teacher ensemble 81.08 / .715, kd 79.17 / 1.072, latentbe
    79.32 / 1.012, latentbe + tdiv-sdiv 80.09 / .798. Computed floor on an H100: 9.1 minutes a student shown tdiv-sdiv.
    """
    return Config(recipe="cifar100-wrn28x4", source="cifar100", network="wrn28x4")


@recipe
def cifar100_wrn28x10() -> Config:
    """CIFAR-100 as in cifar100-wrn28x4, with WRN-28-10. Not measured yet.

    Computed floor on an H100: 46 minutes a student.
    """
    return Config(recipe="cifar100-wrn28x10", source="cifar100", network="wrn28x10")


@recipe
def tiny_imagenet_resnet18() -> Config:
    """Tiny ImageNet, 90,000 / 10,000 / 10,000 at 64x64, 200 classes. ResNet-18 with a 3x3 stem, 100 epochs.

    Not measured yet.
    """
    training = Training(epochs=100)
    return Config(
        recipe="tiny-imagenet-resnet18",
        source="tiny-imagenet",
        network="resnet18",
        teacher=training,
        student=training,
    )


@recipe
def imagenet_resnet50() -> Config:
    """ImageNet as class folders in train/ and val/, 1,000 classes at 224x224. ResNet-50, 90 epochs. Not measured yet.

    Random-resized crops and flips; the folder's val/ is the test split, validation images are taken off train/.
    """
    training = Training(epochs=90, batch_size=256, weight_decay=1e-4)
    return Config(
        recipe="imagenet-resnet50",
        source="imagenet",
        network="resnet50",
        teacher=training,
        student=training,
        pad=0,
        crop="random-resized",
        image_size=224,
    )

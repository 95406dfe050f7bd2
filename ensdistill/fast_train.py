"""The main job: `python -m ensdistill.fast_train`.

With no arguments the `digits` recipe: writes a .beton, trains four teachers, distils three students, measures
everything and prints one table. `--recipe NAME` chooses another; every field of a recipe can be overridden (`--help`).
Under torchrun several processes share every batch: `torchrun --nproc-per-node 4 -m ensdistill.fast_train …`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from ensdistill.config.configs import Command, Config, Training
from ensdistill.config.recipes import RECIPES, find_recipe, require_named_builder, values_of
from ensdistill.config.updates import RATES
from ensdistill.costs.data_size import data_size
from ensdistill.costs.plan import plan, render
from ensdistill.data.sources.folders import IMAGENET_CLASSES
from ensdistill.data.sources.registry import recognise
from ensdistill.data.sources.walk import class_folders
from ensdistill.run.display import Screen
from ensdistill.run.job import Job
from ensdistill.run.report import report
from ensdistill.run.trainer import in_stages
from ensdistill.runtime.cli import parse_arguments, plain_console
from ensdistill.runtime.environment import choose_device
from ensdistill.runtime.errors import RunFailed, UserError, run_main
from ensdistill.runtime.ranks import from_environment, is_first_process, one_voice
from ensdistill.runtime.stop import Stop, Stopped


def parse(arguments: Sequence[str]) -> Command:
    """The command that `arguments` ask for: a recipe's fields, overridden.

    Raises:
        UserError: an unknown recipe or option, with the nearest name, a value that a field cannot have, or a builder
            that a file alone names.
    """
    name = _recipe_name(arguments)
    recipe = find_recipe(name)
    command = parse_arguments(
        Command,
        "ensdistill.fast_train",
        arguments,
        description=_description(recipe),
        default=Command(config=recipe),
    )
    for option, theirs, asked in (
        ("--network", recipe.builder, command.config.builder),
        ("--teacher-builder", recipe.teacher_builder, command.config.teacher_builder),
    ):
        if asked == theirs:  # no other came in its place
            require_named_builder(name, theirs, values_of(option, arguments), option)
    config = dataclasses.replace(command.config, recipe=recipe.recipe)  # a file's is the one that the file names
    if config.optimizer != recipe.optimizer:  # the recipe's rates are another optimizer's
        teacher, student = (_with_rates(getattr(config, who), config, who, arguments) for who in ("teacher", "student"))
        config = dataclasses.replace(config, teacher=teacher, student=student)
    if config.data is not None and config.data != recipe.data and config.source == recipe.source:
        source = recognise(config.data)
        if source == "folder" and len(class_folders(config.data / "train")) == IMAGENET_CLASSES:
            source = "imagenet"  # such a folder too, with a mean and std that are known
        config = dataclasses.replace(config, source=source)
    return dataclasses.replace(command, config=config)


def _with_rates(training: Training, config: Config, who: str, arguments: Sequence[str]) -> Training:
    """Give `training` the learning rate and weight decay of its optimizer where `arguments` give none."""
    lr, weight_decay = RATES[config.optimizer]
    if values_of(f"--{who}.lr", arguments):
        lr = training.lr
    if values_of(f"--{who}.weight-decay", arguments):
        weight_decay = training.weight_decay
    return dataclasses.replace(training, lr=lr, weight_decay=weight_decay)


def _recipe_name(arguments: Sequence[str]) -> str:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--recipe":
            if not equals and i + 1 == len(arguments):
                raise UserError(f"--recipe: no name given; expected one of {', '.join(RECIPES)}")
            return value if equals else arguments[i + 1]
    return "digits"


def _description(recipe: Config) -> str:
    docs = {name: (make.__doc__ or "").strip().splitlines() for name, make in RECIPES.items()}  # python -OO has none
    summaries = [f"  {name:<24} {lines[0] if lines else ''}" for name, lines in docs.items()]
    lines = [
        Command.__doc__ or "",
        "",
        "Recipes (--recipe NAME):",
        *summaries,
        "",
        f"Defaults below are of '{recipe.recipe}'.",
    ]
    return "\n".join(lines)


@one_voice()
def main() -> int:
    """Run the command, or print its plan."""
    command = parse(sys.argv[1:])
    if command.plan:
        if not is_first_process():  # one plan is enough
            return 0
        screen = Screen()
        screen.console.print(render(plan(command, data_size(command.config, screen.say))))
        return 0
    device = choose_device(command.device)
    options = command.shared_options() | {"--device": device.type}
    with (
        from_environment(device, max_silence=command.max_silence, options=options) as ranks,
        Stop().installed() as stop,
    ):
        screen = Screen() if ranks.is_first else Screen(plain_console(quiet=True, force_terminal=False))
        try:
            in_stages(Job(command, screen, stop, ranks), report)
        except Stopped as stopped:
            screen.say(f"{stopped}; everything up to the last step is kept: go on with --resume")
            return 128 + stopped.signal_number
        except BrokenPipeError as error:
            raise RunFailed("output: its reader has ended, and the run with it; go on with --resume") from error
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))

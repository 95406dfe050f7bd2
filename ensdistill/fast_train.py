"""The main job: `python -m ensdistill.fast_train`.

With no arguments the `digits` recipe: writes a .beton, trains four teachers, distils three students, measures everything
and prints one table. `--recipe NAME` chooses another; every field of a recipe can be overridden (`--help`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import tyro

from ensdistill.config import Command, Config, Training
from ensdistill.data.sources import recognise
from ensdistill.display import Screen
from ensdistill.errors import UserError, nearest, run_main
from ensdistill.job import Job, in_stages
from ensdistill.recipes import RECIPES, find_recipe
from ensdistill.report import report
from ensdistill.stop import Stop, Stopped


def parse(arguments: Sequence[str]) -> Command:
    """The command that `arguments` ask for: a recipe's fields, overridden.

    Raises:
        UserError: an unknown recipe or option, with the nearest name, or a value that a field cannot have.
    """
    recipe = find_recipe(_recipe_name(arguments))
    command, unknown = tyro.cli(
        Command,
        prog="python -m ensdistill.fast_train",
        description=_description(recipe),
        args=list(arguments),
        default=Command(config=recipe),
        return_unknown_args=True,
    )
    if unknown:
        known = list(_options())
        raise UserError(f"{unknown[0]}: no such option{nearest(unknown[0].split('=')[0], known)}; --help lists them")
    config = command.config
    if config.data is not None and config.source == recipe.source:
        source = recognise(config.data)
        if not (source == "folder" and recipe.source == "imagenet"):  # that is one, with a mean and std of its own
            command = dataclasses.replace(command, config=dataclasses.replace(config, source=source))
    return command


def _recipe_name(arguments: Sequence[str]) -> str:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--recipe":
            if not equals and i + 1 == len(arguments):
                raise UserError(f"--recipe: no name given; expected one of {', '.join(RECIPES)}")
            return value if equals else arguments[i + 1]
    return "digits"


def _description(recipe: Config) -> str:
    summaries = [f"  {name:<24} {(make.__doc__ or '').strip().splitlines()[0]}" for name, make in RECIPES.items()]
    lines = [Command.__doc__ or "", "", "Recipes (--recipe NAME):", *summaries, "", f"Defaults below are of '{recipe.recipe}'."]
    return "\n".join(lines)


def _options() -> Iterator[str]:
    for prefix, cls in (("", Command), ("", Config), ("teacher.", Training), ("student.", Training)):
        for field in dataclasses.fields(cls):
            name = prefix + field.name.replace("_", "-")
            yield f"--{name}"
            yield f"--{prefix}no-{name.removeprefix(prefix)}"


def main() -> int:
    """The command."""
    command = parse(sys.argv[1:])
    screen = Screen()
    if command.plan:
        from ensdistill.planning import print_plan

        print_plan(command, screen)
        return 0
    with Stop().installed() as stop:
        try:
            in_stages(Job(command, screen, stop), report)
        except Stopped as stopped:
            screen.say(f"{stopped}; everything up to the last step is kept: go on with --resume")
            return 128 + stopped.signal_number
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))

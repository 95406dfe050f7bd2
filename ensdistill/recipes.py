"""The recipes: one function each, whose docstring says data, time and expected accuracy. `RECIPES` finds them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ensdistill.config import Config, Training
from ensdistill.errors import UserError, nearest

RECIPES: dict[str, Callable[[], Config]] = {}


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Register a recipe under its function's name, with dashes."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def find_recipe(name: str) -> Config:
    """The configuration of the recipe called `name`.

    Raises:
        UserError: no recipe has that name; the nearest one is suggested.
    """
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: no such recipe{nearest(name, RECIPES)}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()

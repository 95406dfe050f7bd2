"""The table's heading names what was used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import array_source

from ensdistill.config.recipes import find_recipe
from ensdistill.data.prepare import prepare
from ensdistill.run.report import experiment_name


@pytest.mark.parametrize(
    ("recipe", "source", "name"),
    [
        ("digits", "digits", "digits"),
        ("digits", "npy", "npy (settings of digits)"),
        ("my-recipe", "npy", "my-recipe"),  # of a config.json: what it says is all that is known
    ],
)
def test_a_recipe_is_not_named_as_the_data(recipe: str, source: str, name: str, tmp_path: Path) -> None:
    config = replace(find_recipe("digits"), recipe=recipe, source=source)
    data = prepare(array_source(name=source), tmp_path)
    assert experiment_name(config, data) == name

"""Recipes: functions that return a Config, with the source of every value.

One module a recipe; each defines RECIPE. To add one, see CONTRIBUTING.md.
"""

import difflib

from pgolf.errors import ConfigError
from pgolf.recipes import demo, pr478, pr531, pr543, pr1473
from pgolf.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE for module in (demo, pr478, pr531, pr543, pr1473)
}


def get(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ConfigError: there is none; the message suggests the nearest.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name.lower(), RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"unknown recipe {name!r}: {hint}there are {', '.join(RECIPES)}")

"""Recipes: named settings, with the source of every value.

Each recipe is a module that defines RECIPE, see `recipe`. To add one, see CONTRIBUTING.md.
"""

import difflib
from dataclasses import fields

from pgolf.config import Config, RunConfig, known_keys
from pgolf.errors import ConfigError
from pgolf.recipes import demo, pr478, pr531, pr543, pr1473
from pgolf.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE for module in (demo, pr478, pr531, pr543, pr1473)
}


# Where and on what a run runs, and what it shows while it does: not what it is.
OF_PLACE = {
    "data.data", "data.tokenizer", "data.micro_tokens", "eval.val_every", "eval.eval_tokens",
    "eval.score_live", *(f"run.{f.name}" for f in fields(RunConfig)),
}  # fmt: skip


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


def changes(config: Config) -> list[tuple[str, str, str]]:
    """The settings in which a configuration differs from its recipe: key, value, the recipe's.

    Values are written as on the command line.
    """
    recipe = get(config.recipe).config(as_published=config.as_published)
    changed = []
    for key, (section, spec) in known_keys().items():
        pair = [getattr(getattr(c, section), spec.name) for c in (config, recipe)]
        if pair[0] != pair[1] and f"{section}.{key}" not in OF_PLACE:
            value, original = (str(v).lower() if isinstance(v, bool) else str(v) for v in pair)
            changed.append((key, value, original))
    return changed


def run_name(config: Config) -> str:
    """The name of a run: its recipe, and the number of settings that differ from it."""
    count = len(changes(config))
    return config.recipe + (f" with {count} setting{'s' * (count > 1)} changed" if count else "")


def title(config: Config) -> str:
    """What a run is, in one line: its recipe's title, or every setting that is another."""
    changed = ", ".join(f"{key}={own}" for key, own, _ in changes(config))
    return f"{run_name(config)}: {changed or get(config.recipe).title}"

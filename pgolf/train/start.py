"""From a recipe's name and settings to a run: what `pgolf train` and `pgolf.train` both do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf.config import PRESETS, Config, environment_overrides, find_key, with_overrides
from pgolf.errors import ConfigError
from pgolf.fields import SWITCH
from pgolf.recipes import get
from pgolf.recipes.recipe import Recipe


def start(name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train, pack, decode and score a recipe; what result.json holds, None on ranks but the first.

    The contest's environment names fill in what `settings` leave open, for a new run.

    Args:
        name: of the recipe.
        settings: key -> value or its text; presets such as as_published may be among them.

    Raises:
        PgolfError: a setting, the data or the run is not what it has to be.
    """
    recipe, settings = get(name), dict(settings)
    presets = {key: _switch(key, settings.pop(key)) for key in PRESETS if key in settings}
    given = {key: find_key(key)[1].name for key in settings}
    environment = {k: v for k, v in environment_overrides().items() if k not in given.values()}
    place = {key: settings[key] for key, field in given.items() if field in ("out", "resume")}
    run_settings = with_overrides(Config(), place).run
    resuming = bool(run_settings.resume and run_settings.out)
    if resuming:
        # What the environment gave is in config.json, unless the command line had it.
        environment = {}
        config = _going_on(recipe, presets, settings, Path(run_settings.out))
    else:
        config = recipe.config({**environment, **settings}, presets.get("as_published", False))
        if presets.get("quick"):
            from pgolf.train.estimate import quick_values

            taken = {*given.values(), *environment}
            left = {k: v for k, v in quick_values(config).items() if k not in taken}
            config = with_overrides(config, left)
    # Checked first: torch takes seconds to load.
    from pgolf.train.run import run

    return run(config, environment, not resuming and "vocab_size" not in given.values())


def _switch(key: str, value: Any) -> bool:
    on = SWITCH.get(str(value).lower())
    if on is None:
        raise ConfigError(f"{key}={value}: expected true or false")
    return on


def _going_on(
    recipe: Recipe, presets: Mapping[str, bool], overrides: Mapping[str, Any], run: Path
) -> Config:
    """The settings of a run that goes on."""
    from pgolf.train.run_folder import resumed_config

    if presets.get("quick"):
        raise ConfigError("quick=true is for a new run: one that goes on keeps its settings")
    return resumed_config(recipe.name, presets.get("as_published"), overrides, run)

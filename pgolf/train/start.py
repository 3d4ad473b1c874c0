"""From a recipe's name and settings to a run: what `pgolf train` and `pgolf.train` both do."""

from collections.abc import Mapping
from typing import Any

from pgolf.config import environment_overrides, find_key
from pgolf.errors import ConfigError
from pgolf.fields import SWITCH
from pgolf.recipes import get


def start(name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train, pack, decode and score a recipe; what result.json holds, None on ranks but the first.

    The contest's environment names fill in what `settings` leave open.

    Args:
        name: of the recipe.
        settings: key -> value or its text; seed_exact may be among them.

    Raises:
        PgolfError: a setting, the data or the run is not what it has to be.
    """
    recipe = get(name)
    settings = dict(settings)
    seed_exact = SWITCH.get(str(settings.pop("seed_exact", "false")).lower())
    if seed_exact is None:
        raise ConfigError("seed_exact: expected true or false")
    given = {find_key(key)[1].name for key in settings}
    environment = {k: v for k, v in environment_overrides().items() if k not in given}
    config = recipe.config({**environment, **settings}, seed_exact)
    # Checked first: torch takes seconds to load.
    from pgolf.train.run import run

    return run(recipe, config, environment)

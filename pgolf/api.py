"""The functions of `import pgolf`: loaded on first use; torch is loaded when they are called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf.config import PRESETS, Config, environment_overrides, find_key, with_overrides
from pgolf.errors import ConfigError, PgolfError
from pgolf.fields import SWITCH
from pgolf.recipes import get
from pgolf.recipes.recipe import Recipe

if TYPE_CHECKING:
    from pgolf.model import GPT


def load_model(
    path: str | os.PathLike[str], device: str = "auto", dtype: str = "auto"
) -> tuple[GPT, dict[str, Any]]:
    """The model that an artifact holds, decoded, and what the artifact says of itself.

    `model(ids, targets)` is the mean loss in nats of ids and targets (N, T) int64, and
    `model.logits(model.features(ids))` are fp32 logits (N, T, V), T at most `meta["seq_len"]`.
    The weights are frozen; `model.requires_grad_(True)` lets them be trained.

    Args:
        path: an artifact, or the run folder that it lies in.
        device: auto, cpu or cuda.
        dtype: of activations and matmuls: auto (bf16 where the hardware has it), bf16 or fp32.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    from pgolf.artifact import load
    from pgolf.device import pick_device, pick_dtype

    path = Path(path)
    picked = pick_device(device)
    file = path / "artifact" if path.is_dir() else path
    return load.load_model(file, picked, pick_dtype(dtype, picked)[0])


def train(recipe: str, /, **settings: Any) -> dict[str, Any] | None:
    """Train a recipe, pack and score it, as the command `pgolf train` does, with its output.

        result = pgolf.train("demo", layers=2, max_tokens=2e5, out="runs/two")

    Args:
        recipe: name of a recipe; `pgolf recipes` lists them.
        settings: what to change, as on the command line; values may be text, numbers, paths.

    Returns:
        What result.json holds: val_bpb, bytes_total and more; with torchrun None on ranks but
        the first.

    Raises:
        PgolfError: the command would end with the same message.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as pgolf.cli does, and why
    return start(recipe, {key: _plain(value) for key, value in settings.items()})


def _plain(value: Any) -> Any:
    """A setting as the configuration takes it: a path as text, a whole 2e6 as an integer."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def start(name: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train, pack, decode and score a recipe; what result.json holds, None on ranks but the first.

    For a new run, the contest's environment variables fill in what `settings` do not give.

    Args:
        name: of the recipe.
        settings: key -> value or its text; presets such as as_published may be among them.

    Raises:
        PgolfError: a setting, the data or the run is not what it has to be.
    """
    try:
        config, environment, any_vocabulary = _settled(get(name), dict(settings))
    except PgolfError as e:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # other ranks may wait for this one
            from pgolf.training.handshake import fail_together

            fail_together(e, _device(settings))
        raise
    # Checked first: torch takes seconds to load.
    from pgolf.submission.script import build_script
    from pgolf.training.run import run

    return run(config, environment, any_vocabulary, build_script)


def _settled(
    recipe: Recipe, settings: dict[str, Any]
) -> tuple[Config, Mapping[str, str], bool]:
    """(configuration, its keys from the environment, whether no vocab_size was given)."""
    presets = {key: switch(key, settings.pop(key)) for key in PRESETS if key in settings}
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
            from pgolf.training.estimate import quick_values

            taken = {*given.values(), *environment}
            left = {k: v for k, v in quick_values(config).items() if k not in taken}
            config = with_overrides(config, left)
    return config, environment, not resuming and "vocab_size" not in given.values()


def _device(settings: Mapping[str, Any]) -> str:
    """The device of a run, as far as settings that may be wrong tell."""
    given = {key.removeprefix("run."): str(value) for key, value in settings.items()}
    if "device" in given or SWITCH.get(given.get("resume", "false").lower()) is not True:
        return given.get("device", "auto")
    from pgolf.training.run_folder import read_config

    try:
        return str(read_config(Path(given.get("out", "")))["run"]["device"])
    except (PgolfError, KeyError, TypeError):
        return "auto"


def switch(key: str, value: Any) -> bool:
    """Whether a preset is on.

    Raises:
        ConfigError: `value` is neither true nor false.
    """
    on = SWITCH.get(str(value).lower())
    if on is None:
        raise ConfigError(f"{key}={value}: expected true or false")
    return on


def _going_on(
    recipe: Recipe, presets: Mapping[str, bool], overrides: Mapping[str, Any], run: Path
) -> Config:
    """The settings of a resumed run."""
    from pgolf.training.run_folder import resumed_config

    if presets.get("quick"):
        raise ConfigError("quick=true is for a new run: a resumed run keeps its settings")
    return resumed_config(recipe.name, presets.get("as_published"), overrides, run)

"""A whole run's settings: `key=value` overrides, and checks of how values fit together.

Field names are unique over all sections, so `layers=4` and `model.layers=4` mean the same.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pgolf.errors import ConfigError
from pgolf.fields import parse_value, section_from_dict
from pgolf.settings import (
    ArtifactConfig,
    AverageConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
    profiled_steps,
    resolve_layers,
)


@dataclass(frozen=True)
class Config:
    """A whole run. Build it with a recipe, change it with `with_overrides`."""

    recipe: str = ""
    as_published: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS = {
    f.name: f.default_factory for f in fields(Config) if f.name not in ("recipe", "as_published")
}

# Settings of `pgolf train` that stand for several keys.
PRESETS = ("quick", "as_published")

# The contest's scripts are configured by environment variables; its users know these names.
ENVIRONMENT = {
    "SEED": "seed",
    "DATA_PATH": "data",
    "TOKENIZER_PATH": "tokenizer",
    "MAX_WALLCLOCK_SECONDS": "max_seconds",
    "ITERATIONS": "max_steps",
    "TRAIN_BATCH_TOKENS": "batch_tokens",
    "TRAIN_SEQ_LEN": "seq_len",
    "VAL_LOSS_EVERY": "val_every",
    "PGOLF_OPS": "ops",
}


# Other names of a key, and keys that have another name now.
ALIASES = {"budget": "budget_bytes"}
RENAMED = {"seed_exact": "as_published", "min_scale": "min_step"}


def known_keys() -> dict[str, tuple[str, dataclasses.Field]]:
    """Key -> (section, field), for every setting."""
    return {f.name: (s, f) for s, cls in SECTIONS.items() for f in fields(cls)}


def suggestion(name: str) -> str:
    """The key that a name of any spelling most likely means, such as LAYERS; '' if none is near."""
    keys = [*known_keys(), *PRESETS]
    if name.upper() in ENVIRONMENT:
        return ENVIRONMENT[name.upper()]
    plain = name.lower().replace("-", "_")
    return next(iter(difflib.get_close_matches(plain, keys, n=1, cutoff=0.5)), "")


def find_key(key: str) -> tuple[str, dataclasses.Field]:
    """The section and field of `layers` or `model.layers`.

    Raises:
        ConfigError: no such key; the message suggests the nearest.
    """
    keys = known_keys()
    section, _, name = key.rpartition(".")
    name = ALIASES.get(name, name)
    if name in keys and section in ("", keys[name][0]):
        return keys[name]
    if name in RENAMED:
        raise ConfigError(f"{key} is now called {RENAMED[name]}")
    near = suggestion(name)
    hint = f"did you mean {near}?" if near else "`pgolf recipes --keys` lists them"
    raise ConfigError(f"unknown key {key!r}: {hint}")


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A copy with some keys changed; values may be text. Checks every value and how they fit.

    If fit_to_budget is not given, a given budget or another grid or quantizer decides it.
    """
    changed: dict[str, dict[str, Any]] = {}
    for key, text in overrides.items():
        section, spec = find_key(key)
        values = changed.setdefault(section, {})
        if spec.name in values:
            raise ConfigError(f"{spec.name} is given twice, also as {key}: give it once")
        values[spec.name] = parse_value(key, spec, text)
    before = config.quant
    config = dataclasses.replace(
        config,
        **{s: dataclasses.replace(getattr(config, s), **values) for s, values in changed.items()},
    )
    q, a, packing = config.quant, config.artifact, changed.get("artifact", {})
    regrids = (q.grid, q.quantizer) != (before.grid, before.quantizer)
    if "fit_to_budget" not in packing and ("budget_bytes" in packing or regrids):
        fits = fits_budgets(q) and a.budget_bytes > 0
        config = dataclasses.replace(config, artifact=dataclasses.replace(a, fit_to_budget=fits))
    check(config)
    return config


def fits_budgets(q: QuantConfig) -> bool:
    """Whether the steps of matrices can be chosen so that they fill a budget."""
    return (q.grid, q.quantizer) == ("uniform", "gptq")


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """['layers=4', 'seed=1'] -> {'layers': '4', 'seed': '1'}."""
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not key=value, for example layers=4")
        if key in overrides:
            raise ConfigError(f"{key} is given twice: {overrides[key]} and {value}")
        overrides[key] = value
    return overrides


def environment_overrides(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The contest's environment names that are set, as key -> text."""
    return {key: environ[name] for name, key in ENVIRONMENT.items() if environ.get(name)}


def check_model(m: ModelConfig) -> None:
    """Raise ConfigError where values of a model that are fine alone do not fit together."""
    if m.dim % m.heads:
        raise ConfigError(f"dim={m.dim} must be a multiple of heads={m.heads}")
    if m.heads % m.kv_heads:
        raise ConfigError(f"heads={m.heads} must be a multiple of kv_heads={m.kv_heads}")
    if m.rope_dims % 2 or m.rope_dims > m.dim // m.heads:
        raise ConfigError(
            f"rope_dims={m.rope_dims} must be even and at most the head size {m.dim // m.heads}"
        )
    if m.bigram_buckets == 1:
        raise ConfigError(
            "bigram_buckets=1 has no room for the sentinel: use 0 (off) or 2 and more"
        )
    if m.bos_id >= m.vocab_size:
        raise ConfigError(f"bos_id={m.bos_id} must be below vocab_size={m.vocab_size}")
    resolve_layers("xsa_layers", m.xsa_layers, m.layers)
    resolve_layers("ve_layers", m.ve_layers, m.layers)


def check(config: Config) -> None:
    """Raise ConfigError where values that are fine alone do not fit together."""
    check_model(config.model)
    d, s = config.data, config.schedule
    if d.batch_tokens % d.seq_len:
        raise ConfigError(
            f"batch_tokens={d.batch_tokens} must be a multiple of seq_len={d.seq_len}"
        )
    if d.tokenizer and not d.data:
        raise ConfigError(
            f"tokenizer={d.tokenizer} needs data=FOLDER, shards that it made: the embedded corpus "
            "has a tokenizer of its own"
        )
    q, a = config.quant, config.artifact
    if a.fit_to_budget and not fits_budgets(q):
        raise ConfigError(
            "fit_to_budget=true needs grid=uniform and quantizer=gptq, not "
            f"grid={q.grid} and quantizer={q.quantizer}"
        )
    if a.fit_to_budget and not a.budget_bytes:
        raise ConfigError("fit_to_budget=true needs a budget_bytes above 0")
    if config.eval.stride > d.seq_len:
        raise ConfigError(f"stride={config.eval.stride} must be at most seq_len={d.seq_len}")
    if config.recipe and not (s.max_seconds or s.max_tokens or s.max_steps):
        raise ConfigError("no budget: set max_seconds, max_tokens or max_steps")
    if config.run.profile:
        profiled_steps(config.run.profile)
    if s.max_seconds and s.reserve_s >= s.max_seconds:
        raise ConfigError(
            f"reserve_s={s.reserve_s:g} leaves nothing of max_seconds={s.max_seconds:g} to train"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as written to config.json."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of `to_dict`.

    Raises:
        ConfigError: something is missing, unknown, or not a setting's value.
    """
    keys = values.keys() | {key for s in values.values() if isinstance(s, dict) for key in s}
    if old := RENAMED.keys() & keys:
        raise ConfigError(
            f"an earlier version of pgolf wrote {', '.join(sorted(old))}, which this one calls "
            "otherwise: use that version, or train again"
        )
    names = {"recipe": str, "as_published": bool} | dict.fromkeys(SECTIONS, dict)
    for name in names.keys() | values.keys():
        if name not in names or type(values.get(name)) is not names[name]:
            raise ConfigError(f"a configuration cannot have {name}={values.get(name)!r}")
    sections = {s: section_from_dict(cls, values.get(s, {})) for s, cls in SECTIONS.items()}
    config = Config(recipe=values["recipe"], as_published=values["as_published"], **sections)
    check(config)
    return config

"""`pgolf train RECIPE seeds=1,2,3`: the same run with several seeds, and their scores compared."""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pgolf.api import switch
from pgolf.child import run_forwarding
from pgolf.config import PRESETS, environment_overrides, find_key
from pgolf.errors import ConfigError, PgolfError
from pgolf.fields import parse_value
from pgolf.files import atomic_write
from pgolf.recipes import get
from pgolf.report.t_test import t_test


def train_seeds(recipe: str, overrides: Mapping[str, str]) -> None:
    """Train a recipe with each seed in its own process, then print and write a comparison.

    Args:
        overrides: key -> text as on the command line, with `seeds` and perhaps `against`.

    Raises:
        ConfigError: a setting is wrong, or a folder is taken; no run has begun then.
        PgolfError: a run failed, or was stopped; the results of the others are kept.
    """
    settings = {k: v for k, v in overrides.items() if k not in ("seeds", "against")}
    seeds, scores = _seeds(overrides["seeds"]), _against(overrides.get("against", ""))
    names = {key: key if key in PRESETS else find_key(key)[1].name for key in settings}
    by_name = {names[key]: value for key, value in settings.items()}
    if "seed" in by_name:
        raise ConfigError(
            f"seed={by_name['seed']} and seeds={overrides['seeds']}: give one of them"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "seeds= starts a process a run: under torchrun start each run with seed=N "
            "out=FOLDER-seedN, then compare them with seeds=... out=FOLDER resume=true alone"
        )
    base = Path(by_name.pop("out", "") or f"runs/{recipe}")
    resume = switch("resume", by_name.pop("resume", "false"))
    _check(recipe, by_name)
    folders = {seed: Path(f"{base}-seed{seed}") for seed in seeds}
    begun = [seed for seed, folder in folders.items() if (folder / "config.json").is_file()]
    if begun and not resume:
        raise ConfigError(
            f"{folders[begun[0]]} holds a run already: choose another out=, or go on with "
            "resume=true"
        )
    command = ["pgolf", "train", recipe, *(f"{k}={v}" for k, v in overrides.items())]
    resume_command = shlex.join(command) + ("" if resume else " resume=true")
    failed = []
    for seed, folder in folders.items():
        given = {**by_name, "seed": str(seed), "out": str(folder)}
        if seed in begun:
            given = {k: v for k, v in given.items() if k != "quick"} | {"resume": "true"}
        if _finished(recipe, given, folder):
            print(f"seed {seed}: {folder} has a result already", flush=True)
            continue
        print(f"seed {seed}: {folder}", flush=True)
        code, signals = run_forwarding(
            "pgolf", "train", recipe, *(f"{k}={v}" for k, v in given.items())
        )
        if signals:
            where = f"in seed {seed}" if code else f"after seed {seed}"
            error = PgolfError(f"stopped {where}; go on with `{resume_command}`")
            error.exit_code = 128 + signals[0]
            raise error
        if code:
            failed.append(seed)
            print(f"seed {seed}: failed with exit code {code}, see above", flush=True)
            kept = any(folder.glob("checkpoints/step-*"))
            if (folder / "config.json").is_file() and not kept:
                remedy = f"remove {folder}, unless another run is in it"
                print(f"seed {seed}: no checkpoint to go on from: {remedy}", flush=True)
    summary = summarise(
        recipe, {seed: f for seed, f in folders.items() if seed not in failed}, scores
    )
    atomic_write(f"{base}-seeds.json", json.dumps(summary | {"failed": failed}, indent=2) + "\n")
    print(f"\n{summary_table(summary)}\n{base}-seeds.json")
    if failed:
        which = f"seed{'s' * (len(failed) > 1)} {', '.join(map(str, failed))}"
        raise PgolfError(f"{which} failed, see above; what is left to do: `{resume_command}`")


def _seeds(text: str) -> list[int]:
    spec = find_key("seed")[1]
    seeds = [parse_value("seeds", spec, word) for word in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={text}: each one once, such as 1,2,3")
    return seeds


def _against(text: str) -> list[float]:
    try:
        scores = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        scores = [math.nan]
    if not all(map(math.isfinite, scores)):
        raise ConfigError(f"against={text}: expected a score as 1.837, or several as 1.836,1.838")
    return scores


def _check(recipe: str, settings: Mapping[str, str]) -> None:
    """Raise ConfigError for what every run would stop at."""
    known = {k: v for k, v in settings.items() if k not in PRESETS}
    exact = switch("as_published", settings.get("as_published", "false"))
    switch("quick", settings.get("quick", "false"))
    get(recipe).config({**environment_overrides(), **known}, exact)


def _finished(recipe: str, given: Mapping[str, str], folder: Path) -> bool:
    """Whether a run is there with its result.

    Raises:
        ConfigError: it has other settings.
    """
    if "resume" not in given or not (folder / "result.json").is_file():
        return False
    from pgolf.training.run_folder import resumed_config

    exact = switch("as_published", given["as_published"]) if "as_published" in given else None
    resumed_config(recipe, exact, {k: v for k, v in given.items() if k not in PRESETS}, folder)
    return True


def summarise(
    recipe: str, folders: Mapping[int, Path], against: Sequence[float]
) -> dict[str, Any]:
    """Scores of finished runs, their mean and sample deviation, and a test if two or more."""
    runs = [
        {"seed": seed, "folder": str(folder),
         "val_bpb": json.loads((folder / "result.json").read_bytes())["val_bpb"]}
        for seed, folder in folders.items()
    ]  # fmt: skip
    scores, several = [run["val_bpb"] for run in runs], len(runs) > 1
    test = asdict(t_test(scores, against)) if several and against else None
    if test and math.isinf(test["t"]):  # which JSON cannot say
        test["t"] = None
    return {
        "recipe": recipe,
        "runs": runs,
        "mean": fmean(scores) if scores else None,
        "deviation": stdev(scores) if several else None,
        "against": list(against),
        "test": test,
    }


def summary_table(summary: Mapping[str, Any]) -> str:
    """The same for people."""
    runs, against = summary["runs"], summary["against"]
    lines = [f"{summary['recipe']}, bits per byte (lower is better)"]
    lines += [f"  seed {run['seed']:<15}{run['val_bpb']:>10.5f}  {run['folder']}" for run in runs]
    if runs:
        lines.append(f"  {f'mean of {len(runs)}':<20}{summary['mean']:>10.5f}")
    if summary["deviation"] is not None:
        lines.append(f"  {'sample deviation':<20}{summary['deviation']:>10.5f}")
    if test := summary["test"]:
        t = "infinite" if test["t"] is None else f"{test['t']:.3f}"
        name = f"less {fmean(against):.5f}" if len(against) == 1 else f"less mean of {len(against)}"
        lines.append(f"  {name:<20}{test['difference']:>+10.5f}")
        lines.append(
            f"  {test['name']} t-test: t = {t}, {test['freedom']:.4g} degrees of freedom, "
            f"p = {test['p']:.2g} (two-sided)"
        )
    elif against:
        lines.append("  no t-test: it takes two runs")
    return "\n".join(lines)

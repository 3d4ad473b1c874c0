"""`python -m bench step`: training steps of a recipe with each choice of operators."""

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from bench import schema, timing
from pgolf.config import Config, parse_overrides
from pgolf.device import dtype_name
from pgolf.errors import PgolfError
from pgolf.progress import Progress
from pgolf.recipes import get
from pgolf.recipes.recipe import Recipe
from pgolf.train.ranks import Ranks
from pgolf.train.run import build, fit_vocabulary, open_data
from pgolf.train.run_folder import RunFolder
from pgolf.train.trainer import Trainer

SAME_LOSS = 0.01  # relative; weights and tokens are the same, so only rounding may differ

DESCRIPTION = """\
Time whole training steps (forward, backward, optimiser) of a recipe: a model for each choice of
operators, eager and compiled, all in one process and taking turns, step by step. The learning rate
is 0: every model does its work on the same weights and tokens, and their first losses must agree.
"""
EPILOG = """\
Exit code: 0 all ran, 1 losses do not agree, 2 a bad argument.

examples:
  python -m bench step                              the demo, as it runs here
  python -m bench step demo compute_dtype=fp32 --ops reference auto --compile off
  python -m bench step pr1473 data=FOLDER --ops reference triton xsa=triton --compile on
"""


class Variant(NamedTuple):
    """One choice: what ops= says, and whether the model is compiled."""

    ops: str
    compiled: bool
    trainer: Trainer

    @property
    def name(self) -> str:
        return f"{self.ops} {'compiled' if self.compiled else 'eager'}"


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench step", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("words", nargs="*", metavar="RECIPE key=value",
        help="a recipe (demo) and settings to change")
    add("--ops", nargs="+", metavar="CHOICE",
        help="what ops= may say (reference, auto, and cpu or triton by device)")
    add("--compile", nargs="+", default=["off", "on"], choices=("off", "on"))
    add("--rounds", type=int, default=20, metavar="N", help="steps of each that count (20)")
    add("--malloc", default="default", choices=("kept", "default"),
        help="kept: glibc keeps freed memory (default: as in a run)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, as JSON lines")
    args = parser.parse_intermixed_args(argv)
    try:
        return _run(args, shlex.join(["python", "-m", "bench", "step", *argv]))
    except PgolfError as e:
        print(f"python -m bench step: {e}", file=sys.stderr)
        return e.exit_code


def _run(args: argparse.Namespace, command: str) -> int:
    if args.rounds < 1:
        raise PgolfError(f"--rounds {args.rounds}: it has to be 1 or more")
    recipe = get(next((word for word in args.words if "=" not in word), "demo"))
    overrides = parse_overrides(w for w in args.words if w != recipe.name)
    for key in ("ops", "compile"):
        if key in overrides:
            raise PgolfError(f"{key}={overrides[key]}: use --{key}, which takes several")
    config = recipe.config(overrides)
    ranks = Ranks.start(config.run.device)
    kept = args.malloc == "kept" and timing.keep_freed_memory()
    setting = schema.setting(ranks.device, command, "kept" if kept else "default")
    ops = args.ops or ["reference", "triton" if ranks.device.type == "cuda" else "cpu", "auto"]
    variants = [
        _variant(recipe, overrides, ranks, choice, compiled == "on")
        for compiled in args.compile
        for choice in ops
    ]
    print(
        f"{recipe.name}, {config.data.batch_tokens:,} tokens a step, "
        f"{dtype_name(variants[0].trainer.model.compute_dtype)}: {setting.device}, "
        f"{setting.threads} threads, torch {setting.torch}"
    )
    losses = {v.name: v.trainer.step(0.0, config.optim.momentum)[0].item() for v in variants}
    lines = _timed(variants, losses, config, overrides, setting, args.rounds)
    print(_shown(lines))
    if args.json:
        schema.write_jsonl(args.json, lines)
    first, *others = losses.values()
    apart = [n for n, loss in losses.items() if not abs(loss - first) <= SAME_LOSS * abs(first)]
    for name in apart:
        print(f"WRONG: {name} has another loss than {variants[0].name}")
    return 1 if apart else 0


def _variant(
    recipe: Recipe, overrides: dict[str, str], ranks: Ranks, ops: str, compiled: bool
) -> Variant:
    """A trainer of its own, warmed up; compilation happens here."""
    config = recipe.config({**overrides, "ops": ops, "compile": "on" if compiled else "off"})
    print(f"preparing {ops} {'compiled' if compiled else 'eager'} ...", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # what a run says at its start
        # Steps alone write nothing, so the folder is never made.
        folder = RunFolder(Path("bench-step"), writes=False)
        dataset = open_data(config, ranks)
        config = fit_vocabulary(config, dataset, "vocab_size" not in overrides)
        trainer = build(recipe.title, config, ranks, dataset, folder, "")
        trainer.warm_up()
    return Variant(ops, compiled, trainer)


def _timed(
    variants: Sequence[Variant],
    losses: dict[str, float],
    config: Config,
    overrides: dict[str, str],
    setting: schema.Setting,
    rounds: int,
) -> list[schema.StepTiming]:
    """A line for each variant."""

    def entry(trainer: Trainer) -> timing.Entry:
        return timing.Entry(lambda _: trainer.step(0.0, config.optim.momentum))

    clock = timing.clock_of(variants[0].trainer.ranks.device)
    with Progress("timing", rounds, "rounds") as progress:
        times = timing.interleave(
            {v.name: entry(v.trainer) for v in variants}, rounds, clock, tick=progress.update
        )
    lines = []
    for v in variants:
        spent = timing.summarise(times[v.name])
        lines.append(
            schema.StepTiming(
                **asdict(setting),
                recipe=config.recipe, overrides=overrides, ops=v.ops,
                chosen=dict(v.trainer.model.ops), compile=v.compiled,
                dtype=dtype_name(v.trainer.model.compute_dtype),
                tokens=config.data.batch_tokens, rounds=rounds,
                median_ms=spent.median, p20_ms=spent.p20, p80_ms=spent.p80,
                tokens_per_second=1e3 * config.data.batch_tokens / spent.median,
                loss=losses[v.name],
            )
        )  # fmt: skip
    return lines


def _shown(lines: Sequence[schema.StepTiming]) -> str:
    width = max(len(line.ops) for line in lines)
    text = [
        f"  {'ops':<{width}} compile median ms     20%     80%  tokens/s  speed      loss"
    ]
    for line in lines:
        speed = line.tokens_per_second / lines[0].tokens_per_second
        text.append(
            f"  {line.ops:<{width}} {'on' if line.compile else 'off':<7} {line.median_ms:>9.1f} "
            f"{line.p20_ms:>7.1f} {line.p80_ms:>7.1f} {line.tokens_per_second:>9,.0f} "
            f"{speed:>5.2f}x {line.loss:>9.5f}"
        )
    fastest = max(lines, key=lambda line: line.tokens_per_second)
    text.append(
        f"  fastest: {fastest.ops} {'compiled' if fastest.compile else 'eager'}, "
        + ", ".join(f"{name}={impl}" for name, impl in fastest.chosen.items())
    )
    return "\n".join(text)

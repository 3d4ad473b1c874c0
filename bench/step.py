"""`python -m bench step`: training steps of a recipe with each choice of operators."""

import argparse
import contextlib
import gc
import io
import math
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from bench import profiling, restart, schema, timing
from bench.phases import Phases
from pgolf.config import Config, parse_overrides
from pgolf.device import dtype_name, pick_dtype
from pgolf.errors import PgolfError
from pgolf.progress import Progress
from pgolf.ranks import Ranks
from pgolf.recipes import get
from pgolf.recipes.recipe import Recipe
from pgolf.training.run import build
from pgolf.training.run_folder import RunFolder
from pgolf.training.session import Session, fit_vocabulary, open_data
from pgolf.training.trainer import Trainer

SAME_LOSS = 0.01  # relative; weights and tokens are the same, so only rounding may differ

DESCRIPTION = """\
Time whole training steps (forward, backward, optimiser) of a recipe: a model for each choice of
operators, eager and compiled, all in one process and taking turns, step by step. The learning rate
is 0: every model works on the same weights and tokens, and their first losses must agree. Besides
the whole step, from an idle device to an idle device, it shows its phases (on a GPU the time
between events in its stream; `host` is the host's time to queue all of them) and the GPU memory
that it takes beyond what stays between steps.
"""
EPILOG = """\
Exit code: 0 all ran, 1 losses do not agree, 2 a bad argument.

examples:
  python -m bench step                              the demo, as it runs here
  python -m bench step demo compute_dtype=fp32 --ops reference auto --compile off
  python -m bench step pr1473 data=FOLDER --ops reference triton xsa=triton --compile on
"""


class Choice(NamedTuple):
    """What ops= says, and whether the model is compiled."""

    ops: str
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.ops} {'compiled' if self.compiled else 'eager'}"


class Variant(NamedTuple):
    """A choice with the trainer that it gave, ready to be timed."""

    choice: Choice
    trainer: Trainer
    phases: Phases
    loss: float  # of its first step


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench step", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("arguments", nargs="*", metavar="RECIPE key=value",
        help="a recipe (demo) and settings to change")
    add("--ops", nargs="+", metavar="CHOICE",
        help="what ops= may say (reference, auto, and cpu or triton by device)")
    add("--compile", nargs="+", default=["off", "on"], choices=("off", "on"))
    add("--rounds", type=int, default=20, metavar="N", help="steps of each that count (20)")
    add("--seconds", type=float, default=float("inf"), metavar="S",
        help="time the first, then each further choice beside it, while there is time")
    add("--profile", type=int, default=0, metavar="N",
        help="profile N steps of each: operators, kernels, and how long nothing runs")
    add("--malloc", default="default", choices=("kept", "default"),
        help="kept: glibc keeps freed memory (default: as in a run)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, as JSON lines")
    restart.add_option(parser)
    args = parser.parse_intermixed_args(argv)
    try:
        return _run(args, argv)
    except PgolfError as e:
        print(f"python -m bench step: {e}", file=sys.stderr)
        return e.exit_code


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    for name, least in (("rounds", 1), ("profile", 0)):
        if getattr(args, name) < least:
            raise PgolfError(f"--{name} {getattr(args, name)}: it has to be {least} or more")
    recipe = get(next((argument for argument in args.arguments if "=" not in argument), "demo"))
    overrides = parse_overrides(w for w in args.arguments if w != recipe.name)
    for key in ("ops", "compile"):
        if key in overrides:
            raise PgolfError(f"{key}={overrides[key]}: use --{key}, which takes several")
    config = recipe.config(overrides)
    ranks = Ranks.start(config.run.device)
    kept = args.malloc == "kept" and timing.keep_freed_memory()
    command = shlex.join(["python", "-m", "bench", "step", *argv])
    setting = schema.setting(ranks.device, command, "kept" if kept else "default")
    ops = args.ops or ["reference", "triton" if ranks.device.type == "cuda" else "cpu", "auto"]
    choices = [Choice(text, compiled == "on") for compiled in args.compile for text in ops]
    print(
        f"{recipe.name}, {config.data.batch_tokens:,} tokens a step, "
        f"{dtype_name(pick_dtype(config.run.compute_dtype, ranks.device)[0])}: {setting.device}, "
        f"{setting.threads} threads, torch {setting.torch}"
    )
    bench = Bench(recipe, config, overrides, ranks, setting, args.rounds, args.profile)
    if "on" in args.compile:  # each choice is a compiled model more, all of one class
        torch._dynamo.config.recompile_limit = max(8, 2 * len(choices))
    series = Series(bench, argv, args.seconds, args.json, args.failed)
    series.run(choices)
    if not series.lines:
        raise PgolfError("no choice of operators runs: what they fail with stands above")
    print(_fastest(series.lines))
    wrong = _wrong(series.lines)
    for text in (*wrong, *series.failures()):
        print(text)
    return 1 if wrong or series.failed else 0


def _wrong(lines: Sequence[schema.StepTiming]) -> list[str]:
    """A line on each choice whose loss is not that of the first."""
    first, problems = lines[0].loss, []
    for line in lines:
        if line.loss is None:
            problems.append(f"WRONG: {_name(line)} has a loss that is not finite")
        elif first is None or not abs(line.loss - first) <= SAME_LOSS * first:
            problems.append(f"WRONG: {_name(line)} has another loss than {_name(lines[0])}")
    return problems


class Bench(NamedTuple):
    """What all choices share."""

    recipe: Recipe
    config: Config
    overrides: dict[str, str]
    ranks: Ranks
    setting: schema.Setting
    rounds: int
    profile: int  # steps


class Series:
    """Choices that are timed one after another, and the first of them beside each other one.

    Attributes:
        lines: of those that ran; `file` has them as well, as they come.
        failed: the names of those that did not, also in a process that this one goes on for.
    """

    def __init__(
        self, bench: Bench, argv: Sequence[str], seconds: float, file: Path | None,
        failed: Sequence[str],
    ):  # fmt: skip
        self.bench, self.argv, self.file, self.first = bench, argv, file, None
        self.limited, self.end = seconds < float("inf"), time.monotonic() + seconds
        self.lines = schema.read_jsonl(file, schema.StepTiming) if failed else []
        self.failed, self.known = list(failed), len(failed)

    def run(self, choices: Sequence[Choice]) -> None:
        """Time choices; a restart of the process leaves out those that are done.

        Without a limit of time all take turns. With one each takes turns with the first, as long as
        there is time for another one.
        """
        done = {*self.failed, *map(_name, self.lines)}
        width = max(len(choice.ops) for choice in choices)
        if self.lines:
            known = [choice for choice in choices if choice.name == _name(self.lines[0])]
            self.first = next(iter(self._ready(known)), None)
        todo = [choice for choice in choices if choice.name not in done]
        groups, longest = [[choice] for choice in todo] if self.limited else [todo], 0.0
        print(_header(width))
        for i, group in enumerate(groups):
            if self.lines and time.monotonic() + longest > self.end:
                print(f"  no time is left for {', '.join(c.name for g in groups[i:] for c in g)}")
                break
            started = time.monotonic()
            self._time(group, width)
            gc.collect()  # models are parts of cycles
            if self.bench.ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            longest = max(longest, (time.monotonic() - started) / max(1, len(group)))

    def failures(self) -> list[str]:
        """A line on each choice that failed in this process."""
        return [f"FAILED: {name}; why stands above" for name in self.failed[self.known :]]

    def _ready(self, group: Sequence[Choice]) -> list[Variant]:
        """Those of some choices that can be prepared."""
        variants = []
        for choice in group:
            print(f"preparing {choice.name} ...", file=sys.stderr, flush=True)
            with self._others_go_on([choice]):
                variants.append(_prepared(self.bench, choice))
        return variants

    def _time(self, group: Sequence[Choice], width: int) -> None:
        variants = self._ready(group)
        if not variants:
            return
        with self._others_go_on([v.choice for v in variants]):
            lines = _timed(self.bench, self.first or variants[0], variants)
            self.first = self.first or variants[0]
            self.lines += lines
            self._keep()
            for line in lines:
                print(_row(line, width), flush=True)
            if self.bench.profile:
                self._add_profiles(variants)

    def _add_profiles(self, variants: Sequence[Variant]) -> None:
        """Put the profiles of these into their lines, the last ones."""
        for at, variant in enumerate(variants, len(self.lines) - len(variants)):
            step, device = variant.phases.step, self.bench.ranks.device
            profile = profiling.profiled(step, self.bench.profile, device)
            self.lines[at] = replace(self.lines[at], profile=profile)
            self._keep()
            print(f"  {variant.choice.name}\n{profiling.table(profile)}", flush=True)

    def _keep(self) -> None:
        if self.file:
            schema.write_jsonl(self.file, self.lines)

    @contextlib.contextmanager
    def _others_go_on(self, choices: Sequence[Choice]) -> Iterator[None]:
        """Note some choices that fail; if they spoil the GPU, a new process does the others."""
        try:
            yield
        except PgolfError:
            raise
        except Exception:
            traceback.print_exc()
            self.failed += [choice.name for choice in choices]
            if restart.unusable(self.bench.ranks.device):
                print("\n".join(self.failures()))
                left = f"{self.end - time.monotonic():.0f}"
                limit = ("--seconds", left) if self.limited else ()
                restart.rerun("step", self.argv, self.failed, *limit)


def _prepared(bench: Bench, choice: Choice) -> Variant:
    """A trainer of its own, warmed up; compilation happens here."""
    switch = "on" if choice.compiled else "off"
    config = bench.recipe.config({**bench.overrides, "ops": choice.ops, "compile": switch})
    with contextlib.redirect_stdout(io.StringIO()):  # what a run says at its start
        # Steps alone write nothing, so the folder is never made.
        folder = RunFolder(Path("bench-step"), writes=False)
        dataset = open_data(config, bench.ranks)
        config = fit_vocabulary(config, dataset, "vocab_size" not in bench.overrides)
        trainer = build(Session(config, bench.ranks, dataset, folder), bench.recipe.title)
        trainer.warm_up()
    phases = Phases(trainer)
    return Variant(choice, trainer, phases, phases.step()[0].item())


def _timed(
    bench: Bench, first: Variant, variants: Sequence[Variant]
) -> list[schema.StepTiming]:
    """A line for each variant; they take turns with the first of all."""
    turns = [first, *(v for v in variants if v is not first)]
    device = bench.ranks.device

    def entry(phases: Phases) -> timing.Entry:
        return timing.Entry(lambda _: phases.step())

    with Progress("timing", bench.rounds, "rounds") as progress:
        times = timing.interleave(
            {v.choice: entry(v.phases) for v in turns}, bench.rounds,
            timing.wall_clock_of(device), tick=progress.update,
        )  # fmt: skip
    spent = {choice: timing.summarise(values) for choice, values in times.items()}
    tokens = bench.config.data.batch_tokens
    return [
        schema.StepTiming(
            **asdict(bench.setting),
            recipe=bench.config.recipe, overrides=bench.overrides, ops=v.choice.ops,
            chosen=dict(v.trainer.ops), compile=v.choice.compiled,
            dtype=dtype_name(v.trainer.model.compute_dtype), tokens=tokens, rounds=bench.rounds,
            median_ms=spent[v.choice].median, p20_ms=spent[v.choice].p20,
            p80_ms=spent[v.choice].p80,
            tokens_per_second=1e3 * tokens / spent[v.choice].median,
            loss=v.loss if math.isfinite(v.loss) else None,
            first_ms=spent[first.choice].median, phases=v.phases.medians(bench.rounds),
            peak_bytes=v.phases.peak_bytes(), profile=None,
        )
        for v in variants
    ]  # fmt: skip


def _name(line: schema.StepTiming) -> str:
    return Choice(line.ops, line.compile).name


def _header(width: int) -> str:
    return (
        f"  {'ops':<{width}} compile median ms     20%     80%  tokens/s  speed "
        "forward backward optimizer   host  peak GB      loss"
    )


def _row(line: schema.StepTiming, width: int) -> str:
    """A line of the table; times of phases are the GPU's, or the host's where there is none."""
    phases = [line.phases[phase] for phase in ("forward", "backward", "optimizer")]
    times = [p["host_ms"] if p["gpu_ms"] is None else p["gpu_ms"] for p in phases]
    host = sum(p["host_ms"] for p in line.phases.values())
    peak = "-" if line.peak_bytes is None else f"{line.peak_bytes / 1e9:.2f}"
    loss = "not finite" if line.loss is None else f"{line.loss:.5f}"
    return (
        f"  {line.ops:<{width}} {'on' if line.compile else 'off':<7} {line.median_ms:>9.1f} "
        f"{line.p20_ms:>7.1f} {line.p80_ms:>7.1f} {line.tokens_per_second:>9,.0f} "
        f"{line.first_ms / line.median_ms:>5.2f}x {times[0]:>7.1f} {times[1]:>8.1f} "
        f"{times[2]:>9.1f} {host:>6.1f} {peak:>8} {loss:>9}"
    )


def _fastest(lines: Sequence[schema.StepTiming]) -> str:
    fastest = max(lines, key=lambda line: line.first_ms / line.median_ms)
    chosen = ", ".join(f"{name}={impl}" for name, impl in fastest.chosen.items())
    return f"  fastest: {_name(fastest)}, {chosen}"

"""`python -m bench ops --against CHECKOUT`: the same operators in two checkouts, by paired ratios.

A pair is a process of each, one right after the other, so that other load slows both; which is
first changes from pair to pair. Each process runs `bench ops` of its own checkout, for one
operator, and its median is one number: the rounds of one process share its memory layout and are
not independent.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from bench import schema
from pgolf.errors import PgolfError
from pgolf.progress import Progress
from pgolf.report.t_test import two_sided

HERE = Path(__file__).resolve().parents[1]
SLOWER = 1.03  # a ratio whose whole interval lies above is marked
OURS = {"cpu": ["cpu"], "cuda": ["triton", "cuda"]}  # providers, where none is named

Case = tuple[str, str, str, str]  # sample, dtype, mode, provider
Lines = dict[Case, dict[str, Any]]  # as a process has written them


class NoFigures(PgolfError):
    """A checkout has not timed an operator; says why, as it did."""


def compare(
    args: argparse.Namespace,
    operators: Sequence[str],
    device: torch.device,
    dtypes: Sequence[str],
    setting: schema.Setting,
) -> int:
    """Time operators in both checkouts and print ratios; returns the exit code, 1 if any is slower.

    Raises:
        PgolfError: an option does not fit, or no operator could be compared.
    """
    other = args.against.resolve()
    if not (other / "bench" / "ops.py").is_file():
        raise PgolfError(f"--against {args.against} has no bench/ops.py: name a checkout's root")
    if args.pairs < 2:
        raise PgolfError(f"--pairs {args.pairs} shows no spread: at least 2")
    if args.plot:
        raise PgolfError("--plot draws times, not ratios: leave out --against or --plot")
    arguments = _arguments(args, device, dtypes)
    lines: list[schema.Paired] = []
    print(f"times here / times in {other}; the ratio's 95 % interval, of {args.pairs} pairs")
    with Progress("pairs", len(operators) * args.pairs, "pairs") as progress:
        for name in operators:
            progress.note = name
            try:
                pairs = _pairs(other, ["--op", name, *arguments], args.pairs, progress)
                ratios = _ratios(name, pairs, setting, args.cold)
            except NoFigures as e:
                print(f"\n{name} is not compared: {e}")
                continue
            print(f"\n{name}\n{_shown(ratios)}")
            lines += ratios
            if args.json:
                schema.write_jsonl(args.json, lines)
    if not lines:
        raise PgolfError("no operator could be compared: why stands above")
    slower = [line for line in lines if line.ratio_low > SLOWER]
    print(f"\n{len(slower)} of {len(lines)} slower by more than {100 * (SLOWER - 1):.0f} %")
    return 1 if slower else 0


def _arguments(args: argparse.Namespace, device: torch.device, dtypes: Sequence[str]) -> list[str]:
    """The options that both checkouts are given."""
    arguments = ["--providers", *(args.providers or OURS[device.type]), "--dtype", *dtypes]
    arguments += ["--mode", *args.mode, "--device", device.type, "--malloc", args.malloc]
    arguments += ["--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    arguments += ["--sample", *args.sample] if args.sample else []
    arguments += ["--threads", str(args.threads)] if args.threads else []
    return arguments + ["--cold"] * args.cold + ["--all"] * args.all


def _pairs(
    other: Path, arguments: list[str], count: int, progress: Progress
) -> list[tuple[Lines, Lines]]:
    """What both checkouts measure, this one's first in each pair, whichever ran first."""
    pairs = []
    for turn in range(count):
        both = [HERE, other]
        made = [measure(checkout, arguments) for checkout in both[:: 1 if turn % 2 == 0 else -1]]
        pairs.append(tuple(made if turn % 2 == 0 else reversed(made)))
        progress.update(1)
    return pairs


def measure(checkout: Path, arguments: list[str]) -> Lines:
    """The lines of `bench ops` of a checkout, in a process of its own.

    Raises:
        NoFigures: there are none.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "bench", "ops", *arguments, "--json", str(file)],
            cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True, text=True,
        )  # fmt: skip
        written = file.read_text().splitlines() if file.exists() else []
    lines = [json.loads(text) for text in written]
    if not lines:
        spoken = done.stdout.splitlines() if done.returncode in (0, 1) else done.stderr.splitlines()
        why = [text.strip() for text in spoken if "not here" in text or "WRONG" in text]
        last = why or [text.strip() for text in spoken if text.strip()] or ["it says nothing"]
        raise NoFigures(f"no figures in {checkout}: {last[-1]}")
    return {(line["sample"], line["dtype"], line["mode"], line["provider"]): line for line in lines}


def _ratios(
    name: str, pairs: Sequence[tuple[Lines, Lines]], setting: schema.Setting, cold: bool
) -> list[schema.Paired]:
    """A line for each case that both have in all pairs."""
    first = pairs[0]
    common = [case for case in first[0] if all(case in lines for pair in pairs for lines in pair)]
    if not common:
        here, there = (", ".join(sorted({case[0] for case in lines})) for lines in first)
        raise NoFigures(f"no case was timed in both: {here} here, {there} there")
    lines = []
    for case in common:
        ours, other = ([pair[i][case]["median_ms"] for pair in pairs] for i in (0, 1))
        ratio, low, high = interval([a / b for a, b in zip(ours, other, strict=True)])
        sample, dtype, mode, provider = case
        lines.append(
            schema.Paired(
                **asdict(setting),
                operator=name, provider=provider, mode=mode, sample=sample, dtype=dtype, cold=cold,
                rounds=first[0][case]["rounds"], pairs=len(pairs),
                median_ms=median(ours), other_median_ms=median(other),
                ratio=ratio, ratio_low=low, ratio_high=high,
                other_commit=first[1][case].get("commit"),
            )
        )  # fmt: skip
    return lines


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of two or more ratios, and its 95 % interval's ends by Student's t."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, count = fmean(logs), len(logs)
    reach = _critical(count - 1) * stdev(logs) / math.sqrt(count)
    return math.exp(mean), math.exp(mean - reach), math.exp(mean + reach)


def _critical(freedom: int) -> float:
    """The t that is reached in either direction with probability 0.05, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 0.05 else (low, middle)
    return low


def _shown(lines: Sequence[schema.Paired]) -> str:
    text = ["    provider   mode          here ms   there ms   ratio   95 % interval"]
    for line in lines:
        mark = "  SLOWER" if line.ratio_low > SLOWER else ""
        text.append(
            f"    {line.provider:<10} {line.mode:<9} {line.median_ms:>11.4g} "
            f"{line.other_median_ms:>10.4g} {line.ratio:>7.3f}   {line.ratio_low:.3f} to "
            f"{line.ratio_high:.3f}{mark}   {line.sample}, {line.dtype}"
        )
    return "\n".join(text)

"""`python -m bench decode`: tokens a second, with key/value caches and with whole passes."""

import argparse
import shlex
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench import schema, timing
from pgolf import recipes
from pgolf.config import parse_overrides
from pgolf.device import dtype_name, pick_device, pick_dtype
from pgolf.errors import ConfigError, PgolfError
from pgolf.model import GPT
from pgolf.model.decode import WINDOW, Decoder, pick
from pgolf.model.frozen import frozen_copy
from pgolf.model.gpt import operator_sizes
from pgolf.model.init import init_weights
from pgolf.ops.choose import choose_all
from pgolf.progress import Progress

CONTEXTS, TEMPERATURE = 8, 0.8

DESCRIPTION = """\
Time the generation of text at contexts in the middle of 8 equal parts of 1 to T, and take the mean:
one more token of N sequences in one batch with key/value caches, drawn from its logits, compared
with a pass over the whole context of one sequence for its next token. Weights are initial ones: no
time depends on them.
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench decode", description=DESCRIPTION,
        epilog="example: python -m bench decode demo --micro 64x256",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "arguments",
        nargs="*",
        metavar="RECIPE key=value",
        help="a recipe (demo) and settings to change",
    )
    add("--micro", default="64x256", metavar="NxT", help="sequences x tokens (64x256)")
    add("--rounds", type=int, default=10, metavar="N", help="repetitions, whose median counts (10)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, as JSON lines")
    args = parser.parse_intermixed_args(argv)
    try:
        line = _timed(args, shlex.join(["python", "-m", "bench", "decode", *argv]))
    except PgolfError as e:
        print(f"python -m bench decode: {e}", file=sys.stderr)
        return e.exit_code
    print(
        f"{line.recipe}, {line.sequences} sequences x {line.tokens} tokens, {line.dtype}: "
        f"{line.device}, {line.threads} threads, torch {line.torch}\n"
        f"  caches        {line.cached_ms:>9.3f} ms a step {line.cached_tokens_per_second:>10,.0f} "
        f"tokens/s\n"
        f"  whole passes  {line.whole_ms:>9.3f} ms a token{line.whole_tokens_per_second:>10,.0f} "
        f"tokens/s\n"
        f"  {line.cached_tokens_per_second / line.whole_tokens_per_second:.0f}x"
    )
    if args.json:
        schema.write_jsonl(args.json, [line])
    return 0


def _timed(args: argparse.Namespace, command: str) -> schema.DecodeTiming:
    sequences, _, tokens = args.micro.partition("x")
    if not (sequences.isdigit() and tokens.isdigit() and int(sequences)) or int(tokens) < CONTEXTS:
        raise ConfigError(
            f"--micro {args.micro}: it is sequences x tokens, {CONTEXTS} or more, as 64x256"
        )
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: it has to be 1 or more")
    count, length = int(sequences), int(tokens)
    name = next((argument for argument in args.arguments if "=" not in argument), "demo")
    overrides = parse_overrides(w for w in args.arguments if w != name)
    config = recipes.get(name).config({**overrides, "seq_len": length})
    device = pick_device(args.device)
    dtype = pick_dtype("auto", device)[0]
    sizes = operator_sizes(config.model, dtype, dtype)
    chosen = choose_all("", device.type, dtype, False, sizes, ["attention"])
    model = GPT(config.model, dtype, length, {n: choice.impl for n, choice in chosen.items()})
    init_weights(model, 0)
    entries = _entries(model.to(device), count, length)
    with Progress("timing", args.rounds, "rounds") as bar:
        clock = timing.wall_clock_of(device)
        times = timing.interleave(entries, args.rounds, clock, tick=bar.update)
    cached_ms, whole_ms = (
        statistics.mean(timing.summarise(t).median for (w, _), t in times.items() if w == way)
        for way in ("cached", "whole")
    )
    return schema.DecodeTiming(
        **asdict(schema.setting(device, command, "default")),
        recipe=name, overrides=overrides, sequences=count, tokens=length,
        dtype=dtype_name(dtype),
        rounds=args.rounds, cached_ms=cached_ms, cached_tokens_per_second=1e3 * count / cached_ms,
        whole_ms=whole_ms, whole_tokens_per_second=1e3 / whole_ms,
    )  # fmt: skip


def _entries(model: GPT, count: int, length: int) -> dict[tuple[str, int], timing.Entry]:
    """(way, context) -> the token after so many others."""
    device = model.rope_cos.device
    decoder = Decoder(frozen_copy(model), count, length)
    ids = torch.zeros(count, length, dtype=torch.int64, device=device)
    chance = torch.rand(count, dtype=torch.float64).to(device)
    decoder.read(ids[:, :WINDOW])

    def at(context: int) -> None:
        decoder.used = context  # what the caches hold is not what costs time
        decoder.position.fill_(context)

    def cached(_: None) -> None:
        pick(decoder.step(ids[:, 0]), TEMPERATURE, chance)

    @torch.no_grad()
    def whole(context: int) -> None:
        logits = model.logits(model.features(ids[:1, :context])[0, -1])
        torch.multinomial(torch.softmax(logits.cpu() / TEMPERATURE, -1), 1)

    entries = {}
    for i in range(CONTEXTS):
        n = (2 * i + 1) * length // (2 * CONTEXTS)
        entries["cached", n] = timing.Entry(cached, lambda n=n: at(n))
        entries["whole", n] = timing.Entry(whole, lambda n=n: n)
    return entries

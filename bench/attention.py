"""`python -m bench attention`: attention alone, by every backend that runs here."""

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench import schema, timing
from pgolf import recipes
from pgolf.config import parse_overrides
from pgolf.device import dtype_name, pick_device, pick_dtype
from pgolf.errors import ConfigError, PgolfError
from pgolf.ops.attention import FLASH, attention, choose

DESCRIPTION = """\
Time the attention of one layer of a recipe, forward and backward, by every backend that runs here:
what of a step is no kernel of pgolf, and differs between machines. Shown is also the rate: a causal
forward has 2 T^2 H d operations a sequence, a backward 2.5 times as many.
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench attention", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("words", nargs="*", metavar="RECIPE key=value", help="a recipe (pr1473) and settings")
    add("--sequences", type=int, default=48, metavar="N", help="in a pass (48)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--rounds", type=int, default=20, metavar="N", help="of each that count (20)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, as JSON lines")
    args = parser.parse_intermixed_args(argv)
    try:
        lines = _run(args, shlex.join(["python", "-m", "bench", "attention", *argv]))
        if args.json:
            schema.write_jsonl(args.json, lines)
    except PgolfError as e:
        print(f"python -m bench attention: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def _run(args: argparse.Namespace, command: str) -> list[schema.AttentionTiming]:
    for name in ("sequences", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: it has to be 1 or more")
    recipe = recipes.get(next((word for word in args.words if "=" not in word), "pr1473"))
    overrides = parse_overrides(w for w in args.words if w != recipe.name)
    config = recipe.config(overrides)
    device = pick_device(args.device)
    dtype = pick_dtype(config.run.compute_dtype, device)[0]
    m, time = config.model, config.data.seq_len
    size = m.dim // m.heads
    q, k, v = (
        torch.randn(args.sequences, time, heads, size, device=device).to(dtype).requires_grad_()
        for heads in (m.heads, m.kv_heads, m.kv_heads)
    )
    gradient = torch.randn_like(q)
    entries = {}
    for backend in (*FLASH, "sdpa"):
        try:
            _, reason = choose(device, dtype, backend, size)
        except ConfigError as e:
            print(f"  {backend:<6} not here: {e}")
            continue
        print(f"  {backend:<6} {reason}")
        entries[backend, "forward"], entries[backend, "backward"] = _entries(
            backend, (q, k, v), gradient
        )
    times = timing.interleave(entries, args.rounds, timing.clock_of(device))
    flops = 2 * args.sequences * time**2 * m.heads * size
    setting = schema.setting(device, command, "default")
    lines = []
    for (backend, mode), values in times.items():
        spent = timing.summarise(values)
        work = flops * (2.5 if mode == "backward" else 1)
        lines.append(
            schema.AttentionTiming(
                **asdict(setting), backend=backend, mode=mode, shape=list(q.shape),
                kv_heads=m.kv_heads, dtype=dtype_name(dtype), rounds=args.rounds,
                median_ms=spent.median, p20_ms=spent.p20, p80_ms=spent.p80,
                gflops=work / spent.median / 1e6,
            )
        )  # fmt: skip
        print(f"  {backend:<6} {mode:<8} {spent.median:>9.3f} ms {lines[-1].gflops:>9.0f} GFLOP/s")
    return lines


def _entries(
    backend: str, inputs: tuple[torch.Tensor, ...], gradient: torch.Tensor
) -> tuple[timing.Entry, timing.Entry]:
    """(forward, backward) of one backend."""

    def forward(_: None = None) -> torch.Tensor:
        return attention(*inputs, backend)

    def backward(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, inputs, gradient)

    return timing.Entry(forward), timing.Entry(backward, prepare=forward)

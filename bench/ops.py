"""`python -m bench ops`: operators of every provider, checked, timed, compared with the floor."""

import argparse
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from bench import against, cases, peers, plot, products, providers, restart, schema, timing
from pgolf.device import pick_device
from pgolf.errors import PgolfError
from pgolf.ops.operator import OPERATORS, Operator, Sample
from pgolf.progress import Progress

# Least traffic, forward and backward, of samples that a CPU is spared.
LARGE = 1_000_000_000

DESCRIPTION = """\
Time operators: eager torch, torch.compile, our kernels and public peers, those that can run here.

First each provider's output and gradients are compared with float64: the error may be twice that of
eager torch in the same dtype (gradients: three times) and one rounding (pgolf/ops/testing.py), and
inputs must not change. A provider that fails is called WRONG and not timed. Then all providers run
once per round, each round in another order. The table shows the median, the 20th and 80th
percentile, the time relative to torch.compile, and the share of the floor that is reached. The
floor is the least bytes over the bandwidth of a copy of as many, or the operations over the rate of
torch's own matmuls of the same shapes (of a large one if it has none), whichever takes longer; both
are measured in the same rounds, with the same threads. On a GPU the GPU's own time counts, with
calls queued ahead; the host's time to queue a call is a column of its own, and inputs are drawn
there.
  forward   keeps what the gradient needs, as in training
  backward  its gradients alone; a fresh forward runs before each, off the clock
  both      forward and gradients
Outputs are allocated on the clock, as in use; the gradient of the output is not.

With --against, our kernels are timed in two checkouts, both built: their processes take turns, and
the table shows the ratio of a case's times, here over there, with its 95 % interval.
"""
EPILOG = """\
Exit code: 0 all ran, 1 a provider is wrong or, with --against, slower by 3 %, 2 a bad argument.

examples:
  python -m bench ops                                  everything that can run here
  python -m bench ops --op xsa --dtype bf16 --mode both --cold
  python -m bench ops --op xsa --providers eager compiled cpu --sample 8192 --threads 2
  python -m bench ops --json new.jsonl --plot plots/   figures to keep: one JSON object a line
  python -m bench ops --against ../before --threads 2  is anything slower than in another checkout?
"""


class Options(NamedTuple):
    """How to measure, alike for all cases."""

    device: torch.device
    providers: list[str]
    modes: list[str]
    rounds: int
    seconds: float
    cold: bool
    setting: schema.Setting
    argv: list[str]
    failed: list[str]  # cases, or their providers, that cannot run; it grows


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return _run(args, argv)
    except PgolfError as e:
        print(f"python -m bench ops: {e}", file=sys.stderr)
        return e.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench ops", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--op", nargs="+", default=[], metavar="NAME", help="operators, in this order (all)")
    add("--providers", nargs="+", default=[], metavar="NAME",
        help="eager compiled cpu triton cuda fa3 fa4 fa2 peers, or a peer's name (all); eager is "
        "the yardstick of correctness and runs for that in any case")
    add("--sample", nargs="+", default=[], metavar="TEXT", help="only sizes with this in the label")
    add("--mode", nargs="+", default=list(cases.MODES), choices=cases.MODES)
    add("--dtype", nargs="+", choices=list(cases.DTYPES),
        help="(bf16 on a GPU, fp32 on a CPU)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--threads", type=_positive, metavar="N", help="threads of a CPU (torch's choice)")
    add("--rounds", type=_positive, metavar="N", help="(50; of each process of --against, 10)")
    add("--against", type=Path, metavar="CHECKOUT",
        help="another checkout, whose operators are timed in turn with these")
    add("--pairs", type=_positive, default=10, metavar="N",
        help="processes of each checkout for each operator (10)")
    add("--seconds", type=float, default=60.0, metavar="S",
        help="a table that would take longer gets fewer rounds (60)")
    add("--cold", action="store_true", help="flush the caches before each call")
    add("--all", action="store_true",
        help=f"on a CPU, also sizes that move more than {LARGE / 1e9:g} GB")
    add("--malloc", default="kept", choices=("kept", "default"),
        help="kept: glibc keeps freed memory, so that results do not lie in new pages each time")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well, as JSON lines")
    add("--plot", type=Path, metavar="PATH",
        help="write a plot of each operator: a folder, or NAME.png for one operator")
    restart.add_option(parser)
    return parser  # fmt: skip


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    operators = _operators(args.op)
    names = providers.expand(args.providers)
    device = pick_device(args.device)
    dtypes = args.dtype or ["bf16" if device.type == "cuda" else "fp32"]
    plots = plot.files(args.plot, [operator.name for operator in operators])
    if args.threads:
        torch.set_num_threads(args.threads)
    args.rounds = args.rounds or (10 if args.against else 50)
    malloc = args.malloc
    if device.type == "cuda" or (malloc == "kept" and not timing.keep_freed_memory()):
        malloc = "default"
    setting = schema.setting(device, shlex.join(["python", "-m", "bench", "ops", *argv]), malloc)
    if args.against:
        return against.compare(args, [o.name for o in operators], device, dtypes, setting)
    options = Options(
        device, names, args.mode, args.rounds, args.seconds, args.cold, setting, argv,
        list(args.failed),
    )
    print(_opening(options))
    chosen, left_out = _choose(operators, dtypes, args.sample, device, args.all)
    if not chosen:
        raise PgolfError("no sample is left: " + ("; ".join(left_out) or "see --sample"))
    for line in left_out:
        print(line)
    lines = schema.read_jsonl(args.json, schema.Timing) if args.failed else []
    done = {*args.failed, *(_name(line.operator, line.sample, line.dtype) for line in lines)}
    todo = [case for case in chosen if _name(case[0].name, case[1].label, case[2]) not in done]
    correct = not args.failed
    tables = len(todo) * len(args.mode)
    with Progress("timing", tables * args.rounds, "rounds") as progress:
        for operator, sample, dtype in todo:
            name = progress.note = _name(operator.name, sample.label, dtype)
            try:
                case = cases.build(operator, sample, device, dtype)
                functions, fine = _checked(case, options)
                timed = _timed(case, functions, options, progress)
            except PgolfError:
                raise
            except Exception:  # no memory for it, say: the others may run
                traceback.print_exc()
                print(f"  FAILED: {name}; why stands above")
                _note(name, options)
                fine, timed = False, []
            correct &= fine
            lines += timed
            if args.json:
                schema.write_jsonl(args.json, lines)
    for name, path in plots.items():
        drawn = [line for line in lines if line.operator == name]
        if drawn:
            plot.draw(drawn, path)
            print(f"plot: {path}")
    return 0 if correct else 1


def _name(operator: str, sample: str, dtype: str) -> str:
    """Of a case; a provider's follows it."""
    return f"{operator} {sample} {dtype}"


def _note(name: str, options: Options) -> None:
    """A case or a provider has failed; if the GPU is unusable, a new process does the others."""
    options.failed.append(name)
    if restart.unusable(options.device):
        restart.rerun("ops", options.argv, options.failed)


def _operators(names: Sequence[str]) -> list[Operator]:
    for name in names:
        if name not in OPERATORS:
            raise PgolfError(f"no operator is named {name!r}; there are {', '.join(OPERATORS)}")
    return [OPERATORS[name] for name in names or OPERATORS]


def _opening(options: Options) -> str:
    s = options.setting
    caches = "cold caches" if options.cold else "warm caches"
    return (
        f"{s.device}, {s.threads} thread{'s' * (s.threads > 1)}, torch {s.torch}, "
        f"triton {s.triton}, {caches}, freed memory: {s.malloc}"
    )


def _choose(
    operators: list[Operator],
    dtypes: list[str],
    labels: list[str],
    device: torch.device,
    everything: bool,
) -> tuple[list[tuple[Operator, Sample, str]], list[str]]:
    """The cases to measure, and a line on each that is left out."""
    chosen, left_out = [], []
    for operator in operators:
        for sample in [s for s in operator.samples() if s.bench] + peers.samples(operator):
            if labels and not any(label in sample.label for label in labels):
                continue
            for dtype in dtypes:
                moved = cases.traffic(operator, sample, dtype)
                if device.type == "cpu" and moved > LARGE and not everything:
                    left_out.append(
                        f"{operator.name} {sample.label} {dtype} left out: {moved / 1e9:.1f} GB of "
                        "traffic; --all measures it"
                    )
                else:
                    chosen.append((operator, sample, dtype))
    return chosen, left_out


def _checked(case: cases.Case, options: Options) -> tuple[dict[str, cases.Function], bool]:
    """The providers that can compute this case rightly, and whether none was wrong."""
    print(f"\n{case.operator.name}, {case.sample.label}, {case.dtype}")
    functions, fine = {}, True
    for name in options.providers:
        full_name = f"{_name(case.operator.name, case.sample.label, case.dtype)} {name}"
        if not providers.applies(name, case.operator) or full_name in options.failed:
            continue
        try:
            function = providers.find(name, case)
        except providers.Unavailable as e:
            print(f"  {name:<10} not here: {e}")
            continue
        raised = False
        try:
            problem = case.call.problem(function)
        except Exception as e:  # one provider's failure must not end the others' run
            problem = f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"
            raised = True
        if problem:
            print(f"  {name:<10} WRONG, not timed: {problem}")
            fine = False
            if raised:
                _note(full_name, options)
        else:
            functions[name] = function
    return functions, fine


def _timed(
    case: cases.Case,
    functions: Mapping[str, cases.Function],
    options: Options,
    progress: Progress,
) -> list[schema.Timing]:
    """Tables of all modes, printed, as lines."""
    lines = []
    for mode in options.modes:
        made = 0
        if functions and case.has(mode):
            with torch.no_grad() if not case.leaves else nullcontext():
                timings = _table(case, mode, functions, options, progress)
            lines += timings
            made = timings[0].rounds if timings else 0
        progress.update(options.rounds - made)  # those that were not needed or not affordable
    return lines


def _table(
    case: cases.Case,
    mode: str,
    functions: Mapping[str, cases.Function],
    options: Options,
    progress: Progress,
) -> list[schema.Timing]:
    """One mode: every provider, the copy and the matmul in the same rounds."""
    work = case.work(mode)
    moved, device = work.read + work.written, options.device
    entries = {name: case.entry(function, mode) for name, function in functions.items()}
    entries["(copy)"] = timing.copy_entry(moved, device)
    made: Counter[products.Product] = Counter()
    if work.flops:
        made = case.products(mode) or products.square(device, cases.DTYPES[case.dtype])
        entries["(matmul)"], made_flops = products.entry(made, device)
    clock = timing.clock_of(device)
    times = timing.interleave(
        entries, options.rounds, clock,
        before=timing.flusher(device) if options.cold else lambda: None,
        seconds=options.seconds, tick=progress.update,
    )  # fmt: skip
    if not times:
        print(f"  {mode}: left out: {timing.LEAST_ROUNDS} rounds take more than --seconds "
              f"{options.seconds:g}")  # fmt: skip
        return []
    summaries = {name: timing.summarise(values) for name, values in times.items()}
    bytes_per_ms = moved / summaries.pop("(copy)").median
    flops_per_ms = made_flops / summaries.pop("(matmul)").median if made else None
    floor = timing.floor_ms(moved, work.flops, bytes_per_ms, flops_per_ms)
    lines = [
        schema.Timing(
            **asdict(options.setting),
            operator=case.operator.name, provider=name, mode=mode, sample=case.sample.label,
            shapes=case.shapes, dtype=case.dtype, cold=options.cold, rounds=len(times[name]),
            median_ms=s.median, p20_ms=s.p20, p80_ms=s.p80,
            floor_ms=floor, percent_of_floor=100 * floor / s.median,
            bytes=moved, flops=work.flops,
            copy_gbs=bytes_per_ms / 1e6, copy_bytes=moved,
            matmul_gflops=flops_per_ms / 1e6 if flops_per_ms else None,
            matmul_shapes=[[list(f.shape) for f in product] for product in made],
            host_ms=timing.host_ms(clock, entries[name]),
        )
        for name, s in summaries.items()
    ]  # fmt: skip
    print(_shown(lines))
    return lines


def _shown(lines: Sequence[schema.Timing]) -> str:
    first = lines[0]
    limit = f"{first.bytes / 1e6:.1f} MB at {first.copy_gbs:.1f} GB/s (a copy that moves as much)"
    if first.matmul_gflops:
        limit += (
            f", {first.flops / 1e9:.1f} GFLOP at {first.matmul_gflops:.0f} GFLOP/s (torch's own "
            "matmuls of these shapes, or a large one)"
        )
    text = [
        f"  {first.mode}: floor {first.floor_ms:.4g} ms: {limit}; {first.rounds} rounds",
        "    provider    median ms       20%       80% /compiled  floor   host ms",
    ]
    compiled = next((line.median_ms for line in lines if line.provider == providers.COMPILED), None)
    for line in lines:
        ratio = f"{line.median_ms / compiled:.2f}" if compiled else "-"
        host = "-" if line.host_ms is None else f"{line.host_ms:.4g}"
        text.append(
            f"    {line.provider:<10} {line.median_ms:>10.4g} {line.p20_ms:>9.4g} "
            f"{line.p80_ms:>9.4g} {ratio:>9} {line.percent_of_floor:>5.0f}% {host:>9}"
        )
    return "\n".join(text)

"""`python -m bench tune OPERATOR`: better rows for triton_kernels/configs.json, found on this GPU.

For each row that the benchmark sizes reach, it walks from the row as it is: all its neighbours (a
tile size halved or doubled, warps likewise, a stage more or less) and the row's configurations in
bench/candidates.py are compiled, checked against float64 and timed. The walk continues from the
fastest until none is faster. Nothing is tuned at run time.

(With --epilogues it is bench/epilogues.py.)
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from bench import candidates, cases, epilogues, schema, timing
from pgolf.errors import PgolfError
from pgolf.files import atomic_write
from pgolf.ops.operator import OPERATORS, Sample
from pgolf.ops.testing import Call, Function
from pgolf.ops.testing import kernel as kernel_of
from pgolf.triton_kernels import launch as launches
from pgolf.triton_kernels.launch import Config, Launch

MAX_WARPS, MAX_STAGES = 16, 8
FASTER = 0.98  # a neighbour has to save 2 %, or the walk follows noise
REPEATS = 20

Table = dict[str, list[Config]]
Timer = Callable[[Launch], float]  # milliseconds of one launch

DESCRIPTION = """\
Look for faster tile sizes, warps and stages of Triton kernels on this GPU, and write those found
into triton_kernels/configs.json, each with the device, the date and both times as its reason. Rows
that the benchmark sizes do not reach stay as they are, and so does the file if nothing is faster.

With --epilogues, time GEMMs that have a row kernel in their epilogue against cuBLAS and that row
kernel at the recipes' shapes, and write into pgolf/ops/timed.json which is faster on this GPU, for
`ops=auto`. Beside the times stands the rate at which an epilogue should break even.
"""
EPILOG = """\
Afterwards: make test, and `python -m bench aot`, which says whether the new rows spill.

examples:
  python -m bench tune xsa
  python -m bench tune newton_schulz leaky_relu2_mlp --dtype bf16 --dry-run
  python -m bench tune --epilogues
"""


class Tuned(NamedTuple):
    """A row of the table, before and after, with the time of all its launches."""

    kernel: str
    row: int
    before: Config
    after: Config
    before_ms: float
    after_ms: float


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench tune", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("operators", nargs="*", metavar="OPERATOR")
    parser.add_argument("--epilogues", action="store_true",
                        help="choose between them and two steps; all of them if none is named")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(cases.DTYPES))
    parser.add_argument("--sample", nargs="+", default=[], metavar="TEXT",
                        help="only benchmark sizes with this in the label")
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="write each configuration that is tried, as JSON lines")
    parser.add_argument("--dry-run", action="store_true", help="say what is faster, write nothing")
    args = parser.parse_args(argv)
    if not args.operators and not args.epilogues:
        parser.error("name an operator, or --epilogues")
    if args.epilogues and (args.sample or args.json or args.dtype != ["bf16"]):
        parser.error("--epilogues times in bf16, at sizes of its own: no --dtype, --sample, --json")
    try:
        if not torch.cuda.is_available():
            raise PgolfError("torch sees no GPU here, and times of another device would be worth "
                             "nothing: the table is as it was")  # fmt: skip
        device = torch.device("cuda", torch.cuda.current_device())
        if args.epilogues:
            return epilogues.run(args.operators, device, args.dry_run)
        name = torch.cuda.get_device_name(device)
        log = Log(args.json, device, shlex.join(["python", "-m", "bench", "tune", *argv]))
        timer = gpu_timer(device)
        return tune(args.operators, args.dtype, device, name, timer, args.dry_run, log, args.sample)
    except PgolfError as e:
        print(f"python -m bench tune: {e}", file=sys.stderr)
        return e.exit_code


def tune(
    names: list[str],
    dtypes: list[str],
    device: torch.device,
    device_name: str,
    timer: Timer,
    dry_run: bool = False,
    log: "Log | None" = None,
    label_parts: Sequence[str] = (),
) -> int:
    """Tune the kernels of some operators, and write the table if a row became faster.

    Args:
        log: takes each configuration that is tried.
        label_parts: only sizes with one of these in the label; () for all.

    Raises:
        PgolfError: an operator that is unknown, has no Triton kernel, or no such size.
        StorageError: the table cannot be written.
    """
    for name in names:
        if name not in OPERATORS or "triton" not in OPERATORS[name].implementations:
            with_kernels = [n for n, o in OPERATORS.items() if "triton" in o.implementations]
            raise PgolfError(f"no Triton kernel for {name!r}; there are {', '.join(with_kernels)}")
    samples = {name: _samples(name, label_parts) for name in names}
    tuned = []
    for name in names:
        for dtype in dtypes:
            built = [_checked(name, sample, device, dtype) for sample in samples[name]]
            with own_table() as table:
                faster = walk_all(table, built, timer, log)
            _write(faster, device_name, dry_run)
            tuned += faster
    if not tuned:
        print(f"nothing is faster: {launches.TABLE.name} is as it was")
    return 0


def _samples(name: str, label_parts: Sequence[str]) -> list[Sample]:
    """An operator's benchmark sizes that have one of these parts in their labels."""
    every = [sample for sample in OPERATORS[name].samples() if sample.bench]
    samples = [s for s in every if not label_parts or any(part in s.label for part in label_parts)]
    if not samples:
        labels = ", ".join(sample.label for sample in every)
        raise PgolfError(f"--sample {' '.join(label_parts)}: no size of {name}; there are {labels}")
    return samples


@contextlib.contextmanager
def own_table() -> Iterator[Table]:
    """A copy of the configurations that `launch.pick` reads instead of the file."""
    table = {kernel: list(rows) for kernel, rows in launches.configs().items()}
    original, launches.configs = launches.configs, lambda: table
    try:
        yield table
    finally:
        launches.configs = original


class _Checked(NamedTuple):
    """A case, and the kernels that have to compute it rightly."""

    call: Call
    function: Function


def _checked(name: str, sample: Sample, device: torch.device, dtype: str) -> _Checked:
    operator = OPERATORS[name]
    with cases.DrawnOn(device):
        call = Call.of(operator, sample, cases.DTYPES[dtype], device, contiguous=True)
    return _Checked(call, kernel_of(operator, "triton"))


class Log:
    """Writes what was tried, as soon as it was."""

    def __init__(self, file: Path | None, device: torch.device, command: str):
        self.file, self.lines = file, []
        self.setting = asdict(schema.setting(device, command, "default"))

    def add(self, kernel: str, row: int, config: Config, ms: float) -> None:
        if self.file:
            one = schema.Tried(
                **self.setting, kernel=kernel, row=row, blocks=dict(config.blocks),
                num_warps=config.num_warps, num_stages=config.num_stages,
                ms=ms if math.isfinite(ms) else None,
            )  # fmt: skip
            self.lines.append(one)
            schema.write_jsonl(self.file, self.lines)


def walk_all(
    table: Table, built: list[_Checked], timer: Timer, log: Log | None = None
) -> list[Tuned]:
    """Tune each row that these cases reach; `table` keeps the best."""
    reached: dict[tuple[str, int], list[_Checked]] = defaultdict(list)
    for checked in built:
        for at in sorted(_rows_of(table, checked)):
            reached[at].append(checked)
    results = []
    for (kernel, row), users in reached.items():
        before = table[kernel][row]
        best, best_ms, before_ms = _walk(table, kernel, row, users, timer, log)
        table[kernel][row] = best
        if best is not before:
            results.append(Tuned(kernel, row, before, best, before_ms, best_ms))
    return results


def _rows_of(table: Table, checked: _Checked) -> set[tuple[str, int]]:
    """The rows that a case's launches picked."""
    rows = set()

    def handler(launch: Launch) -> None:
        rows.update(
            (kernel, i)
            for kernel, configs in table.items()
            for i, config in enumerate(configs)
            if config is launch.config
        )
        launch()

    with launches.intercepted(handler):
        checked.call.run(checked.function)
    return rows


def _walk(
    table: Table,
    kernel: str,
    row: int,
    users: list[_Checked],
    timer: Timer,
    log: Log | None,
) -> tuple[Config, float, float]:
    """(best configuration, its time, the first one's time) of one row."""
    seen: dict[tuple, float] = {}

    def measured(config: Config) -> float:
        key = (*sorted(config.blocks.items()), config.num_warps, config.num_stages)
        if key not in seen:
            table[kernel][row] = config
            seen[key] = _milliseconds(config, users, timer)
            print(f"  {kernel}[{row}] {describe(config)}: {seen[key]:.4g} ms", flush=True)
            if log:
                log.add(kernel, row, config, seen[key])
        return seen[key]

    best = table[kernel][row]
    first_ms = best_ms = measured(best)
    if math.isinf(first_ms):
        raise PgolfError(f"{kernel}[{row}] itself is wrong on this GPU: run `python -m bench ops`")
    far = candidates.of(kernel, best)
    while True:
        nearest = min([*far, *neighbours(best)], key=measured)
        if measured(nearest) >= FASTER * best_ms:
            return best, best_ms, first_ms
        best, best_ms = nearest, measured(nearest)


def _milliseconds(config: Config, users: list[_Checked], timer: Timer) -> float:
    """Time of all launches with this configuration; infinite if it fails or a result is wrong."""
    total = 0.0

    def handler(launch: Launch) -> None:
        nonlocal total
        if launch.config is config:
            total += timer(launch)
        launch()

    for checked in users:
        try:
            with launches.intercepted(handler):
                problem = checked.call.problem(checked.function)
        except Exception as e:  # too large for the device, or not what the kernel is written for
            print(f"    {type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}")
            return math.inf
        if problem:
            print(f"    wrong: {problem}")
            return math.inf
    return total


def neighbours(config: Config) -> list[Config]:
    """One step away: a tile size or the warps halved or doubled, a stage more or less."""
    steps = []
    for name, size in config.blocks.items():
        if not isinstance(size, bool):  # a switch is another kernel, not another size
            steps += [
                {"blocks": {**config.blocks, name: s}} for s in (size // 2, size * 2) if s >= 1
            ]
    warps, stages = config.num_warps, config.num_stages
    steps += [{"num_warps": w} for w in (warps // 2, warps * 2) if 1 <= w <= MAX_WARPS]
    steps += [{"num_stages": s} for s in (stages - 1, stages + 1) if 1 <= s <= MAX_STAGES]
    return [dataclasses.replace(config, **step) for step in steps]


def describe(config: Config) -> str:
    """'BLOCK_M 128, BLOCK_N 256, 8 warps, 3 stages'."""
    sizes = [f"{name} {size}" for name, size in config.blocks.items()]
    return ", ".join([*sizes, f"{config.num_warps} warps", f"{config.num_stages} stages"])


def gpu_timer(device: torch.device) -> Timer:
    """Median of some launches, each with cold caches."""
    clock, flush = timing.clock_of(device), timing.flusher(device)

    def milliseconds(launch: Launch) -> float:
        times = timing.interleave(
            {"launch": timing.Entry(lambda _: launch())}, REPEATS, clock, before=flush
        )
        return timing.summarise(times["launch"]).median

    return milliseconds


def _write(tuned: list[Tuned], device_name: str, dry_run: bool) -> None:
    """Put the faster rows into the table's file; what another wrote meanwhile stays."""
    table = json.loads(launches.TABLE.read_text(encoding="utf-8"))
    for one in tuned:
        reason = (
            f"tuned on {device_name}, {date.today()}: {one.after_ms:.4g} ms, before "
            f"{one.before_ms:.4g} with {describe(one.before)}"
        )
        print(f"{one.kernel}[{one.row}] {describe(one.after)}: {reason}")
        table[one.kernel][one.row] |= {
            "blocks": dict(one.after.blocks), "num_warps": one.after.num_warps,
            "num_stages": one.after.num_stages, "reason": reason,
        }  # fmt: skip
    if tuned and not dry_run:
        atomic_write(launches.TABLE, formatted(table))
        launches.configs.cache_clear()


def formatted(table: Mapping[str, list[Mapping]]) -> str:
    """The table as configs.json is written: a line for each member of a row."""
    kernels = []
    for kernel, rows in table.items():
        members = [[f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in r.items()] for r in rows]
        body = ",\n".join("    {\n" + ",\n".join(lines) + "\n    }" for lines in members)
        kernels.append(f"  {json.dumps(kernel)}: [\n{body}\n  ]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"

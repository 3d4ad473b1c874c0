"""`python -m bench gpu`: everything that only a GPU can show, in one call, without a network."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_parts, parts
from bench.bundle import BUNDLE, adopt
from pgolf.errors import DataError, PgolfError
from pgolf.files import atomic_write
from pgolf.stop import Stopped, stoppable

RESULTS = parts.ROOT / "bench" / "results"

DESCRIPTION = """\
Measure once what only a GPU can show, from a checkout, with the installed torch: the tests marked
gpu; the record's step (pr1473, one GPU's share of eight) with each choice of operators;
operators at the record's sizes against a copy and cuBLAS; every CUDA and Triton kernel on small
samples under compute-sanitizer; 20 steps of `pgolf train` with our kernels and with the reference;
configurations of the GEMMs. The most valuable parts run first. Each has a share of the time, a log
and JSON lines, written as it runs: a part that is cut off keeps what it has. Text is made up, and
missing parts of the extension are compiled, so nothing is fetched; packages from
`python -m bench bundle` are used.
"""
EPILOG = """\
Exit code: 0 all passed, or there is no GPU; 1 a part failed or took too long; 2 a bad argument.

examples:
  python -m bench gpu --seconds 540 --out OUT
  python -m bench gpu --parts step ops      some of them
  python -m bench gpu --rehearse            the same commands on this CPU, with a tiny model
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--seconds", type=float, default=540.0, metavar="S", help="for all parts (540)")
    add("--out", type=Path, metavar="DIR",
        help="folder of logs and JSON (bench/results/DEVICE; with --rehearse build/rehearsal)")
    add("--parts", nargs="+", default=[], metavar="NAME", choices=gpu_parts.NAMES,
        help=f"some of {', '.join(gpu_parts.NAMES)} (all); of the others stays what is there")
    add("--rehearse", action="store_true",
        help="without a GPU: shows that each part starts and ends; no figure means anything")
    args = parser.parse_args(argv)
    if not (args.rehearse or torch.cuda.is_available()):
        print("torch sees no GPU here: nothing to run; --rehearse tries the commands out")
        return 0
    try:
        with stoppable():
            return _run(args)
    except PgolfError as e:
        print(f"python -m bench gpu: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt as e:
        return e.exit_code if isinstance(e, Stopped) else 130


def _run(args: argparse.Namespace) -> int:
    out = args.out or (
        parts.ROOT / "build" / "rehearsal" if args.rehearse else RESULTS / _device_name()
    )
    out = out.resolve()
    # A rehearsal leaves the extension of the machine that has made the bundle.
    adopted = None if args.rehearse else adopt(BUNDLE)
    site = [str(BUNDLE / "site")] if (BUNDLE / "site").is_dir() else []
    search = os.pathsep.join([*site, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(PYTHONPATH=search, PYTHONUNBUFFERED="1", OMP_WAIT_POLICY="PASSIVE")
    with tempfile.TemporaryDirectory() as scratch:
        sizes = gpu_parts.TINY if args.rehearse else gpu_parts.RECORD
        available = gpu_parts.all_parts(gpu_parts.Place(out, Path(scratch), sizes, adopted))
        names = {*(args.parts or gpu_parts.NAMES), "build"}
        names |= {"data"} if names & {"step", "train"} else set()
        return measure([part for part in available if part.name in names], args.seconds, out)


def measure(chosen: Sequence[parts.Part], seconds: float, out: Path) -> int:
    """Run parts and show the summary, last of all and also when it is interrupted.

    What an earlier call has left of these parts is removed; of others it stays, also in the kept
    summary.

    Returns:
        0, or 1 if a part is not good.

    Raises:
        DataError: an earlier summary cannot be read.
    """
    machine = _machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[parts.Outcome] = []
    earlier = _earlier(out / "summary.json", machine, {part.name for part in chosen})
    for part in chosen:  # what an earlier call has left would be taken for this one's
        for file in parts.results(out, part.name):
            file.unlink()
    places = {name: place for place, name in enumerate(gpu_parts.NAMES)}

    def keep(so_far: list[parts.Outcome]) -> None:
        outcomes[:] = so_far
        lines = earlier + [dataclasses.asdict(outcome) for outcome in so_far]
        lines.sort(key=lambda line: places.get(line["name"], len(places)))
        text = json.dumps({**machine, "parts": lines}, indent=1)
        atomic_write(out / "summary.json", text + "\n")

    try:
        parts.run(chosen, seconds, out, keep)
    finally:
        print(_table(outcomes, out), flush=True)
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _earlier(
    file: Path, machine: Mapping[str, str], now: Collection[str]
) -> list[dict[str, Any]]:
    """What a summary says of parts that do not run now; nothing if it is of another machine."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not all(kept.get(name) == value for name, value in machine.items()):
            return []
        return [part for part in kept["parts"] if part["name"] not in now]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{file} is no summary of `bench gpu`: move it away ({e!r})") from e


def _table(outcomes: Sequence[parts.Outcome], out: Path) -> str:
    text = [f"\nsummary, of {out}"]
    for outcome in outcomes:
        text.append(f"{outcome.name:<10} {outcome.seconds:>4.0f} s  {outcome.verdict}")
        text += [f"    {line}" for line in outcome.says]
    bad = [outcome.name for outcome in outcomes if not outcome.good]
    text.append(f"NOT GOOD: {', '.join(bad)}" if bad else "all passed")
    return "\n".join(text)


def _device_name() -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _machine() -> dict[str, str]:
    """What the figures belong to."""
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        "device": here,
        "python": sysconfig.get_python_version(),
        "torch": torch.__version__,
        "triton": triton or "none",
    }

"""`python -m bench count`: launches, bytes and memory of a step, without a GPU."""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.counting import build, extension
from bench.counting.launches import KINDS, CountingError
from bench.counting.worker import Request, run
from pgolf import recipes
from pgolf.config import parse_overrides
from pgolf.errors import ConfigError, PgolfError, StorageError
from pgolf.extension import CUDA_VARIABLE
from pgolf.files import atomic_write

QAT, EAGER, GRAPHS = "+qat", "+eager", "+graphs"
SETTINGS = (
    "reference",
    "triton",
    "auto",
    "reference" + QAT,
    "reference,fake_quant=triton" + QAT,
    "auto" + QAT,
)
TURN = ("reference", "auto", "auto" + GRAPHS)
DETAILS = ("gemms", "kernels", "aten", "operators", "kernels_rest")
DECODING = ("reference" + EAGER, "auto" + EAGER, "reference", "auto")

DESCRIPTION = """\
Count what a training step does on a GPU, on a machine without one: a stand-in for CUDA's libraries
shows torch an H100, logs every launch and runs none (bench/counting/device). The model is compiled
with torch.compile(fullgraph=True, dynamic=False), in bf16, and one call a pass replaces
FlashAttention 3; the second and third step are counted and must be the same. No time is measured.

Bytes are exact integers under one rule, so that settings can be compared: every launch reads and
writes each tensor once. Kernels of Inductor: its own count for each; products: operands and result
of the call to cuBLAS; Triton kernels of pgolf: the tensors of each launch; its CUDA kernels: the
tensors of each call of a launcher, however many kernels it starts, twice those that the operator
changes in place (but once what weight_cast and muon_momentum only write); other kernels of torch:
the tensors of the call. Caches of the GPU are not modelled.

With --decode, it counts one more token of each sequence, the last of T, with key/value caches:
`step` is the model and `pick` draws from its logits; attention over the caches is one call a layer.
A cache that a token is written into counts as a whole, so the count is above the bytes that move.
Beside it stand the bytes of all weights and of all cached keys and values, which a token reads
once.

With --step, it counts one turn of `pgolf train`'s own loop, on rank 0 of --world ranks, without the
others: launches, waits of the host, copies, allocations, collectives of the GPU, exchanges of the
host's own numbers (control), and the CPU time of the host. That is the least of ten turns on this
machine; on a busy one it is more.
"""
EPILOG = """\
Columns: inductor, Triton kernels that Inductor wrote; ours, kernels of pgolf; aten, other
kernels of torch; gemm, calls of cuBLAS; then attention, memsets and copies.
With +qat, block matrices pass through fake_quant, switched off, as in a run with late QAT; with
+eager there is no torch.compile, with +graphs (and --step) steps are replayed as CUDA graphs.
Exit code: 0 counted, 2 a bad argument, no counting device here, or counts that do not add up.

examples:
  python -m bench count
  python -m bench count pr1473 --ops reference+qat --ops reference,fake_quant=triton+qat
  python -m bench count demo --micro 16x256 --json counts.json layers=4
  python -m bench count pr1473 --decode --micro 64x2048
  python -m bench count pr1473 --step --world 8 --ops reference --ops auto+graphs
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    try:
        requests = _requests(args)
        command = "python -m bench count " + shlex.join(argv)
        results = count(requests, lambda text: print(text, flush=True), args.detail)
        if args.json:
            write(args.json, results, requests[0], command.strip())
    except PgolfError as e:
        print(f"python -m bench count: {e}", file=sys.stderr)
        return e.exit_code
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench count", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", default="pr1473", help="default: pr1473")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument(
        "--ops", action="append", metavar="CHOICE",
        help="operators as ops= of a run names them, +graphs, +qat, +eager; may be repeated "
        f"(default: {', then '.join(SETTINGS)}; with --decode {', then '.join(DECODING)}; "
        f"with --step {', then '.join(TURN)})",
    )  # fmt: skip
    parser.add_argument(
        "--micro", default="48x2048", metavar="NxT", help="sequences x tokens of a pass"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--step", action="store_true", help="count a whole turn of the training loop")
    kind.add_argument(
        "--decode", action="store_true", help="count token T of N sequences, not a training step"
    )
    parser.add_argument("--world", type=int, metavar="N", default=1, help="ranks, with --step")
    parser.add_argument(
        "--detail", action="store_true", help="shapes of the products, kernels, operators"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path,
        help="write the counts; those of other versions of torch and triton in it are kept",
    )  # fmt: skip
    return parser.parse_args(argv)


def _requests(args: argparse.Namespace) -> list[Request]:
    """What to count, in order.

    Raises:
        ConfigError: an argument that means nothing.
    """
    sequences, times, tokens = args.micro.replace(" ", "").partition("x")
    if not (times and sequences.isdigit() and tokens.isdigit() and int(sequences) and int(tokens)):
        raise ConfigError(f"--micro {args.micro}: it is sequences x tokens, as 48x2048")
    overrides = parse_overrides(args.overrides)
    recipes.get(args.recipe).config({**overrides, "seq_len": int(tokens)})
    if args.world < 1 or (args.world > 1 and not args.step):
        raise ConfigError(f"--world {args.world}: 1 or more, and with --step")
    base = Request(
        args.recipe, overrides, sequences=int(sequences), tokens=int(tokens), decode=args.decode,
        turn=args.step, world=args.world,
    )  # fmt: skip
    usual = DECODING if args.decode else TURN if args.step else SETTINGS
    return [setting(base, text) for text in args.ops or usual]


def setting(base: Request, text: str) -> Request:
    """`base` with the operators, the late QAT and the eager mode that `text` names.

    Raises:
        ConfigError: it names an attention, or graphs without the loop.
    """
    if "attention=" in text:
        raise ConfigError(f"--ops {text}: attention counts as one call a pass: leave it out")
    ops = text.removesuffix(EAGER)
    qat = ops.endswith(QAT)
    ops = ops.removesuffix(QAT)
    graphs = ops.endswith(GRAPHS)
    if graphs and not base.turn:
        raise ConfigError(f"--ops {text}: graphs are of the training loop, so with --step")
    return replace(
        base, ops=ops.removesuffix(GRAPHS), graphs=graphs, qat=qat,
        compiled=not text.endswith(EAGER),
    )  # fmt: skip


def name_of(request: Request) -> str:
    """The text of a request's setting."""
    suffixes = (GRAPHS, request.graphs), (QAT, request.qat), (EAGER, not request.compiled)
    return request.ops + "".join(name for name, there in suffixes if there)


def count(
    requests: Iterable[Request], say: Any = lambda text: None, detail: bool = False
) -> dict[str, dict[str, Any]]:
    """Setting -> counts, of `worker.count` without the graphs.

    Args:
        say: is given each part of the report as it is ready.

    Raises:
        Unavailable: there is no counting device here.
        CountingError: a setting could not be counted.
    """
    folder = build.build()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = dict(build.environment(folder, Path(scratch)))
        if complaint := extension.missing():
            say(f"without the kernels of pgolf's extension: {complaint}")
        else:
            environment[CUDA_VARIABLE] = str(extension.build())
        for request in requests:
            name = name_of(request)
            result = run(request, environment)
            first = results.get(name_of(replace(request, ops="reference", graphs=False)))
            results[name] = {k: result[k] for k in ("device", "versions", "phases")}
            table = _turn_lines if request.turn else _lines
            say("\n".join(table(name, result, first)))
            if detail:
                say("\n".join(_details(result)))
    return results


def _lines(name: str, result: dict, reference: dict | None) -> Iterator[str]:
    """The table of one setting, and how it differs from the reference."""
    yield f"\n{name}   ({result['device']}, {version_of(result)})"
    yield f"  {'':22}" + "".join(f"{kind:>16}" for kind in (*KINDS, "total"))
    for phase, part in result["phases"].items():
        for what in ("launches", "bytes"):
            label = f"{phase} {what}"
            yield f"  {label:22}" + "".join(f"{n:>16,}" for n in part[what].values())
        yield f"  {phase + ' peak memory':22}{part['peak_memory']:>16,}"
        for name, least in part.get("least_bytes", {}).items():
            yield f"  {'bytes of ' + name:22}{least:>16,}"
    for what in ("launches", "bytes"):
        total = total_of(result, what)
        line = f"  {' + '.join(result['phases'])}: {total:,} {what}"
        if reference is not None:
            before = total_of(reference, what)
            line += f", {total - before:+,} ({100 * (total / before - 1):+.1f} %) to the reference"
        yield line


def _turn_lines(name: str, result: dict, reference: dict | None) -> Iterator[str]:
    """What a turn of the loop does, and what that of the reference did."""
    yield f"\n{name}   ({result['device']}, {version_of(result)})"
    before = reference["phases"]["turn"] if reference else {}
    for label, value in result["phases"]["turn"].items():
        if label in DETAILS:
            continue
        values = [
            ", ".join(f"{k} {v:,}" for k, v in each.items()) or "none"
            if isinstance(each, dict)
            else f"{each:,}"
            for each in (value, before.get(label, value))
        ]
        differs = f"   (reference: {values[1]})" * (values[0] != values[1])
        yield f"  {label.replace('_', ' '):26}{values[0]}{differs}"
    if before:
        ratio = result["phases"]["turn"]["host_ms"]["turn"] / before["host_ms"]["turn"]
        yield f"  {'host, part of reference':26}{ratio:.3f}"


def _details(result: dict) -> Iterator[str]:
    for phase, part in result["phases"].items():
        for label in DETAILS:
            for name, value in part.get(label, {}).items():
                yield f"  {phase} {label} {name}: {value}"


def version_of(result: dict) -> str:
    """The versions that a count belongs to."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def total_of(result: dict, what: str) -> int:
    """Launches or bytes of a whole step, or of a decoded token."""
    return sum(phase[what]["total"] for phase in result["phases"].values())


def write(path: Path, results: dict[str, dict], request: Request, command: str) -> None:
    """Put the counts of the installed versions into a file, beside those of others.

    Raises:
        StorageError: the file can't be written, or what is there is not such a file.
        ConfigError: it holds counts of something else.
    """
    what = asdict(replace(request, ops="", qat=False, compiled=True, graphs=False))
    del what["graphs"]
    if not request.turn:
        del what["turn"], what["world"]
    table = {"command": command, "counted": what, "versions": {}}
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["counted"] != what:
                raise ConfigError(f"{path} holds counts of {before['counted']}: choose another")
            table["versions"] = before["versions"]
        except (ValueError, KeyError, OSError) as e:
            raise StorageError(f"{path} is not a table of counts: {e!r}") from None
    versions = {version_of(result) for result in results.values()}
    if len(versions) != 1:
        raise CountingError(f"counts of several versions in one run: {versions}")
    table["versions"][versions.pop()] = {
        name: {"device": result["device"], **result["phases"]} for name, result in results.items()
    }
    atomic_write(path, json.dumps(table, indent=1) + "\n")

"""`python -m bench aot`: compile every Triton and CUDA kernel and check what came out."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.aot_checks import cuda_limits, differences, unreached
from pgolf.errors import PgolfError
from pgolf.files import atomic_write

TABLE = Path(__file__).parent / "results" / "aot.json"

DESCRIPTION = """\
Compile every Triton kernel, with every configuration of triton_kernels/configs.json, for sm_90
(H100), and every kernel of csrc/cuda with nvcc for sm_80 and sm_90a; read registers, shared memory,
spills and instructions from the result. Needs triton, and nvcc with g++, but no GPU: nothing runs,
and no time is measured. Without an nvcc in $CUDA_HOME/bin or on PATH: pip install -e '.[nvcc]'.

Checked always, for every compiled kernel:
  - nothing spills to local memory, and shared memory fits into a block of an H100 (232,448 bytes);
  - the instructions that the kernel is built around are there: tensor cores (HGMMA) in the bf16
    GEMMs, TMA (UTMALDG) where descriptors are used, 16-byte loads and stores in the row kernels
    (of CUDA kernels: in all instances but the scalar ones, which take any address), correctly
    rounded division in fake_quant and weight_cast;
  - every row of configs.json is reached by a launch of bench/aot_cases.py.
Checked where the table knows the installed versions of triton and ptxas, or of nvcc: every figure
is the one in the table. A change that is meant is written there with --update.
"""
EPILOG = """\
Columns: registers a thread; shared memory in bytes a block; local, the loads and stores of what did
not fit into registers; then how often an instruction stands in the kernel, all and some.
Exit code: 0 all holds, 1 something does not (each on a line of its own), 2 cannot run here.
Compiled kernels stay in Triton's cache (TRITON_CACHE_DIR) and in build/aot, keyed by their source
and versions.

examples:
  python -m bench aot                              the gate
  python -m bench aot --kernel leaky_relu2_up_tma  one kernel
  python -m bench aot --compiler nvcc              csrc/cuda only
  python -m bench aot --update                     after a change that is meant; commit the table
  pip install --target DIR triton==3.5.1 && PYTHONPATH=DIR python -m bench aot
                                                   the same with another version of triton
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    try:
        return _gate(args)
    except PgolfError as e:
        print(f"python -m bench aot: {e}", file=sys.stderr)
        return e.exit_code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench aot", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--kernel", metavar="NAME", help="only this kernel of configs.json or csrc/cuda"
    )
    parser.add_argument(
        "--compiler", choices=("triton", "nvcc"), help="only what this one compiles (both)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", default=TABLE,
        help="the figures to compare with (bench/results/aot.json)",
    )  # fmt: skip
    parser.add_argument(
        "--update", action="store_true",
        help="write the figures of these versions into the table instead of comparing; not if a "
        "check that holds for all versions fails",
    )  # fmt: skip
    return parser.parse_args(argv)


@dataclass
class _Half:
    """What one compiler made: figures by row name, and what is wrong with them."""

    versions: str
    rows: dict[str, dict[str, Any]]
    failures: list[str]
    verdict: str = ""

    def compare(self, table: dict[str, Any], only: str | None, update: bool, name: str) -> None:
        """With the table, or write into it."""
        recorded = {
            n: r for n, r in table.get(self.versions, {}).items() if only in (None, r["kernel"])
        }
        self.verdict = f"{self.versions} not in {name}: only the fixed limits were checked"
        if update and not self.failures:
            rows = table.setdefault(self.versions, {})
            for old in recorded:
                del rows[old]
            rows.update(self.rows)
            self.verdict = f"{self.versions} written to {name}"
        elif self.versions in table:
            self.failures += differences(self.rows, recorded)
            self.verdict = f"{self.versions} compared with {name}"


def _gate(args: argparse.Namespace) -> int:
    # Triton reads it when it is imported, and interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    if importlib.util.find_spec("triton") is None:
        raise PgolfError(
            "triton is not installed: pip install triton (it comes with torch's CUDA builds, and "
            "needs no GPU for this; CUDA kernels are read with its tools)"
        )
    of_triton, of_nvcc = _wanted(args.kernel, args.compiler)
    table = json.loads(args.table.read_text(encoding="utf-8")) if args.table.exists() else {}
    print(HEADER)
    halves = [_triton_half(of_triton)] if of_triton else []
    halves += [_nvcc_half(args.kernel)] if of_nvcc else []
    for half in halves:
        half.compare(table, args.kernel, args.update, args.table.name)
    if args.update and not any(half.failures for half in halves):
        atomic_write(args.table, json.dumps(table, indent=1, sort_keys=True) + "\n")
    rows = {name: row for half in halves for name, row in half.rows.items()}
    failures = [failure for half in halves for failure in half.failures]
    if args.json:
        versions = ", ".join(half.versions for half in halves)
        result = {"versions": versions, "rows": rows, "failures": failures}
        atomic_write(args.json, json.dumps(result, indent=1, sort_keys=True) + "\n")
    for failure in failures:
        print(f"FAILED {failure}")
    verdict = "; ".join(half.verdict for half in halves)
    print(f"{len(rows)} compiled, {len(failures)} failures; {verdict}")
    return 1 if failures else 0


def _wanted(only: str | None, compiler: str | None) -> tuple[dict[str, int], bool]:
    """(kernel of configs.json -> how many rows it has there, whether csrc/cuda is compiled)."""
    from bench.aot_cuda import kernels
    from pgolf.triton_kernels.launch import configs

    of_triton = {kernel: len(table) for kernel, table in configs().items()}
    of_triton = of_triton if compiler in (None, "triton") else {}
    of_nvcc = kernels() if compiler in (None, "nvcc") else set()
    if only is None:
        return of_triton, bool(of_nvcc)
    if only not in of_triton and only not in of_nvcc:
        known = ", ".join(sorted({*of_triton, *of_nvcc}))
        raise PgolfError(f"no kernel is named {only!r}; there are {known}")
    return {n: rows for n, rows in of_triton.items() if n == only}, only in of_nvcc


def _triton_half(kernels: dict[str, int]) -> _Half:
    from bench import sass
    from bench.aot_cases import cases
    from bench.aot_compile import compile_cases

    versions = sass.versions()
    print(f"sm_90, {versions}: {len(kernels)} kernels, {sum(kernels.values())} configurations")
    report = compile_cases(cases(), kernels, _say)
    return _Half(versions, report.rows, report.failures + unreached(report.reached, kernels))


def _nvcc_half(only: str | None) -> _Half:
    from bench import aot_cuda

    versions = aot_cuda.versions()
    print(f"{' and '.join(aot_cuda.ARCHS)}, {versions}: csrc/cuda")
    rows = aot_cuda.compile_all(only, _say)
    return _Half(versions, rows, [f for n, row in rows.items() for f in cuda_limits(n, row)])


HEADER = f"{'kernel: case':58} {'registers':>9} {'shared':>7} {'local':>5}  instructions"


def _say(name: str, row: Mapping[str, Any]) -> None:
    counts = row["instructions"]
    local = counts.get("LDL", 0) + counts.get("STL", 0)
    shown = " ".join(f"{n} {opcode}" for opcode, n in counts.items())
    print(f"{name:58} {row['registers']:9} {row['shared']:7} {local:5}  {shown}", flush=True)

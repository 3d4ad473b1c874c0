"""`python -m bench aot`: compile every Triton kernel for sm_90 and check what came out."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.aot_checks import differences, unreached
from pgolf.errors import PgolfError
from pgolf.files import atomic_write

TABLE = Path(__file__).parent / "results" / "aot.json"

DESCRIPTION = """\
Compile every Triton kernel, with every configuration of triton_kernels/configs.json, for sm_90
(H100) and read registers, shared memory, spills and instructions from the result. Needs triton, but
no GPU: nothing runs, and no time is measured.

Checked always, for every compiled kernel:
  - nothing spills to local memory, and shared memory fits into a block of an H100 (232,448 bytes);
  - the instructions that the kernel is built around are there: tensor cores (HGMMA) in the bf16
    GEMMs, TMA (UTMALDG) where descriptors are used, 16-byte loads and stores in the row kernels,
    correctly rounded division in fake_quant;
  - every row of configs.json is reached by a launch of bench/aot_cases.py.
Checked where the table knows the installed versions of triton and ptxas: every figure is the one in
the table. A change that is meant is written there with --update.
"""
EPILOG = """\
Columns: registers a thread; shared memory in bytes a block; local, the loads and stores of what did
not fit into registers; then how often an instruction stands in the kernel, all and some.
Exit code: 0 all holds, 1 something does not (each on a line of its own), 2 cannot run here.
Compiled kernels stay in Triton's cache (TRITON_CACHE_DIR), keyed by their source and versions.

examples:
  python -m bench aot                              the gate
  python -m bench aot --kernel leaky_relu2_up_tma  one kernel
  python -m bench aot --update                     after a change that is meant; commit the table
  pip install --target DIR triton==3.5.1 && PYTHONPATH=DIR python -m bench aot
                                                   the same with another version of triton
"""


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    try:
        return _gate(args.kernel, args.table, args.json, args.update)
    except PgolfError as e:
        print(f"python -m bench aot: {e}", file=sys.stderr)
        return e.exit_code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench aot", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kernel", metavar="NAME", help="only this kernel of configs.json")
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


def _gate(only: str | None, table_path: Path, json_path: Path | None, update: bool) -> int:
    # Triton reads it when it is imported, and interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    if importlib.util.find_spec("triton") is None:
        raise PgolfError(
            "triton is not installed: pip install triton (it comes with torch's CUDA builds, and "
            "needs no GPU for this)"
        )
    from bench import sass
    from bench.aot_cases import cases
    from bench.aot_compile import compile_cases

    kernels = _kernels(only)
    versions = sass.versions()
    table = json.loads(table_path.read_text(encoding="utf-8")) if table_path.exists() else {}
    print(f"sm_90, {versions}: {len(kernels)} kernels, {sum(kernels.values())} configurations")
    print(HEADER)
    report = compile_cases(cases(), kernels, _say)
    failures = report.failures + unreached(report.reached, kernels)
    verdict = f"these versions are not in {table_path.name}: only the fixed limits were checked"
    if update and not failures:
        kept = {n: r for n, r in table.get(versions, {}).items() if r["kernel"] not in kernels}
        table[versions] = kept | report.rows
        atomic_write(table_path, json.dumps(table, indent=1, sort_keys=True) + "\n")
        verdict = f"written to {table_path}"
    elif versions in table:
        recorded = {n: r for n, r in table[versions].items() if only in (None, r["kernel"])}
        failures += differences(report.rows, recorded)
        verdict = f"compared with {table_path.name}"
    if json_path:
        result = {"versions": versions, "rows": report.rows, "failures": failures}
        atomic_write(json_path, json.dumps(result, indent=1, sort_keys=True) + "\n")
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(report.rows)} compiled, {len(failures)} failures; {verdict}")
    return 1 if failures else 0


def _kernels(only: str | None) -> dict[str, int]:
    """Kernel -> how many rows configs.json has for it."""
    from pgolf.triton_kernels.launch import configs

    rows = {kernel: len(table) for kernel, table in configs().items()}
    if only is not None and only not in rows:
        raise PgolfError(f"no kernel is named {only!r}; there are {', '.join(sorted(rows))}")
    return rows if only is None else {only: rows[only]}


HEADER = f"{'kernel: case':58} {'registers':>9} {'shared':>7} {'local':>5}  instructions"


def _say(name: str, row: Mapping[str, Any], seconds: float) -> None:
    counts = row["instructions"]
    local = counts.get("LDL", 0) + counts.get("STL", 0)
    shown = " ".join(f"{n} {opcode}" for opcode, n in counts.items())
    line = f"{name:58} {row['registers']:9} {row['shared']:7} {local:5}  {shown} ({seconds:.1f} s)"
    print(line, flush=True)

"""`python -m bench aot`: compile every Triton and CUDA kernel and check what came out."""

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.aot_checks import EXECUTED, Row, differences
from pgolf.errors import PgolfError
from pgolf.files import atomic_write

TABLE = Path(__file__).parent / "results" / "aot.json"
Table = dict[str, dict[str, Row]]  # versions -> row name -> figures

DESCRIPTION = """\
Compile every Triton kernel, with every configuration of triton_kernels/configs.json and of
bench/candidates.py, for sm_90 (H100), and every kernel of csrc/cuda with nvcc for sm_80 and sm_90a;
read registers, shared memory, spills and instructions from the result. Needs triton, and nvcc with
g++, but no GPU: nothing runs, and no time is measured. Without an nvcc in $CUDA_HOME/bin or on
PATH: pip install -e '.[nvcc]'.

It always checks that nothing spills to local memory, that shared memory fits into a block of an
H100 (232,448 bytes), that blocks meant to share an SM (PER_SM) fit there, that kernels have their
required instructions (REQUIRED in bench/aot_checks.py), and that launches of bench/aot_cases.py
reach every row of configs.json. If the table knows the installed versions of triton and ptxas, or
of nvcc, it also checks that every figure is the one in the table, and that executed instructions,
with the loops declared in bench/aot_items.py, are at most 5 % more.
"""
EPILOG = """\
Columns: registers a thread; shared memory in bytes a block; local loads and stores; then the number
of each required instruction; for some kernels, the instructions that a warp executes for its share
of the work, in all and for 16 bytes that a lane moves to or from memory. Exit code: 0 all checks
pass, 1 some fail (one line each), 2 cannot run here. Compiled kernels stay in Triton's cache and in
build/aot.

examples:
  python -m bench aot                              the gate
  python -m bench aot --kernel leaky_relu2_up_tma  one kernel
  python -m bench aot --only qk_rope               executed instructions, in the table and now
  python -m bench aot --model                      expected times, by a model
  python -m bench aot --update                     after an intended change; commit the table
  pip install --target DIR triton==3.5.1 && PYTHONPATH=DIR python -m bench aot
                                                   the same with another version of triton
"""
HEADER = f"{'kernel: case':58} {'registers':>9} {'shared':>7} {'local':>5}  instructions"


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench aot", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kernel", metavar="NAME", help="only this one, Triton's or CUDA's")
    parser.add_argument(
        "--compiler", choices=("triton", "nvcc"), help="only what this one compiles (both)"
    )
    parser.add_argument(
        "--only", metavar="PREFIX",
        help="only the executed instructions of the CUDA kernels whose names begin so: in the "
        "table -> now",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="store_true",
        help="only the times of the CUDA kernels, of those of --only if it is there, that a model "
        "expects on an H100 and an H200, beside those measured",
    )  # fmt: skip
    parser.add_argument("--table", type=Path, metavar="FILE", default=TABLE, help=f"({TABLE.name})")
    parser.add_argument(
        "--update", action="store_true",
        help="write the figures of these versions into the table instead of comparing; not if a "
        "check that holds for all versions fails",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        table = _table(args.table)
        if args.model:
            return _model(args.only or "")
        return _gate(args, table) if args.only is None else _executed(args.only, table, args.table)
    except PgolfError as e:
        print(f"python -m bench aot: {e}", file=sys.stderr)
        return e.exit_code


def _table(path: Path) -> Table:
    """The table of a file, {} where there is none, when all is there that reads kernels.

    Raises:
        PgolfError: triton is not installed.
    """
    # Triton reads it when it is imported, and interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    if importlib.util.find_spec("triton") is None:
        raise PgolfError(
            "triton is not installed: pip install triton (it comes with torch's CUDA builds, and "
            "needs no GPU for this; CUDA kernels are read with its tools)"
        )
    return json.loads(path.read_text()) if path.exists() else {}


def _executed(prefix: str, table: Table, path: Path) -> int:
    """The gate for executed instructions alone; `path` is the table's file."""
    from bench import aot_cuda, aot_items

    versions = aot_cuda.versions()
    recorded = aot_items.by_kernel(table.get(versions, {}))
    rows, failures = aot_cuda.executed(prefix)
    lines = [*aot_items.lines(rows, recorded)]
    if versions in table:
        now = {kernel: _part(row) for kernel, row in aot_items.by_kernel(rows).items()}
        before = {kernel: _part(recorded[kernel]) for kernel in now if kernel in recorded}
        failures += differences(now, before)
    else:
        lines.append(f"{versions} not in {path.name}: nothing was compared")
    print("\n".join([*lines, *(f"FAILED {text}" for text in failures)]))
    return 1 if failures else 0


def _model(prefix: str) -> int:
    from bench import aot_cuda, aot_model

    rows, failures = aot_cuda.executed(prefix)
    lines = aot_model.page(rows, aot_model.results(TABLE.parent))
    print("\n".join([*lines, *(f"FAILED {text}" for text in failures)]))
    return 1 if failures else 0


def _part(row: Row) -> Row:
    return {figure: row[figure] for figure in EXECUTED if figure in row}


def _gate(args: argparse.Namespace, table: Table) -> int:
    print(HEADER)
    count, failures, verdicts = 0, [], []
    for versions, rows, wrong in _compiled(args.kernel, args.compiler):
        known = versions in table and not args.update
        if known:
            recorded = {n: r for n, r in table[versions].items() if _is_of(n, args.kernel)}
            wrong += differences(rows, recorded)
        verdict = f"compared with {args.table.name}"
        if not known:
            verdict = f"not in {args.table.name}: only the fixed limits were checked"
        if args.update and not wrong:
            kept = {n: r for n, r in table.get(versions, {}).items() if not _is_of(n, args.kernel)}
            table[versions], verdict = kept | rows, f"written to {args.table.name}"
        count, failures = count + len(rows), failures + wrong
        verdicts.append(f"{versions} {verdict}")
    if args.update and not failures:
        atomic_write(args.table, _text(table))
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{count} compiled, {len(failures)} failures; {'; '.join(verdicts)}")
    return 1 if failures else 0


def _compiled(
    only: str | None, compiler: str | None
) -> Iterator[tuple[str, dict[str, Row], list[str]]]:
    """(versions, figures by row name, what is wrong with them) of each compiler that is selected.

    Raises:
        PgolfError: there is no kernel of that name.
    """
    from bench import aot_cuda, sass
    from pgolf.triton_kernels.launch import configs

    rows_of = {kernel: len(table) for kernel, table in configs().items()}
    of_triton, of_nvcc = rows_of.keys(), aot_cuda.kernels()
    if only not in {None, *of_triton, *of_nvcc}:
        known = ", ".join(sorted({*of_triton, *of_nvcc}))
        raise PgolfError(f"no kernel is named {only!r}; there are {known}")
    if compiler != "nvcc" and (only is None or only in of_triton):
        from bench.aot_compile import compile_all

        selected = {n: rows for n, rows in rows_of.items() if only in (None, n)}
        yield sass.versions(), *compile_all(selected, _say)
    if compiler != "triton" and (only is None or only in of_nvcc):
        yield aot_cuda.versions(), *aot_cuda.compile_all(only, _say)


def _is_of(name: str, kernel: str | None) -> bool:
    """Whether a row is one of this kernel."""
    return kernel in (None, re.split("[<:]", name)[0])


def _text(table: Table) -> str:
    """As JSON, a line a row."""
    versions = []
    for name, rows in sorted(table.items()):
        lines = (f"  {json.dumps(n)}: {json.dumps(row)}" for n, row in sorted(rows.items()))
        versions.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def _say(name: str, row: Row) -> None:
    counted = [(n, figure) for figure, n in list(row.items())[3:] if figure not in EXECUTED]
    parts = [f"{n} {opcode}" for n, opcode in counted if n]
    if "instructions" in row:
        parts.append(f"{row['instructions']} executed, {row['per_16_bytes']} for 16 bytes")
    figures = f"{row['registers']:9} {row['shared']:7} {row['spills']:5}"
    print(f"{name:58} {figures}  {' '.join(parts)}", flush=True)

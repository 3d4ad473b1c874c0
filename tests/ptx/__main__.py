"""`python -m tests.ptx`: run the checks of what Triton and nvcc emit, and say what each found."""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable

from .faults import Missing

FAMILIES = ("triton", "nvcc")

DESCRIPTION = """\
Execute the PTX that Triton or nvcc emit for sm_90, on a CPU, and check what it computes. Each line
of the output is a JSON object: check, why (empty if it passed), seconds of CPU time.
"""


def main(argv: list[str]) -> int:
    """The command line; 0 if every check passed, 1 if not, 2 if they cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=DESCRIPTION)
    parser.add_argument("family", choices=FAMILIES, help="whose PTX")
    parser.add_argument("--only", metavar="TEXT", default="", help="checks with this in their name")
    parser.add_argument(
        "--mutants", type=int, metavar="N", default=0,
        help="run N mutants of each class of each kernel instead",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="say what noticed each mutant")
    args = parser.parse_args(argv)
    try:
        checks = load(args.family)
    except Missing as e:
        print(f"python -m tests.ptx {args.family}: {e}", file=sys.stderr)
        return 2
    if args.mutants:
        from .prove import prove

        complaints = prove(args.family, checks, args.mutants, args.only, args.verbose)
        print(*(f"FAILED {complaint}" for complaint in complaints), sep="\n")
        return 1 if complaints else 0
    failed = 0
    for name, check in checks.items():
        if args.only not in name:
            continue
        start, why = time.process_time(), ""
        try:
            check()
        except Exception as e:  # whatever is wrong with a kernel is reported, and the next one runs
            why = f"{type(e).__name__}: {e}"
            failed += 1
        line = {"check": name, "why": why, "seconds": round(time.process_time() - start, 2)}
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


def load(family: str) -> dict[str, Callable[[], None]]:
    """The checks of a family by name.

    Raises:
        Missing: they cannot run here.
    """
    # Triton reads it when it is imported. Interpreted kernels have no PTX; for nvcc's, the tests
    # that are run on them expect that Triton interprets.
    os.environ["TRITON_INTERPRET"] = "0" if family == "triton" else "1"
    import torch

    torch.set_num_threads(1)
    return importlib.import_module(f"tests.ptx.{family}_checks").checks()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

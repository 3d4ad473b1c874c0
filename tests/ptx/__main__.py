"""`python -m tests.ptx`: run the checks of what Triton and nvcc emit, and say what each found."""

import argparse
import importlib
import json
import os
import sys
import time

FAMILIES = ("triton", "nvcc")

DESCRIPTION = """\
Execute the PTX that Triton or nvcc emit for sm_90, on a CPU, and check what it computes. Each line
of the output is a JSON object: check, why (empty if it passed), seconds of CPU time.
"""


def main(argv: list[str]) -> int:
    """The command line; 0 if every check passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=DESCRIPTION)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--only", metavar="TEXT", default="", help="checks with this in their name")
    args = parser.parse_args(argv)
    checks = {n: c for n, c in load(args.family).items() if args.only in n}
    failed = 0
    for name, check in checks.items():
        start, why = time.process_time(), ""
        try:
            check()
        except Exception as e:  # whatever is wrong with a kernel is reported, and the next one runs
            why = f"{type(e).__name__}: {e}"
            failed += 1
        line = {"check": name, "why": why, "seconds": round(time.process_time() - start, 2)}
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


def load(family: str) -> dict:
    """The checks of a family by name."""
    # Triton reads it when it is imported, and interpreted kernels have no PTX.
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    torch.set_num_threads(1)
    return importlib.import_module(f"tests.ptx.{family}_checks").CHECKS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

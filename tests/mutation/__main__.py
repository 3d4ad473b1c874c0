"""`python -m tests.mutation [KERNEL ...]`: which wrong changes to a kernel do its checks notice?"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

# Kernels are interpreted, also where there is a GPU: a mutant may write anywhere.
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from tests.triton.interpreter import repair  # noqa: E402

from .checks import CHECKS  # noqa: E402
from .interpreter import poison_masked_lanes  # noqa: E402
from .kernels import kernel_mutants, kernels, put_in_place  # noqa: E402
from .mutator import shuffled  # noqa: E402
from .runner import judge, run, run_original  # noqa: E402

SURVIVORS = Path(__file__).with_name("survivors.json")  # kernel -> mutant -> why it is no mistake
SEED = 1
COUNT = 40
SHARE = 0.9  # of those that run have to be noticed
# What is refused because of types or shapes proves nothing about the checks.
REFUSED = ("InterpreterError", "CompilationError", "SyntaxError", "NameError")

DESCRIPTION = """\
Make small wrong changes (mutants) to the Triton kernels and run a few checks on each, in Triton's
interpreter and in a process of its own. A mutant that passes all checks has survived: either it is
equivalent, and listed in tests/mutation/survivors.json with the reason, or a check is missing.
"""


def main(argv: list[str]) -> int:
    """The command line; 0 if every kernel's checks notice enough, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=DESCRIPTION)
    parser.add_argument("kernel", nargs="*", help="kernels of configs.json (all of them)")
    parser.add_argument(
        "--count", type=int, default=COUNT, help="mutants of each kernel that run (%(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="show all mutants and stop")
    parser.add_argument("--verbose", action="store_true", help="say what noticed each mutant")
    args = parser.parse_args(argv)
    chosen = args.kernel or kernels()
    if unknown := set(chosen) - set(kernels()):
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(kernels())}")
    torch.set_num_threads(1)  # also because threads do not survive a fork
    repair()
    poison_masked_lanes()
    complaints = []
    for kernel in chosen:
        if args.list:
            print(*(mutant.name for mutant in shuffled(kernel_mutants(kernel), SEED)), sep="\n")
        else:
            complaints += [f"{kernel}: {text}" for text in prove(kernel, args.count, args.verbose)]
    for complaint in complaints:
        print(f"FAILED {complaint}")
    return 1 if complaints else 0


def prove(kernel: str, count: int, verbose: bool = False) -> list[str]:
    """Run `count` mutants of a kernel, show how it went, return what is not as it should be."""
    checks = CHECKS.get(kernel)
    if checks is None:
        return ["tests/mutation/checks.py has no checks of it"]
    original = run_original(checks, limit=120.0)
    if original.why:
        return [f"the checks fail without any change: {original.why}"]
    limit = max(10.0, 10 * original.seconds)
    start, refused, results = time.monotonic(), 0, {}
    waiting = shuffled(kernel_mutants(kernel), SEED)
    with tempfile.TemporaryDirectory() as folder:
        while waiting and len(results) < count:
            more = count - len(results)
            batch, waiting = waiting[:more], waiting[more:]
            for outcome in run(batch, lambda m: put_in_place(m, folder), checks, limit):
                if outcome.why.startswith(REFUSED):
                    refused += 1
                    continue
                results[outcome.mutant.name] = outcome.why
                if verbose or not outcome.why:
                    print(f"  {outcome.mutant.name}\n    {outcome.why or 'SURVIVED'}", flush=True)
    print(
        f"{kernel}: {sum(map(bool, results.values()))} of {len(results)} mutants caught, {refused} "
        f"more refused by the interpreter, in {time.monotonic() - start:.0f} s (the checks alone "
        f"take {original.seconds:.1f} s of CPU time)",
        flush=True,
    )
    listed = json.loads(SURVIVORS.read_text(encoding="utf-8")).get(kernel, {})
    return judge(results, listed, SHARE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m tests.mutation [KERNEL ...]`: which wrong changes to a kernel do its checks notice?"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Kernels are interpreted, also where there is a GPU: a mutant may write anywhere.
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from tests.triton.interpreter import repair  # noqa: E402

from .checks import CHECKS  # noqa: E402
from .kernels import kernel_mutants, kernels, put_in_place  # noqa: E402
from .mutator import Mutant, choose  # noqa: E402
from .runner import run, run_original  # noqa: E402

SURVIVORS = Path(__file__).with_name("survivors.json")  # kernel -> mutant -> why it is no mistake
SEED = 1
COUNT = 36
SHARE = 0.9  # of a kernel's mutants that its checks have to notice

DESCRIPTION = """\
Make small wrong changes (mutants) to the Triton kernels and run a few checks on each, in Triton's
interpreter and in a process of its own. A mutant that passes all checks has survived: either it is
equivalent, and listed in tests/mutation/survivors.json with the reason, or a check is missing.
"""


def main(argv: list[str]) -> int:
    """The command line; 0 if every kernel's checks notice enough, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=DESCRIPTION)
    parser.add_argument("kernel", nargs="*", help="kernels of configs.json (all of them)")
    parser.add_argument("--count", type=int, default=COUNT, help="mutants a kernel (%(default)s)")
    parser.add_argument("--all", action="store_true", help="every mutant, however many")
    parser.add_argument("--list", action="store_true", help="show the mutants and stop")
    parser.add_argument("--verbose", action="store_true", help="say what noticed each mutant")
    args = parser.parse_args(argv)
    chosen = args.kernel or kernels()
    if unknown := set(chosen) - set(kernels()):
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(kernels())}")
    torch.set_num_threads(1)  # also because threads do not survive a fork
    repair()
    complaints = []
    for kernel in chosen:
        mutants = kernel_mutants(kernel)
        mutants = mutants if args.all else choose(mutants, args.count, SEED)
        if args.list:
            print(*(mutant.name for mutant in mutants), sep="\n")
        else:
            complaints += [f"{kernel}: {text}" for text in prove(kernel, mutants, args.verbose)]
    for complaint in complaints:
        print(f"FAILED {complaint}")
    return 1 if complaints else 0


def prove(kernel: str, mutants: Sequence[Mutant], verbose: bool = False) -> list[str]:
    """Run a kernel's mutants, show how it went, return what is not as it should be."""
    checks = CHECKS.get(kernel)
    if checks is None:
        return ["tests/mutation/checks.py has no checks of it"]
    original = run_original(checks, limit=120.0)
    if original.caught:
        return [f"the checks fail without any change: {original.why}"]
    start, survivors = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        limit = max(10.0, 10 * original.seconds)
        for outcome in run(mutants, lambda m: put_in_place(m, folder), checks, limit):
            if not outcome.caught:
                survivors.append(outcome.mutant.name)
            if verbose or not outcome.caught:
                print(f"  {outcome.mutant.name}\n    {outcome.why or 'SURVIVED'}", flush=True)
    print(
        f"{kernel}: {len(mutants) - len(survivors)} of {len(mutants)} mutants caught in "
        f"{time.monotonic() - start:.0f} s (the checks alone take {original.seconds:.1f} s)",
        flush=True,
    )
    listed = json.loads(SURVIVORS.read_text(encoding="utf-8")).get(kernel, {})
    return judge([mutant.name for mutant in mutants], survivors, listed)


def judge(tried: Sequence[str], survivors: Sequence[str], listed: Mapping[str, str]) -> list[str]:
    """What is wrong with a kernel's survivors, given those that are known to be equivalent."""
    complaints = [f"survived, and is not listed: {n}" for n in survivors if n not in listed]
    caught = set(tried) - set(survivors)
    complaints += [f"listed as equivalent, but caught: {n}" for n in listed if n in caught]
    if len(caught) < SHARE * len(tried):
        complaints.append(f"{len(caught)} of {len(tried)} caught, fewer than {SHARE:.0%}")
    return complaints


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

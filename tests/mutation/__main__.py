"""`python -m tests.mutation [KERNEL ...]`: which wrong changes to a kernel do its checks notice?

Triton kernels go by their names, CUDA kernels by their files in csrc/cuda, such as xsa.cu.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Kernels are interpreted, also where there is a GPU: a mutant may write anywhere.
os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

from tests.triton.interpreter import repair  # noqa: E402

from ..simt.emulator import built_objects  # noqa: E402
from .cuda import (  # noqa: E402
    cuda_kernels,
    cuda_mutants,
    put_module_in_place,
    use_emulator,
)
from .interpreter import poison_masked_lanes  # noqa: E402
from .kernels import kernel_mutants, kernels, module_of, put_in_place  # noqa: E402
from .mutator import Mutant, shuffled  # noqa: E402
from .runner import judge, run, run_original  # noqa: E402

SURVIVORS = Path(__file__).with_name("survivors")  # file: kernel -> mutant -> why it is no mistake
SEED = 1
COUNT = 40
CUDA_COUNT = 32  # each has to be compiled
# More of a small file: a share of 32 would hang on one guard that stands there twice, or on four.
CUDA_COUNTS = {"grad_norm.cu": 60, "weight_cast.cu": 48}
SHARE = 0.9  # of those that run have to be noticed
# What is refused because of types or shapes proves nothing about the checks.
REFUSED = ("InterpreterError", "CompilationError", "SyntaxError", "NameError")

DESCRIPTION = """\
Make small wrong changes (mutants) to the kernels and run a few checks on each, in a process of its
own: Triton kernels in Triton's interpreter, CUDA kernels in the emulator of tests/simt. A mutant
that passes all checks has survived: either it is equivalent, and listed in
tests/mutation/survivors with the reason, or a check is missing.
"""


@dataclass(frozen=True)
class Subject:
    """A kernel, or a file of them.

    Attributes:
        mutants: all of its mutants.
        checks: what they have to get past.
        prepare: puts a mutant in place of the original, in this process; may write to a folder.
        least_limit: CPU seconds that every mutant has at least.
    """

    mutants: list[Mutant]
    checks: Sequence[Callable[[], None]]
    prepare: Callable[[Mutant, str], object]
    least_limit: float


def main(argv: list[str]) -> int:
    """The command line; 0 if every kernel's checks notice enough, 1 if not."""
    known = [*kernels(), *cuda_kernels()]
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=DESCRIPTION)
    parser.add_argument("kernel", nargs="*", help="of configs.json or csrc/cuda (all of them)")
    parser.add_argument(
        "--count",
        type=int,
        help=f"mutants of each kernel that run ({COUNT}; of a CUDA file {CUDA_COUNT})",
    )
    parser.add_argument("--list", action="store_true", help="show all mutants and stop")
    parser.add_argument("--verbose", action="store_true", help="say what noticed each mutant")
    args = parser.parse_args(argv)
    chosen = args.kernel or known
    if unknown := set(chosen) - set(known):
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(known)}")
    torch.set_num_threads(1)  # also because threads do not survive a fork
    repair()
    poison_masked_lanes()
    complaints = []
    # Triton kernels first: each mutant has to be the first to import its module.
    for kernel in sorted(chosen, key=lambda k: k.endswith(".cu")):
        if args.list:
            found = cuda_mutants(kernel) if kernel.endswith(".cu") else kernel_mutants(kernel)
            print(*(mutant.name for mutant in shuffled(found, SEED)), sep="\n")
            continue
        made = cuda_subject(kernel) if kernel.endswith(".cu") else triton_subject(kernel)
        usual = CUDA_COUNTS.get(kernel, CUDA_COUNT) if kernel.endswith(".cu") else COUNT
        count = args.count or usual
        outcome = prove(kernel, made, count, args.verbose)
        complaints += [f"{kernel}: {text}" for text in outcome]
    for complaint in complaints:
        print(f"FAILED {complaint}")
    return 1 if complaints else 0


def triton_subject(kernel: str) -> Subject:
    return Subject(kernel_mutants(kernel), triton_checks(kernel), put_in_place, 10.0)


def triton_checks(kernel: str) -> Sequence[Callable[[], None]]:
    """Those of a kernel; none where its module has no file of them."""
    name = f"{__package__}.checks.{module_of(kernel)}"
    known = importlib.util.find_spec(name)
    return importlib.import_module(name).CHECKS.get(kernel, ()) if known else ()


def cuda_subject(kernel: str) -> Subject:
    use_emulator()
    # It imports what looks for the emulated kernels.
    checks_of = importlib.import_module(f"{__package__}.checks.cuda").checks_of
    build = built_objects()

    def prepare(mutant: Mutant, folder: str) -> None:
        put_module_in_place(mutant, kernel, build, folder)

    return Subject(cuda_mutants(kernel), checks_of(kernel), prepare, 4.0)


def prove(kernel: str, subject: Subject, count: int, verbose: bool = False) -> list[str]:
    """Run `count` mutants of a kernel, show how it went, return what is not as it should be."""
    checks = subject.checks
    if not checks:
        return ["tests/mutation has no checks of it"]
    original = run_original(checks, limit=120.0)
    if original.why:
        return [f"the checks fail without any change: {original.why}"]
    limit = max(subject.least_limit, 10 * original.seconds)
    start, refused, results = time.monotonic(), 0, {}
    waiting = shuffled(subject.mutants, SEED)
    with tempfile.TemporaryDirectory() as folder:
        while waiting and len(results) < count:
            more = count - len(results)
            batch, waiting = waiting[:more], waiting[more:]
            for outcome in run(batch, lambda m: subject.prepare(m, folder), checks, limit):
                if outcome.why.startswith(REFUSED):
                    refused += 1
                    continue
                results[outcome.mutant.name] = outcome.why
                if verbose or not outcome.why:
                    print(f"  {outcome.mutant.name}\n    {outcome.why or 'SURVIVED'}", flush=True)
    print(
        f"{kernel}: {sum(map(bool, results.values()))} of {len(results)} mutants caught, {refused} "
        f"more refused or the same program, in {time.monotonic() - start:.0f} s (the checks alone "
        f"take {original.seconds:.1f} s of CPU time)",
        flush=True,
    )
    return judge(results, survivors(kernel), SHARE)


def survivors(kernel: str) -> dict[str, str]:
    """The listed ones, in the file of the kernel's source."""
    name = kernel if kernel.endswith(".cu") else module_of(kernel)
    file = SURVIVORS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")).get(kernel, {}) if file.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

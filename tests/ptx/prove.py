"""Which wrong changes to emitted PTX do the checks notice?"""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.mutation.mutator import shuffled
from tests.mutation.runner import judge, run

from .mutator import KINDS, Mutant, mutants
from .parser import Kernel

SURVIVORS = Path(__file__).with_name("survivors.json")  # versions, then mutant -> why
SEED = 1
SHARE = 0.9
STEPS = 30_000  # instructions that a warp of a mutant may run: many times what the kernels do
# What the interpreter refuses proves nothing about the checks.
REFUSED = ("Unsupported", "KeyError")


class Family:
    """How the checks of a family are run on mutants."""

    # Check -> part of the names of those kernels in it that are changed.
    subjects: Mapping[str, str]
    # The beginning of instructions that only choose between two ways to the same result: they are
    # left alone, and so are the branches on what they set.
    choices: tuple[str, ...] = ()

    def run(self, check: Callable[[], None]) -> list[Kernel]:
        """Run a check; the kernels that it launched."""
        raise NotImplementedError

    def put_in_place(self, mutant: Mutant, limit: int) -> None:
        """From now on the mutant is run where its original would be."""
        raise NotImplementedError

    def version(self) -> str:
        """Of the compiler: another one emits other kernels."""
        raise NotImplementedError


class Triton(Family):
    subjects = {
        "xsa fp32": "xsa",
        "fake_quant bf16": "fake_quant",
        "leaky_relu2_mlp bf16": "leaky_relu2",
    }

    def run(self, check: Callable[[], None]) -> list[Kernel]:
        from . import triton_launch

        launched: list[Kernel] = []
        triton_launch.SETTINGS.change = lambda kernel: launched.append(kernel) or kernel
        check()
        return launched

    def put_in_place(self, mutant: Mutant, limit: int) -> None:
        from . import triton_launch

        settings = triton_launch.SETTINGS
        settings.limit = limit
        settings.change = lambda kernel: mutant.kernel if kernel is mutant.original else kernel

    def version(self) -> str:
        import triton

        return f"triton {triton.__version__}"


class Nvcc(Family):
    choices = ("setp.eq.s64", "setp.ne.s64")  # whether 64 bits are divided as 32 (device.cuh)
    subjects = {
        "block sums": "block_sum",
        "xsa 2x7 8/4 64 torch.bfloat16": "xsa",
    }

    def run(self, check: Callable[[], None]) -> list[Kernel]:
        from .nvcc_checks import runner

        before = len(runner().ran)
        check()
        return runner().ran[before:]

    def put_in_place(self, mutant: Mutant, limit: int) -> None:
        from .nvcc_checks import runner

        runner().limit = limit
        runner().change = lambda kernel: mutant.kernel if kernel is mutant.original else kernel

    def version(self) -> str:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
        return next(word for word in text.split() if word.startswith("V")).replace("V", "nvcc ")


FAMILIES = {"triton": Triton, "nvcc": Nvcc}


def prove(
    name: str, checks: Mapping[str, Callable[[], None]], count: int, only: str, verbose: bool
) -> list[str]:
    """Run mutants of every kernel, say how it went, return what is not as it should be.

    Args:
        name: of the family.
        checks: of the family by name.
        count: mutants of a kernel and a class.
        only: a part of the names of those checks that are run.
        verbose: say what noticed each mutant.
    """
    family = FAMILIES[name]()
    results: dict[str, str] = {}
    kinds: dict[str, str] = {}
    start, refused = time.monotonic(), 0
    for check_name, part in family.subjects.items():
        if only not in check_name:
            continue
        for mutant, why in _outcomes(family, check_name, checks[check_name], part, count):
            if why.startswith(REFUSED):
                refused += 1
                continue
            results[mutant.name], kinds[mutant.name] = why, mutant.kind
            if verbose or not why:
                print(f"  {mutant.name}\n    {why or 'SURVIVED'}", flush=True)
    _report(results, kinds)
    caught = sum(map(bool, results.values()))
    print(f"{name}: {caught} of {len(results)} mutants caught, {refused} more refused, in "
          f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
    listed = json.loads(SURVIVORS.read_text(encoding="utf-8")).get(name, {})
    known = listed.get("survivors", {})
    if family.version() != listed.get("version"):
        print(f"survivors are listed for {listed.get('version')}, this is {family.version()}")
        known = {n: "another compiler" for n, why in results.items() if not why}
    return judge(results, known, SHARE)


def _outcomes(
    family: Family, label: str, check: Callable[[], None], part: str, count: int
) -> Iterator[tuple[Mutant, str]]:
    """(mutant, what noticed it) for those that are chosen of a check's kernels."""
    start = time.process_time()
    kernels = {id(k): k for k in family.run(check) if part in k.name}
    seconds = time.process_time() - start
    chosen = []
    for number, kernel in enumerate(kernels.values(), 1):
        chosen += _chosen(mutants(kernel, f"{label} #{number}", family.choices), count)
    limit = max(10.0, 10 * seconds)
    for outcome in run(chosen, lambda m: family.put_in_place(m, STEPS), [check], limit):
        yield outcome.mutant, outcome.why


def _chosen(found: list[Mutant], count: int) -> list[Mutant]:
    """At most `count` of each class, always the same."""
    taken: Counter[str] = Counter()
    result = []
    for mutant in shuffled(found, SEED):
        if taken[mutant.kind] < count:
            taken[mutant.kind] += 1
            result.append(mutant)
    return result


def _report(results: Mapping[str, str], kinds: Mapping[str, str]) -> None:
    total = Counter(kinds.values())
    caught = Counter(kind for name, kind in kinds.items() if results[name])
    for kind in KINDS:
        if total[kind]:
            print(f"  {kind:10} {caught[kind]:4} of {total[kind]:4} caught")

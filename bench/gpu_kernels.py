"""Runs every operator's CUDA and Triton kernels once, for tools that watch: see bench/gpu.py.

    compute-sanitizer --tool memcheck python -m bench.gpu_kernels --json calls.jsonl
"""

import argparse
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import restart
from pgolf.files import atomic_write
from pgolf.ops.operator import OPERATORS, Implementation, Operator
from pgolf.ops.testing import Call, kernel


def run_all(
    device: str, names: Sequence[str] = (), impls: Sequence[str] = (), file: Path | None = None
) -> tuple[int, list[str]]:
    """Run implementations for GPUs on small samples: (how many calls, what is wrong).

    One that is not here or fails is a line of what is wrong, and the others run; but no more do
    once this process cannot use the GPU any more.

    Args:
        names, impls: of operators and implementations; () for all.
        file: gets a JSON line a call before it begins, so that the last one is the one that ended
            the process, if any did.
    """
    begun: list[str] = []
    wrong: list[str] = []
    for operator, impl, implementation in _ours(device, names, impls):
        if problem := implementation.missing():
            wrong.append(f"{operator.name}={impl}: {problem}")
            continue
        for sample in operator.samples():
            for dtype in () if sample.bench else implementation.dtypes:
                what = {"operator": operator.name, "impl": impl, "sample": sample.label,
                        "dtype": str(dtype)}  # fmt: skip
                begun.append(json.dumps(what))
                if file:
                    atomic_write(file, "".join(f"{line}\n" for line in begun))
                try:
                    call = Call.of(operator, sample, dtype, torch.device(device))
                    call.run(kernel(operator, impl))
                except Exception as e:  # of one kernel: the others have to be watched, too
                    traceback.print_exc()
                    wrong.append(f"{begun[-1]}: {type(e).__name__}")
                    if restart.unusable(torch.device(device)):
                        return len(begun), [*wrong, "the GPU is unusable: no more was run"]
    return len(begun), wrong


def _ours(
    device: str, names: Sequence[str], impls: Sequence[str]
) -> Iterator[tuple[Operator, str, Implementation]]:
    """What run_all is asked for, and what a device of this kind can run at all."""
    for operator in [OPERATORS[name] for name in names or OPERATORS]:
        for impl, implementation in operator.implementations.items():
            ours = implementation.device == "cuda" and not implementation.package
            if ours and implementation.runs_on(device) and impl in (impls or (impl,)):
                yield operator, impl, implementation


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu: kernels that an emulator or interpreter runs")  # fmt: skip
    parser.add_argument("--op", nargs="+", default=(), choices=list(OPERATORS))
    parser.add_argument("--impl", nargs="+", default=(), choices=("cuda", "triton"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    calls, wrong = run_all(args.device, args.op, args.impl, args.json)
    if args.device == "cuda" and not wrong:
        torch.cuda.synchronize()
    print("\n".join([f"{calls} calls", *(f"WRONG: {text}" for text in wrong)]))
    return 1 if wrong or not calls else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

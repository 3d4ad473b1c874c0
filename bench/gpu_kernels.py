"""Runs every operator's CUDA and Triton kernels once, for tools that watch: see bench/gpu.py.

    compute-sanitizer --tool memcheck python -m bench.gpu_kernels --json calls.jsonl
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pgolf.files import atomic_write
from pgolf.ops.operator import OPERATORS
from pgolf.ops.testing import Call, kernel


def run_all(
    device: str, names: Sequence[str] = (), impls: Sequence[str] = (), file: Path | None = None
) -> int:
    """Implementations for GPUs that run here, on small samples; how many calls it were.

    Args:
        names, impls: of operators and implementations; () for all.
        file: gets a JSON line a call before it begins, so that the last one is the one that ended
            the process, if any did.
    """
    begun: list[str] = []
    for operator in [OPERATORS[name] for name in names or OPERATORS]:
        for impl, implementation in operator.implementations.items():
            ours = implementation.device == "cuda" and not implementation.package
            if not ours or not implementation.runs_on(device):
                continue
            if impls and impl not in impls:
                continue
            if problem := implementation.missing():
                raise RuntimeError(f"{operator.name}={impl}: {problem}")
            for sample in operator.samples():
                for dtype in () if sample.bench else implementation.dtypes:
                    what = {"operator": operator.name, "impl": impl, "sample": sample.label,
                            "dtype": str(dtype)}  # fmt: skip
                    begun.append(json.dumps(what))
                    if file:
                        atomic_write(file, "".join(f"{line}\n" for line in begun))
                    call = Call.of(operator, sample, dtype, torch.device(device))
                    call.run(kernel(operator, impl))
    return len(begun)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu: kernels that an emulator or interpreter runs")  # fmt: skip
    parser.add_argument("--op", nargs="+", default=(), choices=list(OPERATORS))
    parser.add_argument("--impl", nargs="+", default=(), choices=("cuda", "triton"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    print(f"{run_all(args.device, args.op, args.impl, args.json)} calls")
    if args.device == "cuda":
        torch.cuda.synchronize()

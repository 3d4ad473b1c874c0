"""Runs every operator's CUDA and Triton kernels once, for tools that watch: see bench/gpu.py.

    compute-sanitizer --tool memcheck python -m bench.gpu_kernels
"""

import sys

import torch

from pgolf.ops.operator import OPERATORS
from pgolf.ops.testing import Call, kernel


def run_all(device: str) -> int:
    """Every implementation for GPUs that runs here, on small samples; how many calls it were."""
    calls = 0
    for operator in OPERATORS.values():
        for impl, implementation in operator.implementations.items():
            ours = implementation.device == "cuda" and not implementation.package
            if not ours or not implementation.runs_on(device):
                continue
            if problem := implementation.missing():
                raise RuntimeError(f"{operator.name}={impl}: {problem}")
            for sample in operator.samples():
                if not sample.bench:
                    for dtype in implementation.dtypes:
                        call = Call.of(operator, sample, dtype, torch.device(device))
                        call.run(kernel(operator, impl))
                        calls += 1
    return calls


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    print(f"{run_all('cuda')} calls")
    torch.cuda.synchronize()

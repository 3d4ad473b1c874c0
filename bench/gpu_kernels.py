"""Runs every operator's CUDA and Triton kernels once, for tools that watch: see bench/gpu.py.

    compute-sanitizer --tool memcheck python -m bench.gpu_kernels
"""

import inspect
import sys

import torch

from bench.arguments import as_tuple, with_tensors
from pgolf.ops.operator import OPERATORS, Operator, Sample


def run_once(operator: Operator, impl: str, sample: Sample, dtype: torch.dtype, device: str):
    """Forward, and backward where there is one. What the operator changes in place is a copy."""
    args, named = sample.build(torch.device(device), dtype)
    arguments = dict(inspect.signature(operator.call).bind(*args, **named).arguments)
    for name in operator.mutates:
        if name in arguments:
            arguments[name] = with_tensors(arguments[name], torch.clone)
    leaves = []
    for name in operator.differentiable:
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].detach().requires_grad_()
            leaves.append(arguments[name])
    results = as_tuple(operator.call(**arguments, impl=impl))
    if leaves:
        wanted = [t for t in results if t.requires_grad]
        torch.autograd.grad(wanted, leaves, [torch.ones_like(t) for t in wanted])


def run_all(device: str) -> int:
    """Every implementation for GPUs that runs here, on small samples; how many calls it were."""
    calls = 0
    for operator in OPERATORS.values():
        for impl, implementation in operator.implementations.items():
            if not implementation.runs_on(device) or implementation.device != "cuda":
                continue
            if problem := implementation.missing():
                raise RuntimeError(f"{operator.name}={impl}: {problem}")
            for sample in operator.samples():
                if not sample.bench:
                    for dtype in implementation.dtypes:
                        run_once(operator, impl, sample, dtype, device)
                        calls += 1
    return calls


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU here")
    print(f"{run_all('cuda')} calls")
    torch.cuda.synchronize()

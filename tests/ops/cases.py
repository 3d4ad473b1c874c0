"""Every operator x implementation x sample, and what tests need to run one of them."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.arguments import as_tuple, with_tensors
from pgolf.ops.operator import OPERATORS, Operator, Result, Sample
from pgolf.ops.tensors import tensors_in

CPU = torch.device("cpu")


def implementations(operator: Operator) -> list[str]:
    """Those that run here on CPU tensors: C++, and Triton in its interpreter."""
    return [
        name
        for name, impl in operator.implementations.items()
        if impl.runs_on("cpu") and not impl.missing()
    ]


def takes(operator: Operator, impl: str, dtype: torch.dtype) -> bool:
    return impl == "reference" or dtype in operator.implementations[impl].dtypes


def is_empty(sample: Sample) -> bool:
    """Whether the first argument has no elements."""
    return not sum(t.numel() for t in tensors_in(sample.build(CPU, torch.float32)[0][0]))


def cases(with_reference: bool = False) -> Iterator[Any]:
    """(operator, implementation, sample) of every small sample, as pytest parameters."""
    for operator in OPERATORS.values():
        names = ["reference"] * with_reference + implementations(operator)
        for impl in names:
            for sample in operator.samples():
                if not sample.bench:
                    yield pytest.param(
                        operator, impl, sample, id=f"{operator.name}-{impl}-{sample.label}"
                    )


def over(parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """Run a test for each of these cases."""
    return pytest.mark.parametrize(("operator", "impl", "sample"), list(parameters))


every_case = over(cases())


class Call:
    """One call of an operator: arguments by name, of which some want gradients."""

    def __init__(
        self, operator: Operator, sample: Sample, dtype: torch.dtype, device: torch.device = CPU
    ):
        args, named = sample.build(device, dtype)
        self.operator = operator
        self.arguments = dict(inspect.signature(operator.call).bind(*args, **named).arguments)
        self.wanted = [n for n in operator.differentiable if self.arguments.get(n) is not None]

    def in_double(self) -> "Call":
        """The same numbers in float64; the dtype that a result is asked for becomes float64 too."""
        twin = object.__new__(Call)
        twin.operator, twin.wanted = self.operator, self.wanted
        keep = {"clip_factor", "bits", "on"}  # float32 by definition
        twin.arguments = {
            n: a if n in keep else with_tensors(a, in_double)
            for n, a in self.arguments.items()
        }
        if "dtype" in twin.arguments:
            twin.arguments["dtype"] = torch.float64
        return twin

    def leaves(self) -> list[Tensor]:
        """The differentiable arguments, detached; strides are kept."""
        return [self.arguments[n].detach().requires_grad_() for n in self.wanted]

    def on(self, *leaves: Tensor, function: Callable | None = None, **options: Any) -> Result:
        """Call with these in place of the differentiable arguments.

        What the operator changes in place is copied first, and comes after its results.
        """
        arguments = {**self.arguments, **dict(zip(self.wanted, leaves, strict=True))}
        changed = {
            n: with_tensors(arguments[n], torch.clone)
            for n in self.operator.mutates
            if n in arguments
        }
        out = (function or self.operator.call)(**{**arguments, **changed}, **options)
        if not changed:
            return out
        return (*as_tuple(out), *(t for a in changed.values() for t in tensors_in(a)))

    def run(self, impl: str) -> list[Tensor]:
        """[result, ..., gradient, ...] of an implementation."""
        leaves = self.leaves()
        out = self.on(*leaves, impl=impl)
        results = [t.detach() for t in as_tuple(out)]
        return [*results, *gradients(out, leaves)] if leaves else results

    def results(self) -> int:
        """How many of what `run` returns come before the gradients."""
        return len(as_tuple(self.on(*self.leaves(), impl="reference")))


def in_double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def floating_in(argument: Any) -> list[Tensor]:
    """The tensors of floats that an argument is or holds."""
    return [t for t in tensors_in(argument) if t.is_floating_point()]


def gradients(out: Result, leaves: Sequence[Tensor], **how: bool) -> tuple[Tensor, ...]:
    """Of leaves, for gradients of all results that are not contiguous."""
    results = as_tuple(out)
    upstream = [strided_like(t, seed) for seed, t in enumerate(results, 1)]
    return torch.autograd.grad(results, leaves, upstream, **how)


def strided_like(out: Tensor, seed: int = 1) -> Tensor:
    """An output gradient of out's shape that is not contiguous in any dimension."""
    g = torch.Generator().manual_seed(seed)
    columns = out.size(-1) if out.dim() else 1
    wide = torch.randn(*out.shape[:-1], 2 * columns, generator=g, dtype=torch.float64)
    strided = wide.to(torch.bfloat16).to(out.device, out.dtype)[..., ::2]
    return strided if out.dim() else strided[0]

"""Every operator x implementation x sample, as parameters of tests. Nothing is built for that."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf.ops.operator import OPERATORS, Operator, Sample
from pgolf.ops.tensors import tensors_in
from pgolf.ops.testing import Call, kernel, poisoned


def implementations(operator: Operator) -> list[str]:
    """Those that run here on CPU tensors: C++, and Triton in its interpreter."""
    return [
        name
        for name, impl in operator.implementations.items()
        if impl.runs_on("cpu") and not impl.missing()
    ]


def takes(operator: Operator, impl: str, dtype: torch.dtype) -> bool:
    return impl == "reference" or dtype in operator.implementations[impl].dtypes


def small(operator: Operator) -> list[Sample]:
    return [sample for sample in operator.samples() if not sample.bench]


def is_empty(call: Call) -> bool:
    """Whether the first argument has no elements."""
    return not sum(t.numel() for t in tensors_in(next(iter(call.arguments.values()))))


def first_call(operator: Operator, dtype: torch.dtype = torch.float32) -> Call:
    """The first small sample that has elements."""
    calls = (Call.of(operator, sample, dtype) for sample in small(operator))
    return next(call for call in calls if not is_empty(call))


def first_call_of_kernels(operator: Operator) -> Call:
    """`first_call` in a dtype whose gradient is the operator's own.

    In fp32 `linear_qk_rope` is torch's matmul and `qk_rope` in the open.
    """
    in_steps = operator.name == "linear_qk_rope"
    return first_call(operator, torch.bfloat16 if in_steps else torch.float32)


def each(with_reference: bool = False, differentiable: bool = False) -> Iterator[Any]:
    """(operator, implementation), as pytest parameters."""
    for operator in OPERATORS.values():
        if operator.differentiable or not differentiable:
            for impl in ["reference"] * with_reference + implementations(operator):
                yield pytest.param(operator, impl, id=f"{operator.name}-{impl}")


def cases() -> Iterator[Any]:
    """(operator, implementation, sample) of every small sample, as pytest parameters."""
    for pair in each():
        for sample in small(pair.values[0]):
            yield pytest.param(*pair.values, sample, id=f"{pair.id}-{sample.label}")


def over(parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """Run a test for each of these cases."""
    return pytest.mark.parametrize(("operator", "impl", "sample"), list(parameters))


def every_implementation(**which: bool) -> pytest.MarkDecorator:
    """Run a test for each pair of `each`."""
    return pytest.mark.parametrize(("operator", "impl"), list(each(**which)))


every_case = over(cases())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random ones in float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def floating_in(argument: Any) -> list[Tensor]:
    """The tensors of floats that an argument is or holds."""
    return [t for t in tensors_in(argument) if t.is_floating_point()]


def problem(call: Call, operator: Operator, impl: str) -> str:
    """What is wrong with an implementation; '' if nothing is.

    What it leaves out of its outputs is NaN. A grid's codes jump where weights lie on ties, so a
    quantiser has to give the numbers of the reference besides.
    """
    if operator.name == "fake_quant":
        results = zip(call.run(kernel(operator, impl)), call.run(call.reference), strict=True)
        if not all(torch.equal(*pair) for pair in results):
            return "other numbers than the reference's"
    with poisoned():
        return call.problem(kernel(operator, impl))

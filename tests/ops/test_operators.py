"""Every implementation of every operator against float64, and the contracts of torch.library.

Nothing here names an operator: a new one is tested once it is in the registry.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.arguments import as_tuple
from pgolf.ops.operator import OPERATORS, Operator, Sample
from pgolf.ops.tensors import tensors_in

from ..triton.interpreter import repair
from .cases import (
    Call,
    cases,
    every_case,
    floating_in,
    gradients,
    implementations,
    is_empty,
    over,
    takes,
)

repair()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def error(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Greatest and mean absolute error; equal infinities and NaNs count as no error."""
    assert got.shape == truth.shape
    both = got.double().nan_to_num(nan=1e9) - truth.double().nan_to_num(nan=1e9)
    return (both.abs().max().item(), both.abs().mean().item()) if got.numel() else (0.0, 0.0)


def in_every_dtype() -> list:
    """Cases with each dtype that the implementation takes."""
    return [
        pytest.param(*p.values, dtype, id=f"{p.id}-{name}")
        for p in cases()
        for name, dtype in DTYPES.items()
        if takes(*p.values[:2], dtype)
    ]


@pytest.mark.parametrize(("operator", "impl", "sample", "dtype"), in_every_dtype())
def test_accuracy(operator: Operator, impl: str, sample: Sample, dtype: torch.dtype) -> None:
    """err(kernel) <= k err(torch in this dtype) + floor, k = 2 for results, 3 for gradients.

    The output gradient is strided. A grid's codes jump where weights lie on ties, so a quantiser
    has to agree with the reference to the bit instead.
    """
    call = Call(operator, sample, dtype)
    got, torch_ = call.run(impl), call.run("reference")
    if operator.name == "fake_quant":
        assert all(map(torch.equal, got, torch_))
        return
    truth, results = call.in_double().run("reference"), call.results()
    for i, (mine, theirs, exact) in enumerate(zip(got, torch_, truth, strict=True)):
        assert mine.dtype is theirs.dtype
        assert mine.is_contiguous() or i >= results  # a gradient may be the one that came in
        scale = exact.abs().max().item() if exact.numel() else 0.0
        # In float64 nothing is more exact: both are as far from the truth as steps add up to.
        ulps = 4 if dtype is not torch.float64 else 1000
        floor = ulps * torch.finfo(mine.dtype).eps * scale if mine.is_floating_point() else 0.0
        for ours, limit in zip(error(mine, exact), error(theirs, exact), strict=True):
            assert ours <= (3 if i >= results else 2) * limit + floor, f"{i} of {results} results"


@every_case
def test_the_same_call_twice_gives_the_same_bits(
    operator: Operator, impl: str, sample: Sample
) -> None:
    call = Call(operator, sample, torch.float32)
    assert all(map(torch.equal, call.run(impl), call.run(impl)))


@every_case
def test_inputs_are_not_written(operator: Operator, impl: str, sample: Sample) -> None:
    call, untouched = (Call(operator, sample, torch.float32) for _ in range(2))
    call.run(impl)
    for name, value in call.arguments.items():
        kept = tensors_in(untouched.arguments[name])
        assert all(map(torch.equal, tensors_in(value), kept)), name


@over(p for p in cases() if len(p.values[0].differentiable) > 1)
def test_any_subset_of_gradients(operator: Operator, impl: str, sample: Sample) -> None:
    call = Call(operator, sample, torch.float32)
    everything = call.run(impl)[call.results() :]
    for i, name in enumerate(call.wanted):
        leaves = [leaf.requires_grad_(j == i) for j, leaf in enumerate(call.leaves())]
        out = call.on(*leaves, impl=impl)
        (grad,) = gradients(out, [leaves[i]])
        assert torch.equal(grad, everything[i]), name


def with_a_slope() -> list:
    """Cases in float64 whose gradient is the slope: not straight through a grid or a rounding."""
    return [
        p
        for p in cases(with_reference=True)
        if takes(*p.values[:2], torch.float64)
        and p.values[0].differentiable
        and not {"bits", "dtype"} & set(Call(p.values[0], p.values[2], torch.float64).arguments)
    ]


@over(with_a_slope())
def test_gradcheck(operator: Operator, impl: str, sample: Sample) -> None:
    """Numerical gradients in float64, of the reference too."""
    call = Call(operator, sample, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: call.on(*leaves, impl=impl), call.leaves(), fast_mode=True
    )


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every one of our opaque operators that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pgolf":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@every_case
def test_opcheck(operator: Operator, impl: str, sample: Sample) -> None:
    """Schema, fake, autograd registration and tracing of the forward and backward operators."""
    call = Call(operator, sample, torch.float32)
    with Recorder() as recorder:
        call.run(impl)
    assert recorder.calls
    for func, args, kwargs in recorder.calls:
        names = [a.name for a in func._schema.arguments]
        first = func is recorder.calls[0][0]

        def fresh(name: str, value: object, first: bool = first) -> object:
            if isinstance(value, list):
                return [fresh(name.removesuffix("s"), item) for item in value]
            if not isinstance(value, Tensor):
                return value
            if not value.numel():  # opcheck cannot copy an empty view
                return value.new_empty(value.shape)
            return value.detach().requires_grad_(first and name in operator.differentiable)

        torch.library.opcheck(func, tuple(map(fresh, names, args)), kwargs)


def one_each(with_reference: bool) -> list:
    """The first sample of every operator and implementation."""
    first = {(p.values[0].name, p.values[1]): p for p in reversed(list(cases(with_reference)))}
    return list(first.values())


@over(one_each(with_reference=True))
def test_compiles_in_one_graph(operator: Operator, impl: str, sample: Sample) -> None:
    """torch.compile(fullgraph=True) on the CPU, forward and backward, gives what eager gives."""
    call = Call(operator, sample, torch.float32)
    eager = call.run(impl)
    compiled = torch.compile(
        lambda *leaves: [t * 1 for t in as_tuple(call.on(*leaves, impl=impl))],
        fullgraph=True,
        dynamic=False,
    )
    torch._dynamo.reset()
    leaves = call.leaves()
    out = compiled(*leaves)
    grads = gradients(out, leaves) if leaves else ()
    for mine, theirs in zip([*(t.detach() for t in out), *grads], eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_implementation_that_can_run_here_is_tested(name: str) -> None:
    """C++ wherever the extension was built; Triton wherever it can be imported."""
    operator = OPERATORS[name]
    assert set(implementations(operator)) == {
        n for n, impl in operator.implementations.items() if not impl.missing()
    }


@over(p for p in cases() if not is_empty(p.values[2]))
def test_nan_is_not_hidden(operator: Operator, impl: str, sample: Sample) -> None:
    """A NaN in the first argument of floats comes out where the reference lets it out."""
    call = Call(operator, sample, torch.float32)
    first = next(name for name, value in call.arguments.items() if floating_in(value))
    poisoned = floating_in(call.arguments[first])[0].clone()
    poisoned[tuple(size // 2 for size in poisoned.shape)] = float("nan")
    if isinstance(call.arguments[first], Tensor):
        call.arguments[first] = poisoned
    else:
        call.arguments[first] = [poisoned, *call.arguments[first][1:]]
    for mine, theirs in zip(call.run(impl), call.run("reference"), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())

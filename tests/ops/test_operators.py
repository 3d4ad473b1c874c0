"""Every implementation of every operator against float64, and the contracts of torch.library.

Nothing here names an operator: a new one is tested once it is in the registry.
"""

import functools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf.ops.compile import Recorder
from pgolf.ops.operator import OPERATORS, Operator, Sample
from pgolf.ops.tensors import tensors_in
from pgolf.ops.testing import Call, as_tuple, kernel, same_bits

from ..triton.interpreter import repair
from .cases import (
    cases,
    every_case,
    every_implementation,
    first_call,
    floating_in,
    implementations,
    is_empty,
    over,
    problem,
    small,
    takes,
)

repair()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
# Calls that opcheck has traced with dynamic shapes in this process. It takes longest, and what is
# traced, fakes and derivatives, is the same for all implementations of an operator.
TRACED: set[tuple] = set()


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
    """The rule of pgolf.ops.testing; inputs are not written. The output gradient is strided."""
    call = Call.of(operator, sample, dtype)
    assert problem(call, operator, impl) == ""


@every_case
def test_contract(operator: Operator, impl: str, sample: Sample) -> None:
    """Same bits twice, as the fakes foretell them; contiguous outputs; NaN where torch lets it out.

    (A gradient may be the one that came in.)
    """
    call, run = Call.of(operator, sample, torch.float32), kernel(operator, impl)
    with Recorder() as recorder:
        once = call.run(run)
    assert all(map(same_bits, once, call.run(run)))
    assert all(t.is_contiguous() for t in once[: len(once) - len(call.wanted)])
    assert recorder.calls
    for func, args, kwargs, out in recorder.calls:
        with FakeTensorMode(allow_non_fake_inputs=True):
            foretold = func(*args, **kwargs)
        for real, fake in zip(tensors_of(out), tensors_of(foretold), strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype), func
            assert real.stride() == fake.stride() or not real.numel(), func
    if not is_empty(call):
        hit = call.with_arguments(poisoned(call))
        for mine, theirs in zip(hit.run(run), hit.run(call.reference), strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())


def tensors_of(out: object) -> list[Tensor]:
    """Those that an opaque operator returns: tensors and lists of them."""
    return [t for item in (out if isinstance(out, tuple) else (out,)) for t in tensors_in(item)]


def poisoned(call: Call) -> dict[str, object]:
    """The first argument of floats with a NaN amid it."""
    name, value = next((n, a) for n, a in call.arguments.items() if floating_in(a))
    hit = floating_in(value)[0].clone()
    hit[tuple(size // 2 for size in hit.shape)] = float("nan")
    return {name: hit if isinstance(value, Tensor) else [hit, *value[1:]]}


@over(p for p in cases() if len(p.values[0].differentiable) > 1)
def test_any_subset_of_gradients(operator: Operator, impl: str, sample: Sample) -> None:
    call, run = Call.of(operator, sample, torch.float32), kernel(operator, impl)
    everything = call.run(run)[-len(call.wanted) :]
    for i, name in enumerate(call.wanted):
        leaves = [leaf.requires_grad_(j == i) for j, leaf in enumerate(call.leaves())]
        (grad,) = call.gradients(call.on(run, *leaves), [leaves[i]])
        assert torch.equal(grad, everything[i]), name


@every_implementation(with_reference=True, differentiable=True)
def test_gradcheck(operator: Operator, impl: str) -> None:
    """Numerical gradients in float64, of the reference too.

    Where the gradient is the slope: not straight through a grid or a rounding.
    """
    if not takes(operator, impl, torch.float64):
        pytest.skip(f"{impl} does not take float64")
    calls = [Call.of(operator, sample, torch.float64) for sample in small(operator)]
    for call in (c for c in calls if not {"bits", "dtype"} & set(c.arguments)):
        run = functools.partial(call.on, kernel(operator, impl))
        assert torch.autograd.gradcheck(run, call.leaves(), fast_mode=True)


@every_implementation()
def test_opcheck(operator: Operator, impl: str) -> None:
    """Schema, autograd registration and tracing of the forward and backward operators.

    On the first sample and the last, which is the empty one where there is one.
    """
    for sample in small(operator)[:: max(1, len(small(operator)) - 1)]:
        call = Call.of(operator, sample, torch.float32)
        with Recorder() as recorder:
            call.run(kernel(operator, impl))
        assert recorder.calls
        for func, args, kwargs, _ in recorder.calls:
            first = func is recorder.calls[0][0]
            leaves = operator.differentiable if first else ()
            names = [a.name for a in func._schema.arguments][: len(args)]
            what = traced(func, names, args), first
            checks = QUICK_CHECKS + ("test_aot_dispatch_dynamic",) * (what not in TRACED)
            given = tuple(fresh(*pair, leaves) for pair in zip(names, args, strict=True))
            torch.library.opcheck(func, given, kwargs, test_utils=checks)
            TRACED.add(what)


def traced(func: torch._ops.OpOverload, names: list[str], args: tuple) -> tuple:
    """What a trace of this call depends on: all but numbers and the implementation."""

    def form(value: object) -> object:
        if isinstance(value, list):
            return tuple(map(form, value))
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.stride()
        return value

    return func, *(form(a) for n, a in zip(names, args, strict=True) if n != "impl")


def fresh(name: str, value: object, leaves: tuple[str, ...]) -> object:
    """An argument of an opaque operator as a leaf, if it is to be one."""
    if isinstance(value, list):
        return [fresh(name.removesuffix("s"), item, leaves) for item in value]
    if not isinstance(value, Tensor):
        return value
    if not value.numel():  # opcheck cannot copy an empty view
        return value.new_empty(value.shape)
    return value.detach().requires_grad_(name in leaves)


@every_implementation(with_reference=True)
def test_compiles_in_one_graph(operator: Operator, impl: str) -> None:
    """torch.compile(fullgraph=True) on the CPU, forward and backward, gives what eager gives."""
    call, run = first_call(operator), kernel(operator, impl)
    eager = call.run(run)
    compiled = torch.compile(
        lambda *leaves: [t * 1 for t in as_tuple(call.on(run, *leaves))],
        fullgraph=True,
        dynamic=False,
    )
    torch._dynamo.reset()
    leaves = call.leaves()
    out = compiled(*leaves)
    grads = call.gradients(out, leaves) if leaves else ()
    for mine, theirs in zip([*(t.detach() for t in out), *grads], eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_implementation_that_can_run_here_is_tested(name: str) -> None:
    """C++ wherever the extension was built; Triton wherever it can be imported."""
    operator = OPERATORS[name]
    assert set(implementations(operator)) == {
        n for n, impl in operator.implementations.items() if not impl.missing()
    }

"""What kernels do not differentiate they refuse in words, or leave to the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from pgolf.ops import softcap_cross_entropy, xsa
from pgolf.ops.operator import OPERATORS, Operator
from pgolf.ops.testing import as_tuple, kernel

from .cases import every_implementation, first_call, first_call_of_kernels, implementations


def total(out) -> Tensor:
    return sum((t * t).sum() for t in as_tuple(out) if t.is_floating_point())


@every_implementation(differentiable=True)
def test_second_derivatives_are_refused(operator: Operator, impl: str) -> None:
    """Also where another term of the loss has a second derivative, and nothing else would raise."""
    # (These two are made of another one, which says so too.)
    parts = "|residual_norm" if operator.name in ("linear_residual", "linear_mix") else ""
    names = f"({operator.name}{parts})"
    call, run = first_call_of_kernels(operator), kernel(operator, impl)
    leaves = call.leaves()
    first = torch.autograd.grad(total(call.on(run, *leaves)), leaves, create_graph=True)
    for leaf, gradient in zip(leaves, first, strict=True):
        assert gradient.shape == leaf.shape
        penalty = (gradient * gradient).sum() + (leaf * leaf).sum()
        with pytest.raises(RuntimeError, match=f"{names}.*: .*use impl='reference'"):
            torch.autograd.grad(penalty, leaf, retain_graph=True)
    plain = torch.autograd.grad(total(call.on(run, *leaves)), leaves)
    assert all(map(torch.equal, first, plain)), "the gradient itself is the same"


@every_implementation(differentiable=True)
def test_gradients_in_batches(operator: Operator, impl: str) -> None:
    """`is_grads_batched`, which jacobians use, runs the kernels for one after another."""
    call, run = first_call(operator), kernel(operator, impl)
    leaves = call.leaves()
    results = [t for t in as_tuple(call.on(run, *leaves)) if t.requires_grad]
    ones = [torch.ones_like(t) for t in results]
    stacks = [torch.stack((t, 2 * t)) for t in ones]
    how = {"retain_graph": True, "is_grads_batched": True}
    try:
        batched = torch.autograd.grad(results, leaves, stacks, **how)
    except RuntimeError as e:  # kernels of lists can't
        assert operator.name in ("fake_quant", "weight_cast", "scaled_copies")
        assert str(e).startswith(f"{operator.name}: ") and "use impl='reference'" in str(e)
        return
    for both, factor in ((0, 1), (1, 2)):
        alone = torch.autograd.grad(
            results, leaves, [factor * t for t in ones], retain_graph=True
        )
        for mine, theirs in zip(batched, alone, strict=True):
            torch.testing.assert_close(mine[both], theirs)


@pytest.mark.parametrize("name", [n for n, o in OPERATORS.items() if o.differentiable])
def test_transforms_take_the_reference(name: str) -> None:
    """torch.func and forward-mode give what the reference gives; kernels by name say so."""
    operator = OPERATORS[name]
    call = first_call(operator)
    leaves = [leaf.detach() for leaf in call.leaves()]
    upstream = [t.detach().cos() for t in leaves]

    def loss(*leaves: Tensor, impl: str = "auto") -> Tensor:
        return total(call.on(kernel(operator, impl), *leaves))

    every = tuple(range(len(leaves)))
    wanted = call.leaves()
    expected = torch.autograd.grad(loss(*wanted, impl="reference"), wanted)
    exact = {"rtol": 1e-4, "atol": 1e-4 * max(g.abs().max().item() for g in expected)}
    for gradient in (torch.func.grad(loss, every), torch.func.jacrev(loss, every)):
        for got, want in zip(gradient(*leaves), expected, strict=True):
            torch.testing.assert_close(got, want, **exact)
    stacks = [torch.stack((t, t)) for t in leaves]
    try:
        batched = torch.func.vmap(torch.func.grad(loss, every))(*stacks)
    except RuntimeError as e:  # the reference's own limit, with torch 2.9 to 2.11
        assert "aten::view.dtype" in str(e) and name == "fake_quant"
        batched = [torch.stack((want, want)) for want in expected]
    for got, want in zip(batched, expected, strict=True):
        torch.testing.assert_close(got, torch.stack((want, want)), **exact)
    slope = sum((g * u).sum() for g, u in zip(expected, upstream, strict=True))
    size = {"rtol": 1e-3, "atol": 1e-3 * sum(
        (g * u).abs().sum().item() for g, u in zip(expected, upstream, strict=True)
    )}  # fmt: skip
    _, tangent = torch.func.jvp(loss, tuple(leaves), tuple(upstream))
    torch.testing.assert_close(tangent, slope, **size)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, u) for t, u in zip(leaves, upstream, strict=True)]
        tangent = forward_ad.unpack_dual(loss(*duals)).tangent
        torch.testing.assert_close(tangent, slope, **size)
        for impl in implementations(operator):
            with pytest.raises(RuntimeError, match=f"{name}: impl={impl}: .*impl='reference'"):
                loss(*duals, impl=impl)
    for impl in implementations(operator):
        with pytest.raises(RuntimeError, match=f"{name}: impl={impl}: .*impl='reference'"):
            torch.func.grad(lambda *leaves, impl=impl: loss(*leaves, impl=impl))(*leaves)


@pytest.mark.parametrize("name", [n for n, o in OPERATORS.items() if not o.differentiable])
def test_operators_without_a_gradient(name: str) -> None:
    """Those that change their arguments refuse transforms, the others take the reference."""
    operator = OPERATORS[name]
    call = first_call(operator)
    if operator.mutates:
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name}: .*in place"):
            call.on(operator.call)
        with pytest.raises(RuntimeError, match=f"{name}: .*in place"):
            torch.func.grad(lambda x: (x, call.on(operator.call))[0])(torch.ones(()))
        return
    first = next(iter(call.arguments))
    given = call.arguments[first]
    leaf = (given if isinstance(given, Tensor) else given[0]).detach()

    def loss(leaf: Tensor, impl: str = "auto") -> Tensor:
        argument = leaf if isinstance(given, Tensor) else [leaf, *given[1:]]
        return total(operator.call(**call.arguments | {first: argument}, impl=impl))

    wanted = leaf.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(wanted, "reference"), wanted)
    torch.testing.assert_close(torch.func.grad(loss)(leaf), expected, rtol=1e-4, atol=1e-5)
    for impl in implementations(operator):
        with pytest.raises(RuntimeError, match=f"{name}: .*use impl='reference'"):
            loss(wanted, impl).backward()


@pytest.mark.parametrize("name", [n for n, o in OPERATORS.items() if o.differentiable])
def test_activation_checkpoints(name: str) -> None:
    """They unpack what was saved once, and refuse a second time."""
    call = first_call(OPERATORS[name])
    for impl in implementations(OPERATORS[name]):
        run = kernel(OPERATORS[name], impl)

        def again(*args: Any, run: Callable = run, **named: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False, **named)

        for mine, plain in zip(call.run(again), call.run(run), strict=True):
            torch.testing.assert_close(mine, plain)


def test_transforms_inside_of_compiled_code() -> None:
    call = first_call(OPERATORS["xsa"])
    leaves = [leaf.detach() for leaf in call.leaves()]
    gradient = torch.func.grad(lambda *leaves: total(call.on(xsa, *leaves)))
    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*leaves), gradient(*leaves))


@pytest.mark.parametrize("impl", ["cpu", "cuda"])
def test_a_hessian_is_never_zero_for_want_of_a_formula(impl: str) -> None:
    if impl not in implementations(OPERATORS["softcap_cross_entropy"]):
        pytest.skip(f"{impl} does not run here")
    x, w = torch.linspace(-1, 1, 40).view(5, 8), torch.linspace(1, -1, 160).view(20, 8).cos()
    targets = torch.arange(5)
    for vectorize in (False, True):
        with pytest.raises(RuntimeError, match="softcap_cross_entropy: .*impl='reference'"):
            torch.autograd.functional.hessian(
                lambda x: softcap_cross_entropy(x, w, targets, 30.0, impl=impl), x,
                vectorize=vectorize,
            )  # fmt: skip

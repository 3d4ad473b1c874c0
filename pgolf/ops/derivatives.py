"""Gradients of opaque operators: once, by a formula of their own, and nothing silently wrong.

A kernel's gradient is not differentiable again: what it saved would count as a constant. So every
operator registers its gradient here, where it leaves with a mark that says so when a second
derivative reaches it. (Forward-mode and torch.func never come this far: `choose.resolve`.)
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.inputs import without_autocast
from pgolf.ops.opaque import Opaque
from pgolf.ops.tensors import tensors_in


class _Sealed(torch.autograd.Function):
    """A gradient that may be used, but not differentiated for what it was computed of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, operator: str, *sources: Tensor) -> Tensor:
        return gradient.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.operator = inputs[1]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        raise RuntimeError(
            f"{ctx.operator}: its kernels have first derivatives only: use impl='reference' for "
            "second ones"
        )


def _sealed(operator: str, found: Any, sources: list[Tensor]) -> Any:
    """Every tensor of nested results, sealed."""
    if isinstance(found, (list, tuple)):
        return type(found)(_sealed(operator, item, sources) for item in found)
    return _Sealed.apply(found, operator, *sources) if isinstance(found, Tensor) else found


class _Reading:
    """A context whose saved tensors are unpacked once, as activation checkpointing wants it."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once(operator: str, gradient: Callable) -> Callable:
    """`gradient(ctx, *grads)` that can't be differentiated in turn, out of autocast's reach."""

    def run(ctx: Any, grads: tuple) -> Any:
        try:
            return gradient(ctx, *grads)
        except RuntimeError as e:
            if "Batching rule" not in str(e):
                raise
            raise RuntimeError(
                f"{operator}: its kernels take no batches of gradients: use impl='reference'"
            ) from e

    @functools.wraps(gradient)
    def call(ctx: Any, *grads: Any) -> Any:
        given = [t for grad in grads for t in tensors_in(grad)]
        reading = _Reading(ctx)
        if not given:
            return run(reading, grads)
        with without_autocast(given[0]):
            if not torch.is_grad_enabled():
                return run(reading, grads)
            with torch.no_grad():
                found = run(reading, grads)
        # Saved results count too: they lead to the arguments.
        used = (*given, *(t for t in reading.saved_tensors if t is not None))
        return _sealed(operator, found, [t for t in used if t.requires_grad])

    return call


def register_gradient(
    operator: str, forward: Opaque, gradient: Callable, setup_context: Callable
) -> None:
    """Give an opaque operator its gradient, as `register_autograd` takes it; `once`."""
    forward.register_autograd(once(operator, gradient), setup_context=setup_context)


def ticket(like: Tensor) -> Tensor:
    """A tensor of this shape without numbers: what an opaque operator returns for `rerouted`.

    Operators can't return a tensor twice, and autograd adds up the gradients of one in a pass of
    its own. The gradient of a ticket comes to its operator beside that of the tensor.
    """
    # Zero where that is no launch: who compares all results of an operator finds the same ones.
    if like.is_cuda:
        return like.new_empty_strided(like.shape, (0,) * like.dim())
    return like.new_zeros(1).expand(like.shape)


class _Rerouted(torch.autograd.Function):
    """A tensor whose gradient is that of a ticket."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, ticket: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return None, gradient


def rerouted(value: Tensor, ticket: Tensor) -> Tensor:
    """`value` once more, whose gradient is the ticket's and not added to that of `value`."""
    return _Rerouted.apply(value, ticket)


def factor_gradient(x: Tensor, dx: Tensor, factor: Tensor) -> Tensor:
    """The gradient of a factor of each row of x (..., D), not 0, of what takes only their product.

    rowdot(x, dx) / factor, of shape (...,).
    """
    return (x.to(factor.dtype) * dx.to(factor.dtype)).sum(-1) / factor


def register_no_gradient(operator: str, forward: Opaque) -> None:
    """Say what to do instead where somebody wants a gradient that the kernels do not have."""

    def gradient(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(
            f"{operator}: its kernels have no gradient: use impl='reference', or no_grad"
        )

    forward.register_autograd(gradient)

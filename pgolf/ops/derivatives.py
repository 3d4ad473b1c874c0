"""Gradients of opaque operators: once, by a formula of their own, and nothing silently wrong.

A kernel's gradient is not differentiable again: what it saved would count as a constant. So every
operator registers its gradient here, where it leaves with a mark that says so when a second
derivative reaches it. (Forward-mode and torch.func never come this far: `registry.resolve`.)
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from pgolf.ops.inputs import without_autocast
from pgolf.ops.registry import tensors_in


class _Sealed(torch.autograd.Function):
    """A gradient that may be used, but not differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, operator: str) -> Tensor:
        return t.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.operator = inputs[1]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        raise RuntimeError(
            f"{ctx.operator}: its kernels have first derivatives only: use impl='reference' for "
            "second ones"
        )


def _sealed(operator: str, found: Any) -> Any:
    """Every tensor of nested results, sealed."""
    if isinstance(found, list | tuple):
        return type(found)(_sealed(operator, item) for item in found)
    if not isinstance(found, Tensor):
        return found
    return _Sealed.apply(found.detach().requires_grad_(), operator)


def once(operator: str, gradient: Callable) -> Callable:
    """`gradient(ctx, *grads)` that can't be differentiated in turn, out of autocast's reach."""

    @functools.wraps(gradient)
    def call(ctx: Any, *grads: Any) -> Any:
        like = next((t for grad in grads for t in tensors_in(grad)), None)
        if like is None:
            return gradient(ctx, *grads)
        with without_autocast(like):
            if not torch.is_grad_enabled():
                return gradient(ctx, *grads)
            with torch.no_grad():
                found = gradient(ctx, *grads)
        return _sealed(operator, found)

    return call


def register_gradient(
    operator: str, forward: CustomOpDef, gradient: Callable, setup_context: Callable
) -> None:
    """Give an opaque operator its gradient, as `register_autograd` takes it."""
    forward.register_autograd(once(operator, gradient), setup_context=setup_context)


def register_no_gradient(operator: str, forward: CustomOpDef) -> None:
    """Say what to do instead where somebody wants a gradient that the kernels do not have."""

    def gradient(ctx: Any, *_: Any) -> tuple:
        raise RuntimeError(
            f"{operator}: its kernels have no gradient: use impl='reference', or no_grad"
        )

    forward.register_autograd(gradient)

"""One tensor that many layers take times factors of their own, in products that nobody writes.

    y_i = f_i x,   dx = sum over i of f_i dy_i,   df_i = sum over tokens of dy_i x

Kernels return x once more for each factor: what takes a copy has x's numbers and the factor, and
gives back the gradient of the product (`joined_norm`). Those of all copies are kept until the last
has come; then one launch reads each of them once, and x, for the gradients of x and all factors.

Shapes: x (..., D), factors (n, D), y_i (..., D).
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import register_gradient, rerouted, ticket
from pgolf.ops.inputs import Inputs, outside_autocast
from pgolf.ops.launch import DTYPE_CODES, Run, in_extension, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.operator import Operator, Sample, Work, register
from pgolf.ops.part_sums import Sums, check_deferred, sum_parts
from pgolf.ops.tensors import addresses, check_alike, compute_dtype, contiguous, nbytes, parts_of

# Gradients of factors are summed over parts of the rows, of so many at least; csrc/scaled_copies.h
MIN_PART, MAX_PARTS = 64, 528
_INPUTS = Inputs("scaled_copies", ("x", "factors"), alike=("x",), wide=("factors",))


@outside_autocast
def reference(x: Tensor, factors: Tensor) -> list[Tensor]:
    """`scaled_copies` in plain torch: the products."""
    return [f.to(x.dtype) * x for f in factors]


def sums_of(rows: int, factors: Tensor) -> Sums:
    """What `part_sums.deferred` takes for a call with these factors, x of so many rows."""
    return Sums(parts_of(rows, MIN_PART, MAX_PARTS), [factors])


def scaled_copies(
    x: Tensor, factors: Tensor, sums: Tensor | None = None, impl: str = "auto"
) -> list[Tensor]:
    """x for each of the factors, to be used in the products with them and nowhere else.

    For kernels only: a reference would have to give the products themselves.

    Args:
        x: (..., D).
        factors: (n, D), n >= 1, in fp32 (fp64 for an fp64 x).
        sums: what `part_sums.deferred` gives for `sums_of` these arguments: factors then get their
            gradient from there. None: from here.
        impl: 'auto', 'cpu' (C++; fp32, bf16, fp64) or 'cuda' (fp32, bf16).

    Returns:
        n tensors (..., D) with the numbers of x, whose gradients are those of the products with
        their factors.

    Raises:
        ValueError, RuntimeError: as `xsa`.
    """
    x, factors, impl = _checked(x, factors, impl)
    if impl == "reference":
        raise ValueError("scaled_copies: impl=reference takes no products: multiply them out")
    if sums is not None:
        own = sums_of(x.shape[:-1].numel(), factors)
        check_deferred("scaled_copies", sums, own, impl)
    return [rerouted(x, t) for t in _copies(x, factors, sums, impl)]


def _checked(x: Tensor, factors: Tensor, impl: str) -> tuple[Tensor, Tensor, str]:
    """The arguments as operators take them, and the implementation that runs."""
    x, factors = _INPUTS(x, factors)
    check_alike("scaled_copies", x=x)
    wide, width = compute_dtype(x.dtype), x.size(-1) if x.dim() else 0
    if not width or factors.dim() != 2 or factors.size(1) != width or not factors.size(0):
        raise ValueError(
            f"scaled_copies: x is {tuple(x.shape)} and factors {tuple(factors.shape)}: they have "
            "to be (..., D) and (n, D), D and n >= 1"
        )
    if factors.dtype != wide or factors.device != x.device:
        raise ValueError(
            f"scaled_copies: factors is {factors.dtype} on {factors.device}: for this x it has to "
            f"be {wide} on {x.device}"
        )
    return x, factors, resolve("scaled_copies", impl, x)


# --- the opaque operators -------------------------------------------------------------------------


def _tickets(x: Tensor, factors: Tensor) -> list[Tensor]:
    return [ticket(x) for _ in range(factors.size(0))]


@opaque("pgolf::scaled_copies", mutates_args=())
def _copies(x: Tensor, factors: Tensor, sums: Tensor | None, impl: str) -> list[Tensor]:
    """What stands for the copies in the gradient."""
    return _tickets(x, factors)


@_copies.register_fake
def _(x, factors, sums, impl):
    return _tickets(x, factors)


def _empty_results(x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """For dx and the sums over parts of the rows (parts, n D)."""
    parts = parts_of(x.numel() // x.size(-1), MIN_PART, MAX_PARTS)
    return x.new_empty(x.shape), factors.new_empty((parts, factors.numel()))


@opaque("pgolf::scaled_copies_backward", mutates_args=())
def _backward(
    gradients: list[Tensor], there: list[bool], x: Tensor, factors: Tensor, deferred: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx and the gradients of factors (n D,), `deferred` in parts.

    Args:
        there: which of the copies have gradients, in order.
    """
    given = iter(contiguous(*gradients))
    of_copies = [next(given) if known else None for known in there]
    run = launcher("scaled_copies", impl, "backward")
    return run(of_copies, *contiguous(x, factors), deferred)


@_backward.register_fake
def _(gradients, there, x, factors, deferred, impl):
    dx, parts = _empty_results(x, factors)
    return dx, parts if deferred else parts.new_empty(parts.size(1))


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, factors, sums, ctx.impl = inputs
    ctx.deferred = sums is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, factors)


def _gradient(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple:
    there = [g is not None for g in gradients]
    if not any(there):
        return None, None, None, None
    x, factors = ctx.saved_tensors
    given = [g for g in gradients if g is not None]
    dx, sums = _backward(given, there, x, factors, ctx.deferred, ctx.impl)
    return (dx, None, sums, None) if ctx.deferred else (dx, sums.view(factors.shape), None, None)


register_gradient("scaled_copies", _copies, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def _launchers(run: Run) -> dict[str, Callable]:
    """The gradient in the compiled half, by `run_cpp` or `run_cuda`."""

    def backward(
        gradients: Sequence[Tensor | None], x: Tensor, factors: Tensor, deferred: bool
    ) -> tuple[Tensor, Tensor]:
        dx, parts = _empty_results(x, factors)
        run(
            "scaled_copies_backward", x, addresses(*gradients), *addresses(x, factors, dx, parts),
            parts.size(0), DTYPE_CODES[x.dtype], x.numel() // x.size(-1), x.size(-1),
        )  # fmt: skip
        return dx, parts if deferred else sum_parts(run, [parts])

    return {"backward": backward}


def samples() -> list[Sample]:
    """More copies than a launch takes, ragged widths; the bench size is that of PR 1473."""

    def make(copies: int, tokens: int, width: int):
        def build(device: torch.device, dtype: torch.dtype) -> tuple[tuple, dict]:
            g = torch.Generator().manual_seed(width)
            x = torch.randn(1, tokens, width, generator=g).double()
            factors = torch.randn(copies, width, generator=g).double()
            return (x.to(device, dtype), factors.to(device, compute_dtype(dtype))), {}

        return build

    return [
        Sample("1 of 3x17", make(1, 3, 17)),
        Sample("11 of 150x64", make(11, 150, 64)),
        Sample("30 of 70x528", make(30, 70, 528)),
        Sample("0 tokens", make(2, 0, 16)),
        Sample("11 of 98304x512", make(11, 98304, 512), bench=True),
    ]


def cost(x: Tensor, factors: Tensor) -> tuple[Work, Work]:
    """Nothing forward; the gradient reads those of all copies, and x."""
    own = nbytes(x, factors)
    return Work(0, 0, 0), Work(0, factors.size(0) * nbytes(x) + own, own)


@functools.wraps(scaled_copies)
def _products(x: Tensor, factors: Tensor, *, impl: str = "auto") -> list[Tensor]:
    """What tests and benchmarks call: the copies, multiplied out."""
    x, factors, impl = _checked(x, factors, impl)
    if impl == "reference":
        return reference(x, factors)
    copies = scaled_copies(x, factors, impl=impl)
    pairs = zip(copies, factors.detach(), strict=True)
    return [rerouted((f * x.detach()).to(x.dtype), copy) for copy, f in pairs]


_products.__signature__ = inspect.signature(scaled_copies)
OPERATOR = register(
    Operator(
        name="scaled_copies",
        call=_products,
        reference=reference,
        differentiable=("x", "factors"),
        implementations=in_extension(("scaled_copies_backward",), _launchers),
        preferred={
            "cpu": [("cpu", "C++, every gradient once (python -m bench ops --op scaled_copies)")],
            "cuda": [("cuda", "every gradient once, one launch (python -m bench count)")],
        },
        samples=samples,
        cost=cost,
    )
)

"""The norm between two layers where what is added comes as products that nobody writes.

    x_in = sum of f_i t_i over up to four terms,   h = scale x_in rstd           (`residual_norm`)

A term has its own numbers t_i and stands for f_i t_i: what made it (`residual_norm`'s total_scale
and x_in_scale, `scaled_copies`) takes the gradient of the product, which is the same for all terms,
G. So one tensor goes back to all that was added, and the sums for the factors are made where the
numbers are at hand.

Shapes: terms (..., D), factors (D,). The kernels are those of `residual_norm`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import register_gradient, rerouted, ticket
from pgolf.ops.factored import Factored
from pgolf.ops.inputs import without_autocast
from pgolf.ops.launch import launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.product import MULTIPLIED, Product, handed_on
from pgolf.ops.residual_norm_kernels import backward, by_gemm
from pgolf.ops.tensors import check_alike, compute_dtype, contiguous

MOST_TERMS = 4


def joined_norm(
    terms: Sequence[Tensor | Product],
    factors: Sequence[Tensor | None],
    scale: float = 1.0,
    eps: float = 1e-6,
    impl: str = "auto",
    linear: str = "auto",
) -> tuple[Tensor, Factored]:
    """Add up products and norm the sum.

    Args:
        terms: one to four (..., D) of one dtype, the gradients of which are those of the products.
            The first of several may be a `Product`, which is multiplied here.
        factors: of each, (D,) in fp32 (fp64 for fp64 terms), constants; None is 1. Of several terms
            the first has none, the others one each.
        scale, eps, impl, linear: as of `residual_norm`, but for the reference, which knows no
            products.

    Returns:
        x_in (..., D), and h as a product of two factors.

    Raises:
        ValueError, RuntimeError: as `residual_norm`.
    """
    x, product = terms[0], MULTIPLIED
    if any(isinstance(t, Product) for t in (terms[1:] if len(terms) > 1 else terms)):
        raise ValueError("joined_norm: only the first of several terms may be a Product")
    if isinstance(x, Product):
        x = terms[1]
        first, product = handed_on("joined_norm", terms[0], x, linear)
        terms = [first, *terms[1:]]
    check_alike("joined_norm", **{f"term {i}": t for i, t in enumerate(terms)})
    wide = compute_dtype(x.dtype)
    if len(terms) != len(factors) or not 1 <= len(terms) <= MOST_TERMS:
        raise ValueError(
            f"joined_norm: {len(terms)} terms and {len(factors)} factors: give 1 to {MOST_TERMS}, "
            "and as many factors"
        )
    for i, (t, f) in enumerate(zip(terms, factors, strict=True)):
        if t.shape != x.shape:
            raise ValueError(
                f"joined_norm: term {i} is {tuple(t.shape)}: it has to be {tuple(x.shape)}"
            )
        if (f is not None) != (i > 0 or len(terms) == 1):
            raise ValueError(
                f"joined_norm: term {i} of {len(terms)} has {'no' if f is None else 'a'} factor: "
                "the first of several has none, every other one has one"
            )
        if f is not None and (f.shape != x.shape[-1:] or f.dtype != wide):
            raise ValueError(
                f"joined_norm: factor {i} is {f.dtype} {tuple(f.shape)}: it has to be {wide} "
                f"{tuple(x.shape[-1:])}"
            )
    impl = resolve("residual_norm", impl, x, width=x.size(-1))
    if impl == "reference":
        raise ValueError("joined_norm: impl=reference takes no products: use residual_norm")
    given = [f.detach() for f in factors if f is not None]
    x_in, h, factor = _forward(list(terms), given, *product, scale, eps, impl)
    return x_in, Factored(rerouted(x_in, h), factor.detach())


@opaque("pgolf::joined_norm", mutates_args=())
def _forward(
    terms: list[Tensor], factors: list[Tensor], z: Tensor | None, w: Tensor | None, linear: str,
    scale: float, eps: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x_in, the ticket of it as a factor of h, and the other factor (...,).

    Where z is there, z w^T is the first term, of which there is a ticket.
    """
    x, *others = terms
    others, factors = contiguous(*others), contiguous(*factors)
    if z is not None:
        made = by_gemm(z, w, others[0], _added(others, factors), scale, eps, False, linear)
        if made is not None:
            return made[1:]
        with without_autocast(z):
            x = z @ w.t()
    (x,) = contiguous(x)
    of_x = factors.pop() if not others else None
    nothing = [None] * (MOST_TERMS - 1 - len(others))
    # (The last place is that of x0 and its factor, which wants no other one of x.)
    branch, skip, x0 = [*others[:-1], *nothing, *others[-1:]]
    of_branch, of_skip, of_x0 = [*factors[:-1], *nothing, *factors[-1:]]
    inputs = x, branch, of_branch, skip, of_skip, x0, of_x, of_x0
    forward = launcher("residual_norm", impl, "forward")
    return forward(*inputs, scale, eps, True, False)[1:]


def _added(terms: list[Tensor], factors: list[Tensor]) -> dict[str, Tensor | None]:
    """What a GEMM adds to its product, of all terms behind it."""
    added = {"of_x": factors[0]}
    if len(terms) > 1:
        added |= {"x0": terms[-1], "of_x0": factors[-1]}
    if len(terms) > 2:
        added |= {"skip": terms[1], "of_skip": factors[1]}
    return added


@_forward.register_fake
def _(terms, factors, z, w, linear, scale, eps, impl):
    x = terms[0]
    rows = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), ticket(x), rows


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    terms, factors, _, _, _, *ctx.settings, ctx.impl = inputs
    ctx.counts = len(terms), len(factors)
    x_in, _, factor = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_in, factor)


def _gradient(ctx: Any, d_x_in: Tensor | None, dh: Tensor | None, d_factor: None) -> tuple:
    x_in, factor = ctx.saved_tensors
    nothing = [None] * 9
    settings = *ctx.settings, True, False, ctx.impl
    g = backward(None, d_x_in, dh, x_in, factor, *nothing, *settings)[0]
    terms, factors = ctx.counts
    return [g] * terms, [None] * factors, *[None] * 6


register_gradient("joined_norm", _forward, _gradient, _setup_context)

"""A matrix product that is left to who takes it: to a GEMM which does more than multiply."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.derivatives import register_gradient, rerouted, ticket
from pgolf.ops.inputs import without_autocast
from pgolf.ops.opaque import opaque
from pgolf.ops.tensors import check_alike


class Product(NamedTuple):
    """z w^T, which nobody has computed.

    Attributes:
        z: (..., K).
        w: (D, K).
        out: (..., D) ticket that takes the gradient of the product, where z and w are constants as
            far as gradients go; None: they take theirs.
    """

    z: Tensor
    w: Tensor
    out: Tensor | None = None

    def multiplied(self) -> Tensor:
        """(..., D), by torch's matmul, in the dtype of its factors."""
        with without_autocast(self.z):
            found = F.linear(self.z, self.w)
        return found if self.out is None else rerouted(found, self.out)

    def ticketed(self) -> "Product":
        """The same with a ticket, which gives z and w their gradients."""
        if self.out is not None:
            return self
        return Product(self.z.detach(), self.w.detach(), _ticket(self.z, self.w))


# z, w and who multiplies them: an implementation of `linear_mix`. Without z nobody has to.
Operands = tuple[Tensor | None, Tensor | None, str]
MULTIPLIED: Operands = (None, None, "")


def handed_on(
    operator: str, branch: Product, x: Tensor, linear: str, fused: bool = True
) -> tuple[Tensor, Operands]:
    """What stands for a product that `operator` adds to x, and what of it is still to be done.

    Args:
        linear: implementation of `linear_mix`.
        fused: whether the operator can leave it to one; if not, it is multiplied here.

    Raises:
        ValueError, RuntimeError: the product is not one of x's shape, dtype and device, or as
            `choose.resolve`.
    """
    z, w, out = branch
    inner = z.size(-1) if z.dim() else 0
    wanted = (*x.shape[:-1], inner), (x.size(-1), inner)
    if not inner or (tuple(z.shape), tuple(w.shape)) != wanted:
        raise ValueError(
            f"{operator}: a product of z {tuple(z.shape)} and w {tuple(w.shape)}: for x "
            f"{tuple(x.shape)} they have to be ({', '.join(map(str, (*x.shape[:-1], 'K')))}) and "
            f"({x.size(-1)}, K)"
        )
    if out is not None and out.shape != x.shape:
        raise ValueError(
            f"{operator}: a product's ticket is {tuple(out.shape)}: it has to be {tuple(x.shape)}"
        )
    check_alike(operator, x=x, z=z, w=w)
    impl = resolve("linear_mix", linear, x, width=x.size(-1), inner=inner)
    if impl == "reference" or not fused:
        return branch.multiplied(), MULTIPLIED
    z, w, ticket = branch.ticketed()
    return ticket, (z, w, impl)


def ticket_of(z: Tensor, w: Tensor) -> Tensor:
    """A ticket as the product of z (..., K) and w (D, K) would be."""
    return ticket(w[:, 0].expand(*z.shape[:-1], w.size(0)))


@opaque("pgolf::product", mutates_args=())
def _ticket(z: Tensor, w: Tensor) -> Tensor:
    return ticket_of(z, w)


@_ticket.register_fake
def _(z, w):
    return ticket_of(z, w)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    z, w = inputs
    need_z, need_w = ctx.needs_input_grad[:2]
    ctx.save_for_backward(z if need_w else None, w if need_z else None)


def _gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
    z, w = ctx.saved_tensors
    rows = d_out.reshape(-1, d_out.size(-1))
    dw = None if z is None else rows.t() @ z.reshape(rows.size(0), z.size(-1))
    return None if w is None else d_out @ w, dw


register_gradient("linear_residual or linear_mix", _ticket, _gradient, _setup_context)

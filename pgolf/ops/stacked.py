"""Parameters of many layers in one tensor, so that what is made of them is made of all at once.

    stacked: out[i] = parameters[i],   rows_of: the other way round

A compiler that sees the stack takes its gradient apart again: what made it is computed anew, in a
launch for each parameter. Here it arrives whole, and one launch hands it out.

Shapes: parameters (...), all alike, out and table (n, ...).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.derivatives import register_gradient, rerouted, ticket
from pgolf.ops.opaque import opaque


def stacked(parameters: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, the gradient of which is one launch on a GPU."""
    return _stacked(list(parameters))


@opaque("pgolf::stacked", mutates_args=())
def _stacked(parameters: list[Tensor]) -> Tensor:
    return torch.stack(parameters)


@_stacked.register_fake
def _(parameters):
    return torch.stack(parameters)


@opaque("pgolf::stacked_backward", mutates_args=())
def _apart(gradient: Tensor) -> list[Tensor]:
    rows = _empty_rows(gradient)
    torch._foreach_copy_(rows, list(gradient.unbind()))
    return rows


@_apart.register_fake
def _(gradient):
    return _empty_rows(gradient)


def _empty_rows(gradient: Tensor) -> list[Tensor]:
    return [gradient.new_empty(gradient.shape[1:]) for _ in range(gradient.size(0))]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


def _gradient(ctx: Any, gradient: Tensor) -> list[Tensor]:
    return _apart(gradient)


register_gradient("stacked", _stacked, _gradient, _setup_context)


# --- rows -----------------------------------------------------------------------------------------


def rows_of(table: Tensor) -> list[Tensor]:
    """`table.unbind()`, the gradients of which come together in one launch."""
    pairs = zip(table.detach().unbind(), _rows(table), strict=True)
    return [rerouted(row, one) for row, one in pairs]


@opaque("pgolf::rows", mutates_args=())
def _rows(table: Tensor) -> list[Tensor]:
    """What stands for the rows in the gradient."""
    return [ticket(row) for row in table.unbind()]


@_rows.register_fake
def _(table):
    return [ticket(row) for row in table.unbind()]


@opaque("pgolf::rows_backward", mutates_args=())
def _together(gradients: list[Tensor], there: list[bool]) -> Tensor:
    """The gradient of a table, of whose rows these are `there`."""
    given, nothing = iter(gradients), torch.zeros_like(gradients[0]) if not all(there) else None
    return torch.stack([next(given) if known else nothing for known in there])


@_together.register_fake
def _(gradients, there):
    return gradients[0].new_empty((len(there), *gradients[0].shape))


def _setup_rows(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)


def _gradient_of_rows(ctx: Any, gradients: Sequence[Tensor | None]) -> Tensor | None:
    given = [g for g in gradients if g is not None]
    return _together(given, [g is not None for g in gradients]) if given else None


register_gradient("rows_of", _rows, _gradient_of_rows, _setup_rows)

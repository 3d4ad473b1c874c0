"""Parameters of many layers in one tensor, so that what is made of them is made of all at once.

    out[i] = parameters[i]

A compiler that sees the stack takes its gradient apart again: what made it is computed anew, in a
launch for each parameter. Here it arrives whole, and one launch hands it out.

Shapes: parameters (...), all alike, out (n, ...).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.derivatives import register_gradient


def stacked(parameters: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, the gradient of which is one launch on a GPU."""
    return _stacked(list(parameters))


@torch.library.custom_op("pgolf::stacked", mutates_args=())
def _stacked(parameters: list[Tensor]) -> Tensor:
    return torch.stack(parameters)


@_stacked.register_fake
def _(parameters):
    return torch.stack(parameters)


@torch.library.custom_op("pgolf::stacked_backward", mutates_args=())
def _apart(gradient: Tensor) -> list[Tensor]:
    found = _room(gradient)
    torch._foreach_copy_(found, list(gradient.unbind()))
    return found


@_apart.register_fake
def _(gradient):
    return _room(gradient)


def _room(gradient: Tensor) -> list[Tensor]:
    return [gradient.new_empty(gradient.shape[1:]) for _ in range(gradient.size(0))]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


def _gradient(ctx: Any, gradient: Tensor) -> list[Tensor]:
    return _apart(gradient)


register_gradient("stacked", _stacked, _gradient, _setup_context)

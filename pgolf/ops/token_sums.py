"""Tables whose rows are looked up by id: the order of the tokens, and the gradient of a table.

    sums[i] = sum over the tokens of id i of x[token] / divisor[token]

Tokens are sorted by id, so that each sum is made in one order: nothing depends on threads or on the
size of a GPU. Operators whose kernels look rows up themselves call this in their gradients.

Shapes: ids and divisor (N, T), x (N, T, C), sums (V, C).
"""

import torch
from torch import Tensor

from pgolf.ops.launch import DTYPE_CODES, Run, launcher, run_cuda
from pgolf.ops.opaque import opaque
from pgolf.ops.tensors import addresses

ORDER_LIMITS = {"cuda": 32768}  # rows of a table whose tokens are sorted without torch


@opaque("pgolf::token_order", mutates_args=())
def shared_order(ids: Tensor, rows: int, impl: str) -> tuple[Tensor, Tensor]:
    """`token_order` for the gradients of several tables, which operators take as an argument.

    Args:
        ids: (N, T) int64.
        impl: 'cpu' or 'cuda'.

    Raises:
        ValueError: other ids.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"token_order: ids is {ids.dtype} {tuple(ids.shape)}: it has to be int64 (N, T)"
        )
    return launcher("embed_smear", impl, "order")(ids.contiguous(), rows)


@shared_order.register_fake
def _(ids, rows, impl):
    return ids.new_empty(ids.numel()), ids.new_empty(rows + 1)


def check_order(
    operator: str, name: str, order: tuple[Tensor, Tensor], ids: Tensor, rows: int
) -> None:
    """Raise ValueError unless an order can be that of these ids, as far as memory goes.

    On a GPU its numbers are not looked at, which would wait for them.
    """
    given = [(t.dtype, tuple(t.shape)) for t in order]
    wanted = [(torch.int64, (count,)) for count in (ids.numel(), rows + 1)]
    if given != wanted:
        raise ValueError(
            f"{operator}: {name} is {given}: for these ids and {rows} rows it has to be {wanted}"
        )
    if any(t.device != ids.device or not t.is_contiguous() for t in order):
        raise ValueError(f"{operator}: {name} has to be contiguous and on {ids.device}, as the ids")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or _within(*order):
        return
    raise ValueError(f"{operator}: {name} is no order of {ids.numel()} tokens: take `shared_order`")


def _within(order: Tensor, bounds: Tensor) -> bool:
    """Whether tokens that are there are read and written, and no others."""
    if not order.numel():
        return not bounds.any()
    low, high = order.aminmax()
    rising = (bounds[1:] >= bounds[:-1]).all()
    inside = 0 <= bounds[0] and bounds[-1] <= order.numel()
    return bool(0 <= low and high < order.numel() and rising and inside)


def token_order(run: Run, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens by id, stable, and where each id begins (rows + 1,): a counting sort, or torch's.

    Tokens of ids that are no rows lie outside of the bounds. On a GPU the counting sort keeps its
    counts in shared memory and indexes tokens in 32 bits: there larger ones are torch's.
    """
    small = rows <= ORDER_LIMITS["cuda"] and ids.numel() <= 2**31 - 1
    if run is run_cuda and not small:
        by_id, order = torch.sort(ids.flatten(), stable=True)
        return order, torch.searchsorted(by_id, torch.arange(rows + 1, device=ids.device))
    order, bounds = ids.new_empty(ids.numel()), ids.new_empty(rows + 1)
    run("token_order", ids, ids.data_ptr(), ids.numel(), rows, order.data_ptr(), bounds.data_ptr())
    return order, bounds


def token_sums(
    run: Run,
    ids: Tensor,
    rows: int,
    x: Tensor,
    divisor: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient of a table that these ids were looked up in, from that of their rows.

    Args:
        ids: (N, T) int64, contiguous.
        x: (N, T, C) with rows at any distance. Sums are made in fp32 (fp64 of fp64) and rounded to
            its dtype once.
        divisor: (N, T) in what x computes in, contiguous; None is 1.
        order: of these ids, if it is known.
    """
    order, bounds = order or token_order(run, ids, rows)
    flat = x.flatten(0, 1)
    sums = flat.new_empty((rows, flat.size(1)))
    run(
        "token_sums", x, *addresses(order, bounds, flat, divisor, sums), DTYPE_CODES[x.dtype],
        *(flat.size(0), *sums.shape, flat.stride(0)),
    )  # fmt: skip
    return sums

"""Tables whose rows are looked up by id: the order of the tokens, and the gradient of a table.

    sums[i] = sum over the tokens of id i of x[token] / divisor[token]

Tokens are sorted by id, so that each sum is made in one order: nothing depends on threads or on the
size of a GPU. Operators whose kernels look rows up themselves call this in their gradients.

Shapes: ids and divisor (N, T), x (N, T, C), sums (V, C).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops.launch import DTYPE_CODES, Run, launcher, run_cuda
from pgolf.ops.opaque import opaque
from pgolf.ops.tensors import addresses

ORDER_LIMITS = {"cuda": 32768}  # rows of a table whose tokens are sorted without torch
_MOST_TOKENS = 2**31 - 1  # they are numbered in 32 bits

# Tokens by id, and where each id begins among them: (N T,) and (V + 1,) int32.
Order = tuple[Tensor, Tensor]


def shared_orders(tables: Sequence[tuple[Tensor, int]], impl: str) -> list[Order]:
    """`token_orders` for the gradients of several tables, which operators take as arguments.

    Args:
        tables: ids (N, T) int64, and the number of rows that they are of.
        impl: 'cpu' or 'cuda'.

    Raises:
        ValueError: other ids.
    """
    found = _orders([ids for ids, _ in tables], [rows for _, rows in tables], impl)
    return list(zip(found[::2], found[1::2], strict=True))


@opaque("pgolf::token_order", mutates_args=())
def _orders(ids: list[Tensor], rows: list[int], impl: str) -> list[Tensor]:
    for i in ids:
        if i.dim() != 2 or i.dtype != torch.int64:
            raise ValueError(
                f"token_order: ids is {i.dtype} {tuple(i.shape)}: it has to be int64 (N, T)"
            )
    tables = [(i.contiguous(), count) for i, count in zip(ids, rows, strict=True)]
    return [t for order in launcher("embed_smear", impl, "orders")(tables) for t in order]


@_orders.register_fake
def _(ids, rows, impl):
    return [t for i, count in zip(ids, rows, strict=True) for t in _room(i, count)]


def _room(ids: Tensor, rows: int) -> Order:
    order, bounds = (ids.new_empty(n, dtype=torch.int32) for n in (ids.numel(), rows + 1))
    return order, bounds


def check_order(
    operator: str, name: str, order: Order, ids: Tensor, rows: int
) -> None:
    """Raise ValueError unless an order can be that of these ids, as far as memory goes.

    On a GPU its numbers are not looked at, which would wait for them.
    """
    given = [(t.dtype, tuple(t.shape)) for t in order]
    wanted = [(torch.int32, (count,)) for count in (ids.numel(), rows + 1)]
    if given != wanted:
        raise ValueError(
            f"{operator}: {name} is {given}: for these ids and {rows} rows it has to be {wanted}"
        )
    if any(t.device != ids.device or not t.is_contiguous() for t in order):
        raise ValueError(f"{operator}: {name} has to be contiguous and on {ids.device}, as the ids")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or _within(*order):
        return
    tokens = ids.numel()
    raise ValueError(f"{operator}: {name} is no order of {tokens} tokens: take `shared_orders`")


def _within(order: Tensor, bounds: Tensor) -> bool:
    """Whether tokens that are there are read and written, and no others."""
    if not order.numel():
        return not bounds.any()
    low, high = order.aminmax()
    rising = (bounds[1:] >= bounds[:-1]).all()
    inside = 0 <= bounds[0] and bounds[-1] <= order.numel()
    return bool(0 <= low and high < order.numel() and rising and inside)


def token_orders(run: Run, tables: Sequence[tuple[Tensor, int]]) -> list[Order]:
    """Tokens by id, stable, and where each id begins: counting sorts in one launch, or torch's.

    Tokens of ids that are no rows lie outside of the bounds. On a GPU the counting sort keeps its
    counts in shared memory: larger tables are torch's there.

    Raises:
        ValueError: there are too many tokens to be numbered.
    """
    for ids, _ in tables:
        if ids.numel() > _MOST_TOKENS:
            raise ValueError(f"token_order: {ids.numel()} tokens: it takes {_MOST_TOKENS} at most")
    limit = ORDER_LIMITS["cuda"] if run is run_cuda else math.inf
    orders = [_room(*table) if table[1] <= limit else _sorted(*table) for table in tables]
    lists = [
        (ids.data_ptr(), ids.numel(), rows, *addresses(*order))
        for (ids, rows), order in zip(tables, orders, strict=True)
        if rows <= limit
    ]
    if lists:
        run("token_order", tables[0][0], *map(list, zip(*lists, strict=True)))
    return orders


def _sorted(ids: Tensor, rows: int) -> Order:
    by_id, order = torch.sort(ids.flatten(), stable=True)
    bounds = torch.searchsorted(by_id, torch.arange(rows + 1, device=ids.device), out_int32=True)
    return order.int(), bounds


def with_missing(
    run: Run, tables: Sequence[tuple[Tensor, int]], orders: Sequence[Order | None]
) -> list[Order]:
    """Orders of tables; those that are not known are made in one launch."""
    unknown = [table for table, order in zip(tables, orders, strict=True) if order is None]
    made = iter(token_orders(run, unknown))
    return [next(made) if order is None else order for order in orders]


def token_sums(
    run: Run,
    ids: Tensor,
    rows: int,
    x: Tensor,
    divisor: Tensor | None = None,
    order: Order | None = None,
) -> Tensor:
    """The gradient of a table that these ids were looked up in, from that of their rows.

    Args:
        ids: (N, T) int64, contiguous.
        x: (N, T, C) with rows at any distance. Sums are made in fp32 (fp64 of fp64) and rounded to
            its dtype once.
        divisor: (N, T) in what x computes in, contiguous; None is 1.
        order: of these ids, if it is known.
    """
    ((order, bounds),) = with_missing(run, [(ids, rows)], [order])
    flat = x.flatten(0, 1)
    sums = flat.new_empty((rows, flat.size(1)))
    run(
        "token_sums", x, *addresses(order, bounds, flat, divisor, sums), DTYPE_CODES[x.dtype],
        *(flat.size(0), *sums.shape, flat.stride(0)),
    )  # fmt: skip
    return sums

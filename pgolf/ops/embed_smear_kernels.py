"""How `embed_smear` runs in kernels: the opaque operator, its gradient, the compiled half.

Tensors are as `embed_smear` takes them, None where there is none.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgolf.ops.derivatives import register_gradient
from pgolf.ops.launch import DTYPE_CODES, Run, launcher
from pgolf.ops.opaque import opaque
from pgolf.ops.tensors import addresses, compute_dtype, contiguous
from pgolf.ops.token_sums import token_orders, token_sums, with_missing

# Of positions that are sorted by id, as csrc/embed_smear.h has them.
CHUNK, CHUNKS_PER_BLOCK = 32, 4


def _results(ids: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for x and the rstd of each token."""
    wide = compute_dtype(dtype)
    x = table.new_empty((*ids.shape, table.size(1)), dtype=dtype)
    return x, table.new_empty(ids.shape, dtype=wide)


def _gradients(table: Tensor, bigram: Tensor | None, rstd: Tensor) -> tuple[Tensor, ...]:
    """Room for those of table and bigram (without one, for nothing) and the sums (D + 1,)."""
    dbigram = table.new_empty(0) if bigram is None else bigram.new_empty(bigram.shape)
    return table.new_empty(table.shape), dbigram, rstd.new_empty(table.size(1) + 1)


@opaque("pgolf::embed_smear", mutates_args=())
def forward(
    ids: Tensor, table: Tensor, bigram: Tensor | None, bigram_scale: Tensor | None,
    gate: Tensor | None, starts: Tensor | None, bigram_ids: Tensor | None, order: Tensor | None,
    bounds: Tensor | None, bigram_order: Tensor | None, bigram_bounds: Tensor | None, eps: float,
    dtype: torch.dtype, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = contiguous(ids, table, bigram, bigram_scale, gate, starts, bigram_ids)
    return launcher("embed_smear", impl, "forward")(*inputs, eps, dtype)


@forward.register_fake
def _(
    ids, table, bigram, bigram_scale, gate, starts, bigram_ids, order, bounds, bigram_order,
    bigram_bounds, eps, dtype, impl,
):  # fmt: skip
    return _results(ids, table, dtype)


@opaque("pgolf::embed_smear_backward", mutates_args=())
def _backward(
    dx: Tensor, rstd: Tensor, ids: Tensor, table: Tensor, bigram: Tensor | None,
    bigram_scale: Tensor | None, gate: Tensor | None, starts: Tensor | None,
    bigram_ids: Tensor | None, order: Tensor | None, bounds: Tensor | None,
    bigram_order: Tensor | None, bigram_bounds: Tensor | None, eps: float, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = contiguous(dx, rstd, ids, table, bigram, bigram_scale, gate, starts, bigram_ids)
    known = [
        None if order is None else (order, bounds),
        None if bigram_order is None else (bigram_order, bigram_bounds),
    ]
    return launcher("embed_smear", impl, "backward")(*inputs, known, eps)


@_backward.register_fake
def _(
    dx, rstd, ids, table, bigram, bigram_scale, gate, starts, bigram_ids, order, bounds,
    bigram_order, bigram_bounds, eps, impl,
):  # fmt: skip
    return _gradients(table, bigram, rstd)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps, _, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _gradient(ctx: Any, dx: Tensor, _: Tensor | None) -> tuple:
    rstd, *inputs = ctx.saved_tensors
    _, _, bigram, bigram_scale, gate, *_ = inputs
    dtable, dbigram, sums = _backward(dx, rstd, *inputs, ctx.eps, ctx.impl)
    return (
        None,
        dtable,
        None if bigram is None else dbigram,
        None if bigram_scale is None else sums[-1],
        None if gate is None else sums[:-1],
        *(None,) * 9,
    )


register_gradient("embed_smear", forward, _gradient, _setup_context)


# --- implementations ------------------------------------------------------------------------------


def _shape(ids: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """What the kernels call table_dtype, x_dtype, n, t, vocab and width."""
    return DTYPE_CODES[table.dtype], DTYPE_CODES[dtype], *ids.shape, *table.shape


def launchers(run: Run) -> dict[str, Callable]:
    """Forward and backward in the compiled half, by `run_cpp` or `run_cuda`."""

    def bigram_table(bigram, ids):  # its ids and its number of rows
        return (0, 0) if ids is None else (ids.data_ptr(), bigram.size(0))

    def forward(ids, table, bigram, bigram_scale, gate, starts, bigram_ids, eps, dtype):
        x, rstd = _results(ids, table, dtype)
        run(
            "embed_smear", table,
            *addresses(ids, table, bigram, bigram_scale, gate, starts),
            *bigram_table(bigram, bigram_ids), *addresses(x, rstd),
            *_shape(ids, table, dtype), eps,
        )  # fmt: skip
        return x, rstd

    def backward(
        dx, rstd, ids, table, bigram, bigram_scale, gate, starts, bigram_ids, known, eps
    ):  # fmt: skip
        dtable, dbigram, sums = _gradients(table, bigram if bigram_ids is None else dx, rstd)
        chunks = -(-ids.numel() // CHUNK)
        pieces = rstd.new_empty((2 * chunks, table.size(1)))
        partials = rstd.new_empty((-(-chunks // CHUNKS_PER_BLOCK), table.size(1) + 1))
        tables = [(ids, table.size(0))]
        if bigram_ids is not None:
            tables.append((bigram_ids, bigram.size(0)))
        order, *of_bigrams = with_missing(run, tables, known[: len(tables)])
        run(
            "embed_smear_backward", table,
            *addresses(ids, table, bigram, bigram_scale, gate, starts),
            *bigram_table(bigram, bigram_ids),
            *addresses(*order, dx, rstd, dtable, dbigram, sums, pieces),
            pieces.size(0), partials.data_ptr(), partials.size(0),
            *_shape(ids, table, dx.dtype), eps,
        )  # fmt: skip
        if bigram_ids is not None:
            dbigram = token_sums(run, *tables[1], dbigram, order=of_bigrams[0])
        return dtable, dbigram, sums

    orders = functools.partial(token_orders, run)
    return {"forward": forward, "backward": backward, "orders": orders}

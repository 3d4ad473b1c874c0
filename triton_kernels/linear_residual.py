"""A projection, the residual stream it is added to, and the norm's factor, in one GEMM.

    total = of_x x + z @ w^T + of_skip skip,   out = of_total total + of_x0 x0
    factor = scale / sqrt(mean of a row's squares + eps)

What is not given is 0, or a factor of 1. z @ w^T stays in the fp32 accumulator, and the squares are
those of the sum before it is rounded. A program has all tiles of its rows, one after the other, so
that it adds up their squares itself: no partial sums are written, no other program is waited for,
and the factor is there for whoever takes it. The second tile finds its rows of z in the L2.

Persistent with TMA descriptors, for bf16 on sm_90 and the like.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pgolf.triton_kernels.gemm import (
    block_shape,
    halves,
    load_columns,
    persistent_grid,
    takes_tma,
)
from pgolf.triton_kernels.launch import launch, on_device_of, pick


@triton.jit
def sum_of_squares(x, first, n):
    """Of each row's columns from `first` on that are below n. Beyond lies anything."""
    columns = first + tl.arange(0, x.shape[1])
    return tl.sum(tl.where((columns < n)[None, :], x * x, 0.0), axis=1)


@triton.jit
def load_terms(x, skip, x0, x_t, skip_t, x0_t, rows, first, t, n, WIDTH: tl.constexpr):
    """Columns from `first` on of what is added; those of x again for what there is not."""
    xs = load_columns(x, rows, first, t, n, x_t, WIDTH)
    skips, x0s = xs, xs
    if skip is not None:
        skips = load_columns(skip, rows, first, t, n, skip_t, WIDTH)
    if x0 is not None:
        x0s = load_columns(x0, rows, first, t, n, x0_t, WIDTH)
    return xs, skips, x0s


@triton.jit
def scaled(x, factors, columns, n):
    """x in fp32, its columns times their factors if there are any."""
    x = x.to(tl.float32)
    if factors is not None:
        x *= tl.load(factors + columns, mask=columns < n)[None, :]
    return x


@triton.jit
def linear_residual_tma(
    z, w, x, skip, x0, out, total, factor, of_x, of_skip, of_total, of_x0,
    t, k, n, x_t, skip_t, x0_t, scale, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    PER_SM: tl.constexpr,
):  # fmt: skip
    """out, total and factor (t,) from descriptors of z (t, k), w (n, k), out and total (t, n); x,
    skip and x0 (t, n) by pointers with so many elements from row to row; factors (n,).

    The epilogue goes through a tile in PARTS of its columns. It finds what the first adds, which
    was requested before the last products, and requests the next one's a part ahead.
    """
    tl.assume(k > 0)  # spares a second copy of the epilogue, for accumulators of nothing
    # As TMA asks of out's rows, and the launcher of the others': they are read 16 bytes at once.
    n, x_t = tl.multiple_of(n, 8), tl.multiple_of(x_t, 16)
    if skip is not None:
        skip_t = tl.multiple_of(skip_t, 16)
    if x0 is not None:
        x0_t = tl.multiple_of(x0_t, 16)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    tiles_n = tl.cdiv(n, BLOCK_N)
    mine = tl.cdiv(tl.cdiv(t, BLOCK_M) - tl.program_id(0), tl.num_programs(0))
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(0, mine * tiles_n, flatten=True):
        row = (tl.program_id(0) + tile // tiles_n * tl.num_programs(0)) * BLOCK_M
        column = tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        xs = tl.zeros((BLOCK_M, WIDTH), tl.bfloat16)
        skips, x0s = xs, xs
        for start in range(0, k, BLOCK_K):
            left = z.load([row, start])
            right = w.load([column, start])
            wanted = tl.where(start + BLOCK_K < k, 0, t)  # rows
            rows = row + tl.arange(0, BLOCK_M)
            xs, skips, x0s = load_terms(
                x, skip, x0, x_t, skip_t, x0_t, rows, column, wanted, n, WIDTH
            )
            acc = tl.dot(left, right.T, acc)
        rows = row + tl.arange(0, BLOCK_M)
        squares = tl.where(column == 0, 0.0, squares)
        sums = halves(acc)
        for part in tl.static_range(PARTS):
            first = column + part * WIDTH
            columns = first + tl.arange(0, WIDTH)
            if PARTS == 2:
                value = sums[part]
            else:
                value = halves(sums[part // 2])[part % 2]
            this_x, this_skip, this_x0 = xs, skips, x0s
            if part + 1 < PARTS:
                xs, skips, x0s = load_terms(
                    x, skip, x0, x_t, skip_t, x0_t, rows, first + WIDTH, t, n, WIDTH
                )
            value += scaled(this_x, of_x, columns, n)
            if skip is not None:
                value += scaled(this_skip, of_skip, columns, n)
            if total is not None:
                total.store([row, first], value.to(tl.bfloat16))
            value = scaled(value, of_total, columns, n)
            if x0 is not None:
                value += scaled(this_x0, of_x0, columns, n)
            squares += sum_of_squares(value, first, n)
            out.store([row, first], value.to(tl.bfloat16))
        last = column + BLOCK_N >= n
        tl.store(factor + rows, scale / tl.sqrt_rn(squares / n + eps), mask=last & (rows < t))


def linear_residual(
    z: Tensor, w: Tensor, x: Tensor, scale: float, eps: float, *,
    skip: Tensor | None = None, x0: Tensor | None = None, of_x: Tensor | None = None,
    of_skip: Tensor | None = None, of_total: Tensor | None = None, of_x0: Tensor | None = None,
    keep_total: bool = False, tma: bool | None = None,
) -> tuple[Tensor | None, Tensor, Tensor] | None:  # fmt: skip
    """total, out and the factor of its rows: new contiguous tensors; None: it is not possible.

    Args:
        z: (T, K), w: (D, K), x, skip and x0: (T, D), bf16.
        scale, eps: of the factor (T,), which is fp32.
        of_x, of_skip, of_total, of_x0: (D,) fp32 contiguous factors; None is 1.
        keep_total: whether total is wanted; else it is None.
        tma: force (True) or forbid (False) the kernel; None takes it where it is possible.

    Raises:
        ValueError: tma=True where the kernel is not possible.
    """
    states = {n: t for n, t in {"x": x, "skip": skip, "x0": x0}.items() if t is not None}
    if not takes_tma("linear_residual", tma, z, w, *states.values(), obstacle=_unreadable(states)):
        return None
    config = pick("linear_residual_tma", states=len(states))
    out = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    total = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device) if keep_total else None
    factor = torch.empty((x.size(0),), dtype=torch.float32, device=x.device)
    block_m, block_n, block_k = block_shape(config)
    part = [block_m, block_n // config.blocks["PARTS"]]
    with on_device_of(z):
        launch(
            linear_residual_tma, persistent_grid(config, z, 1), config,
            z=TensorDescriptor.from_tensor(z, [block_m, block_k]),
            w=TensorDescriptor.from_tensor(w, [block_n, block_k]),
            out=TensorDescriptor.from_tensor(out, part),
            total=TensorDescriptor.from_tensor(total, part) if keep_total else None,
            x=x, skip=skip, x0=x0, x_t=x.stride(0),
            skip_t=0 if skip is None else skip.stride(0), x0_t=0 if x0 is None else x0.stride(0),
            of_x=of_x, of_skip=of_skip, of_total=of_total, of_x0=of_x0,
            factor=factor, scale=scale, eps=eps, t=z.size(0), k=z.size(1), n=w.size(0),
        )  # fmt: skip
    return total, out, factor


def _unreadable(states: Mapping[str, Tensor]) -> str:
    """Why the epilogue cannot read these (T, D), or an empty string."""
    for name, t in states.items():
        if t.size(1) % 8:
            return f"{t.size(1)} columns are no multiple of 8"
        if t.stride(0) % 16:  # of such rows the epilogue takes another 32 KB
            return (
                f"rows of {name} are {t.stride(0)} elements apart, no multiple of 16, and take "
                "more shared memory than there is"
            )
    return ""

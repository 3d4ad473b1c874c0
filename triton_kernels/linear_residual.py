"""An output projection, the residual stream it is added to, and the norm's factor, in one GEMM.

    out = x + z @ w^T,   factor = scale / sqrt(mean of a row's squares + eps)

z @ w^T stays in the fp32 accumulator, and the squares are those of the sum before it is rounded. A
program has all tiles of its rows, one after the other, so that it adds up their squares itself: no
partial sums are written, no other program is waited for, and the factor is there for whoever takes
it. The second tile finds its rows of z in the L2.

Persistent with TMA descriptors, for bf16 on sm_90 and the like.
"""

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
def linear_residual_tma(
    z, w, x, out, factor, t, k, n, x_t, scale, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """out and factor (t,) from descriptors of z (t, k), w (n, k), out (t, n); x (t, n) by pointers
    with x_t elements from row to row.

    The epilogue goes through a tile in halves. It finds the first one's x, which was requested
    before the last products, and requests the second's half a tile ahead.
    """
    tl.assume(k > 0)  # spares a second copy of the epilogue, for accumulators of nothing
    # As TMA asks of out's rows, and the launcher of x's: they are read 16 bytes at once.
    n, x_t = tl.multiple_of(n, 8), tl.multiple_of(x_t, 16)
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_n = tl.cdiv(n, BLOCK_N)
    mine = tl.cdiv(tl.cdiv(t, BLOCK_M) - tl.program_id(0), tl.num_programs(0))
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(0, mine * tiles_n, flatten=True):
        row = (tl.program_id(0) + tile // tiles_n * tl.num_programs(0)) * BLOCK_M
        column = tile % tiles_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        xs = tl.zeros((BLOCK_M, HALF), tl.bfloat16)
        for start in range(0, k, BLOCK_K):
            left = z.load([row, start])
            right = w.load([column, start])
            wanted = tl.where(start + BLOCK_K < k, 0, t)  # rows
            rows = row + tl.arange(0, BLOCK_M)
            xs = load_columns(x, rows, column, wanted, n, x_t, HALF)
            acc = tl.dot(left, right.T, acc)
        rows = row + tl.arange(0, BLOCK_M)
        sums = halves(acc)
        following = load_columns(x, rows, column + HALF, t, n, x_t, HALF)
        total = sums[0] + xs.to(tl.float32)
        squares = tl.where(column == 0, 0.0, squares) + sum_of_squares(total, column, n)
        out.store([row, column], total.to(tl.bfloat16))
        total = sums[1] + following.to(tl.float32)
        squares += sum_of_squares(total, column + HALF, n)
        out.store([row, column + HALF], total.to(tl.bfloat16))
        last = column + BLOCK_N >= n
        tl.store(factor + rows, scale / tl.sqrt_rn(squares / n + eps), mask=last & (rows < t))


def linear_residual(
    z: Tensor, w: Tensor, x: Tensor, scale: float, eps: float, tma: bool | None = None
) -> tuple[Tensor, Tensor] | None:
    """x + z @ w^T and the factor of its rows: new contiguous tensors; None: it is not possible.

    Args:
        z: (T, K), w: (D, K), x: (T, D), bf16.
        scale, eps: of the factor (T,), which is fp32.
        tma: force (True) or forbid (False) the kernel; None takes it where it is possible.

    Raises:
        ValueError: tma=True where the kernel is not possible.
    """
    obstacle = "" if x.size(1) % 8 == 0 else f"{x.size(1)} columns are no multiple of 8"
    if not obstacle and x.stride(0) % 16:  # of such an x the epilogue takes another 32 KB
        obstacle = (
            f"rows of x are {x.stride(0)} elements apart, no multiple of 16, and take more shared "
            "memory than there is"
        )
    if not takes_tma("linear_residual", tma, z, w, x, obstacle=obstacle):
        return None
    config = pick("linear_residual_tma")
    out = torch.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    factor = torch.empty((x.size(0),), dtype=torch.float32, device=x.device)
    block_m, block_n, block_k = block_shape(config)
    with on_device_of(z):
        launch(
            linear_residual_tma, persistent_grid(config, z, 1), config,
            z=TensorDescriptor.from_tensor(z, [block_m, block_k]),
            w=TensorDescriptor.from_tensor(w, [block_n, block_k]),
            out=TensorDescriptor.from_tensor(out, [block_m, block_n // 2]),
            x=x, x_t=x.stride(0), factor=factor, scale=scale, eps=eps,
            t=z.size(0), k=z.size(1), n=w.size(0),
        )  # fmt: skip
    return out, factor

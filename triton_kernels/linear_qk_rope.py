"""The projection to queries, keys and values with what `qk_rope` makes of it, in one GEMM.

    p = f x @ w^T,   of a head of q and k:   n = rstd p,   y = gain R n;   of v:   p + value

A tile has whole heads, half of it of one kind, so that p stays in the fp32 accumulator: its norm is
a sum within the tile, and a rotation pairs columns that one thread has. A program has all tiles of
its rows, one after the other: heads of all kinds, so that none has the slow ones alone.

The gradient starts from q, k and rstd, by the row kernels of `qk_rope`. To find n in q it divides
by the gain: one near 0 is taken for 2^-100 or -2^-100, with which q is as good as 0 and n is in it
with all of its bits.

Persistent with TMA descriptors, for bf16 on sm_90 and the like.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pgolf.triton_kernels.gemm import (
    block_shape,
    device_obstacle,
    halves,
    persistent_grid,
    tma_obstacle,
)
from pgolf.triton_kernels.launch import launch, on_device_of, pick

LEAST_GAIN = tl.constexpr(2.0**-100)  # csrc/qk_rope.h has it too


@triton.jit
def rotated(y, c, s, SIZE: tl.constexpr):
    """R y for heads of SIZE beside each other (rows, columns); c and s (rows, pairs of a head)."""
    ROWS: tl.constexpr = y.shape[0]
    PAIRS: tl.constexpr = c.shape[1]
    BLOCKS: tl.constexpr = y.shape[1] // (2 * PAIRS)
    pairs = tl.permute(tl.reshape(y, (ROWS, BLOCKS, 2, PAIRS)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    turns = (tl.arange(0, BLOCKS) % (SIZE // (2 * PAIRS)) == 0)[None, :, None]
    c, s = c[:, None, :], s[:, None, :]
    both = tl.join(
        tl.where(turns, first * c + second * s, first),
        tl.where(turns, second * c - first * s, second),
    )
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), y.shape)


@triton.jit
def turned_heads(
    p, f, c, s, gain, heads, rstd, rows, t, queries, keys_end, eps, SIZE: tl.constexpr
):  # fmt: skip
    """y of the heads p of queries or keys, whose numbers are `heads`; writes their rstd."""
    packed = tl.reshape(p, (p.shape[0], p.shape[1] // SIZE, SIZE))
    squares = tl.sum(packed * packed, axis=2)
    # (A GPU's own reciprocal root takes the smallest numbers for 0.)
    factor = f[:, None] / tl.sqrt_rn(squares * (f * f)[:, None] * (1.0 / SIZE) + eps)
    offsets = rows.to(tl.int64)[:, None] * keys_end + heads[None, :]
    tl.store(rstd + offsets, factor, mask=(rows < t)[:, None])
    gains = tl.load(gain + heads, mask=heads < queries, other=1.0)
    least = tl.where(gains < 0, -LEAST_GAIN, LEAST_GAIN)
    gains = tl.where(tl.abs(gains) < LEAST_GAIN, least, gains)
    normed = packed * (factor * gains[None, :])[:, :, None]
    return rotated(tl.reshape(normed, p.shape), c, s, SIZE)


@triton.jit
def with_values(p, f, value, ids, count, rows, t, column, width):
    """f p with rows of `value`, or those of the tokens' ids in a table of `count` rows, added.

    NaN for an id that the table does not have.
    """
    columns = column + tl.arange(0, p.shape[1])
    inside, known = rows < t, rows < t
    source = rows.to(tl.int64)
    if ids is not None:
        source = tl.load(ids + rows, mask=inside, other=0)
        known = (source >= 0) & (source < count)
    offsets = source[:, None] * width + columns[None, :]
    mask = (inside & known)[:, None] & (columns < width)[None, :]
    added = tl.load(value + offsets, mask=mask, other=0.0).to(tl.float32)
    return p * f[:, None] + tl.where(known[:, None], added, float("nan"))


@triton.jit
def linear_qk_rope_tma(
    x, w, q, k, v, rstd, cos, sin, gain, factor, value, ids, t, d, time, queries, groups, count,
    eps, SIZE: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_SM: tl.constexpr,
):  # fmt: skip
    """q, k, v by descriptors and rstd (t, queries + groups) from descriptors of x (t, d) and w.

    The epilogue goes through a tile in halves, of whole heads of one kind each. Angles and factors
    are requested while the last product is on its way.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    HEADS: tl.constexpr = HALF // SIZE
    keys_end = queries + groups
    tiles_n = tl.cdiv((keys_end + groups) * SIZE, BLOCK_N)
    steps = tl.cdiv(d, BLOCK_K)
    mine = tl.cdiv(tl.cdiv(t, BLOCK_M) - tl.program_id(0), tl.num_programs(0))
    pairs = tl.arange(0, PAIRS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # (Triton's own `flatten` takes no branches behind the inner loop.)
    for step in tl.range(0, mine * tiles_n * steps):
        tile = step // steps
        start = step % steps * BLOCK_K
        row = (tl.program_id(0) + tile // tiles_n * tl.num_programs(0)) * BLOCK_M
        column = tile % tiles_n * BLOCK_N
        left = x.load([row, start])
        right = w.load([column, start])
        acc = tl.dot(left, right.T, acc)
        if start + BLOCK_K >= d:
            rows = row + tl.arange(0, BLOCK_M)
            f = tl.full((BLOCK_M,), 1.0, tl.float32)
            if factor is not None:
                f = tl.load(factor + rows, mask=rows < t, other=1.0)
            angles = (rows % time)[:, None] * PAIRS + pairs[None, :]
            c = tl.load(cos + angles)
            s = tl.load(sin + angles)
            parts = halves(acc)
            for half in tl.static_range(2):
                first = (column + half * HALF) // SIZE
                if first < keys_end:
                    heads = first + tl.arange(0, HEADS)
                    y = turned_heads(
                        parts[half], f, c, s, gain, heads, rstd, rows, t, queries, keys_end, eps,
                        SIZE,
                    )  # fmt: skip
                    if first < queries:
                        q.store([row, first * SIZE], y.to(tl.bfloat16))
                    else:
                        k.store([row, (first - queries) * SIZE], y.to(tl.bfloat16))
                else:
                    at = (first - keys_end) * SIZE
                    if value is None:
                        y = parts[half] * f[:, None]
                    else:
                        y = with_values(
                            parts[half], f, value, ids, count, rows, t, at, groups * SIZE
                        )  # fmt: skip
                    v.store([row, at], y.to(tl.bfloat16))
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


def obstacle(
    device: torch.device, dtype: torch.dtype, columns: int, heads: int, kv_heads: int, size: int,
    pairs: int,
) -> str:  # fmt: skip
    """Why the GEMM cannot run for x of so many columns and such heads, or an empty string."""
    width = pick("linear_qk_rope_tma").blocks["BLOCK_N"] // 2
    if problem := device_obstacle(device):
        return problem
    if dtype != torch.bfloat16:
        return f"{dtype} is not bfloat16"
    if columns % 8:
        return f"rows of {columns} elements are not aligned to 16 bytes"
    # (Of larger heads, and of more pairs with values of a table, the epilogue spills.)
    if not (size in (16, 32, 64) and pairs in (8, 16) and 2 * pairs <= size):
        return (
            f"heads of {size} elements with {pairs} rotated pairs are not of 16, 32 or 64 with 8 "
            "or 16 pairs"
        )
    if heads * size % width or kv_heads * size % width:
        return f"{heads} and {kv_heads} heads of {size} elements are no multiples of {width}"
    return ""


def linear_qk_rope(
    x: Tensor, w: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, factor: Tensor | None,
    value: Tensor | None, value_ids: Tensor | None, heads: int, kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q (N, T, H, d), k, v (N, T, G, d) and rstd (N, T, H + G), where `obstacle` finds nothing.

    Args:
        x: (N, T, D), w: ((H + 2 G) d, D), bf16; copied where TMA cannot read them.
        cos, sin: (T, pairs), gain: (H,), factor: (N, T), fp32.
        value: (N, T, G d), or with `value_ids` (N, T) a table (V, G d).
    """
    batch, time, width = x.shape
    size = w.size(0) // (heads + 2 * kv_heads)
    x, w = (_readable(t) for t in (x.reshape(batch * time, width), w))
    (cos, sin, gain, factor, value, value_ids) = (
        None if t is None else t.contiguous() for t in (cos, sin, gain, factor, value, value_ids)
    )

    def empty(count: int, *sizes: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty((batch, time, count, *sizes), dtype=dtype, device=x.device)

    q, k, v = (empty(count, size) for count in (heads, kv_heads, kv_heads))
    rstd = empty(heads + kv_heads, dtype=torch.float32)
    if not x.size(0):
        return q, k, v, rstd
    config = pick("linear_qk_rope_tma")
    block_m, block_n, block_k = block_shape(config)
    by_row = [block_m, block_n // 2]
    with on_device_of(x):
        launch(
            linear_qk_rope_tma, persistent_grid(config, x, 1), config,
            x=TensorDescriptor.from_tensor(x, [block_m, block_k]),
            w=TensorDescriptor.from_tensor(w, [block_n, block_k]),
            q=TensorDescriptor.from_tensor(q.view(-1, heads * size), by_row),
            k=TensorDescriptor.from_tensor(k.view(-1, kv_heads * size), by_row),
            v=TensorDescriptor.from_tensor(v.view(-1, kv_heads * size), by_row),
            rstd=rstd, cos=cos, sin=sin, gain=gain, factor=factor, value=value, ids=value_ids,
            t=x.size(0), d=width, time=time, queries=heads, groups=kv_heads,
            count=0 if value_ids is None else value.size(0), eps=eps, SIZE=size, PAIRS=cos.size(1),
        )  # fmt: skip
    return q, k, v, rstd


def _readable(t: Tensor) -> Tensor:
    """t, or a copy that TMA can read."""
    return t.clone(memory_format=torch.contiguous_format) if tma_obstacle(t) else t

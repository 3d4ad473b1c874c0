"""The gradient through an MLP's up projection and the RMS norm before it, in one GEMM.

    dx = [x_scale] g + dpre @ w_up - weight x,   weight = coefficient factor^2 sum of a row's dots
    parts[block, column] = sum over a block of rows of g x, where there is an x_scale

g is what x gets from elsewhere. A row's dots are parts of <dpost, post>, which the gradient through
the down projection writes (`leaky_relu2_dgrad_tma`): so what the norm takes out of a row is known
before dpre @ w_up is, which stays in the fp32 accumulator. Written it is never.

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
    tile_of,
)
from pgolf.triton_kernels.launch import cdiv, launch, on_device_of, pick
from pgolf.triton_kernels.leaky_relu2_mlp import dot_parts, down_dgrad


@triton.jit
def load_dots(dots, rows, t, count, DOTS: tl.constexpr):
    """(rows, DOTS) of dots (count, t), 0 beyond the edges."""
    places = tl.arange(0, DOTS)
    offsets = places.to(tl.int64)[None, :] * t + rows[:, None]
    return tl.load(dots + offsets, mask=(rows < t)[:, None] & (places < count)[None, :], other=0.0)


@triton.jit
def products_of_columns(a, b, rows, t):
    """Sums of a * b along columns, over their rows that are below t. Beyond lies anything."""
    return tl.sum(tl.where((rows < t)[:, None], a * b, 0.0), axis=0)


@triton.jit
def norm_mlp_dgrad_tma(
    dpre, w_up, g, x, factor, dots, x_scale, dx, parts, t, f, n, g_t, x_t, count, coefficient,
    DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PER_SM: tl.constexpr,
):  # fmt: skip
    """dx and parts (blocks of rows, n) from descriptors of dpre (t, f), w_up (f, n), dx (t, n); g
    and x (t, n) by pointers with g_t and x_t elements from row to row, factor (t,), dots (count,
    t).

    The epilogue goes through a tile in eighths. It finds the dots and the first one's g and x,
    which were requested before the last products, and requests the next one's an eighth ahead.
    """
    tl.assume(f > 0)  # spares a second copy of the epilogue, for accumulators of nothing
    EIGHTH: tl.constexpr = BLOCK_N // 8
    tiles_m, tiles_n = tl.cdiv(t, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True
    ):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        found = tl.zeros((BLOCK_M, DOTS), tl.float32)
        next_g = tl.zeros((BLOCK_M, EIGHTH), tl.bfloat16)
        next_x = next_g
        for start in range(0, f, BLOCK_K):
            left = dpre.load([row, start])
            right = w_up.load([start, column])
            wanted = tl.where(start + BLOCK_K < f, 0, t)  # rows
            rows = row + tl.arange(0, BLOCK_M)
            found = load_dots(dots, rows, wanted, count, DOTS)
            next_g = load_columns(g, rows, column, wanted, n, g_t, EIGHTH)
            next_x = load_columns(x, rows, column, wanted, n, x_t, EIGHTH)
            acc = tl.dot(left, right, acc)
        rows = row + tl.arange(0, BLOCK_M)
        of_rows = tl.load(factor + rows, mask=rows < t, other=0.0)
        weight = (coefficient * (of_rows * of_rows) * tl.sum(found, axis=1))[:, None]
        sums = halves(acc)
        for i in tl.static_range(8):
            first = column + i * EIGHTH
            gs, xs = next_g.to(tl.float32), next_x.to(tl.float32)
            if i < 7:
                next_g = load_columns(g, rows, first + EIGHTH, t, n, g_t, EIGHTH)
                next_x = load_columns(x, rows, first + EIGHTH, t, n, x_t, EIGHTH)
            if x_scale is not None:
                columns = first + tl.arange(0, EIGHTH)
                of_columns = products_of_columns(gs, xs, rows, t)
                tl.store(parts + tile_m.to(tl.int64) * n + columns, of_columns, mask=columns < n)
                gs *= tl.load(x_scale + columns, mask=columns < n, other=0.0)[None, :]
            part = halves(halves(sums[i // 4])[i // 2 % 2])[i % 2]
            dx.store([row, first], (part + gs - weight * xs).to(tl.bfloat16))


def dgrad(
    dpre: Tensor, w_up: Tensor, g: Tensor, x: Tensor, factor: Tensor, dots: Tensor,
    coefficient: float, x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx (T, D) in x's dtype, and parts (blocks of rows, D) in fp32 where there is an x_scale.

    Args:
        dpre: (T, F), w_up: (F, D), g, x: (T, D), where `gradient` finds nothing against TMA.
        factor: (T,), dots: (parts, T), x_scale: (D,), all fp32 and contiguous.
    """
    (t, f), n = dpre.shape, w_up.size(1)
    config = pick("norm_mlp_dgrad_tma")
    block_m, block_n, block_k = block_shape(config)
    dx = torch.empty((t, n), dtype=x.dtype, device=x.device)
    parts = None
    if x_scale is not None:
        parts = torch.empty((cdiv(t, block_m), n), dtype=torch.float32, device=x.device)
    with on_device_of(dpre):
        launch(
            norm_mlp_dgrad_tma, persistent_grid(config, dpre, n), config,
            dpre=TensorDescriptor.from_tensor(dpre, [block_m, block_k]),
            w_up=TensorDescriptor.from_tensor(w_up, [block_k, block_n]),
            g=g, x=x, g_t=g.stride(0), x_t=x.stride(0), factor=factor, dots=dots, x_scale=x_scale,
            dx=TensorDescriptor.from_tensor(dx, [block_m, block_n // 8]), parts=parts,
            t=t, f=f, n=n, count=dots.size(0), coefficient=coefficient,
            DOTS=triton.next_power_of_2(dots.size(0)),
        )  # fmt: skip
    return dx, parts


def gradient(
    dout: Tensor, g: Tensor, x: Tensor, factor: Tensor, w_up: Tensor, w_down: Tensor, post: Tensor,
    bits: Tensor, slope: float, coefficient: float, x_scale: Tensor | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:  # fmt: skip
    """dpre of `down_dgrad`, and dx and parts of `dgrad` for it; None: it is not possible.

    Args:
        dout, g, x: (T, D), w_up: (F, D), w_down: (D, F), bf16.
        factor, post, bits, slope: as given to, and returned by `leaky_relu2_mlp.up`.
        coefficient: of the norm: 2 / (D scale^2) where factor is scale rstd.
        tma: force (True) or forbid (False) the kernels; None takes them where they are possible.

    Raises:
        ValueError: tma=True where the kernels are not possible.
    """
    operands = dout, w_down, post, w_up, g, x
    if not takes_tma("norm_mlp", tma, *operands, obstacle=_narrow(g, x)):
        return None
    shape = dot_parts(post.size(1)), post.size(0)
    dots = torch.empty(shape, dtype=torch.float32, device=post.device)
    dpre = down_dgrad(dout, w_down, post, bits, slope, factor, tma=True, dots=dots)
    return dpre, *dgrad(dpre, w_up, g, x, factor, dots, coefficient, x_scale)


def _narrow(g: Tensor, x: Tensor) -> str:
    """Why the epilogue cannot read rows of these 16 bytes at once, or an empty string."""
    if x.size(1) % 16:
        return f"{x.size(1)} columns are no multiple of 16"
    for rows in (g.stride(0), x.stride(0)):
        if rows % 16:
            return f"rows of g or x are {rows} elements apart, no multiple of 16"
    return ""

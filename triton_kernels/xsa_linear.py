"""The gradient through an output projection and XSA before it, in one GEMM.

    dz = dout @ w,   then with v of a head's group, s = 1 / max(|v|, 1e-12)^2, a = y . v, b = dz . v
    dy = dz - s b v
    dv = sum over the group's heads of -s (a dz + b y) + 2 (s a) (s b) v

as pgolf/triton_kernels/xsa.py has it, here in the epilogue: a tile has all columns of the groups
that it touches, and dz stays in the fp32 accumulator. Written it is never.

Persistent with TMA descriptors, for bf16 on sm_90 and the like. Elsewhere (other GPUs, fp32, sizes
that make no such tiles, operands that are not aligned) it is torch's matmul and XSA's row kernel.
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
from pgolf.triton_kernels.launch import Config, launch, on_device_of, pick
from pgolf.triton_kernels.xsa import NORM_FLOOR, xsa_backward


@triton.jit
def xsa_gradient(dz, y, v, SIZE: tl.constexpr):
    """dy as dz is, and dv as v is, for tiles of heads beside each other and of their values.

    In fp32: dz (rows, groups x heads x SIZE), y likewise and v (rows, groups x SIZE) in any dtype.
    """
    ROWS: tl.constexpr = dz.shape[0]
    GROUPS: tl.constexpr = v.shape[1] // SIZE
    HEADS: tl.constexpr = dz.shape[1] // v.shape[1]
    dzs = tl.reshape(dz, (ROWS, GROUPS, HEADS, SIZE))
    ys = tl.reshape(y.to(tl.float32), (ROWS, GROUPS, HEADS, SIZE))
    vs = tl.reshape(v.to(tl.float32), (ROWS, GROUPS, 1, SIZE))
    norm = tl.sqrt_rn(tl.sum(vs * vs, axis=3, keep_dims=True))
    clamped = tl.maximum(norm, NORM_FLOOR)
    scale = 1.0 / (clamped * clamped)
    sa = scale * tl.sum(ys * vs, axis=3, keep_dims=True)
    sb = scale * tl.sum(dzs * vs, axis=3, keep_dims=True)
    # `>`, because the floor as float32 is a little below 1e-12
    along_v = tl.where(norm > NORM_FLOOR, 2.0 * (sa * sb), 0.0)
    dvs = tl.sum(along_v * vs - (sa * dzs + sb * ys), axis=2)
    return tl.reshape(dzs - sb * vs, dz.shape), tl.reshape(dvs, v.shape)


@triton.jit
def xsa_linear_dgrad_tma(
    dout, w, y, v, dy, dv, t, d, n, y_t, v_t,
    SIZE: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PER_SM: tl.constexpr,
):  # fmt: skip
    """dy, dv from descriptors of dout (t, d), w (d, n), dy (t, n), dv (t, n / SHARE); y and v as
    they, by pointers with y_t and v_t elements from row to row.

    SHARE heads of SIZE columns are a group. The epilogue goes through a tile in halves, of whole
    groups or of half the heads of one. It finds v and the first half of y, which were requested
    before the last products, and requests what the second needs a half ahead.
    """
    tl.assume(d > 0)  # spares a second copy of the epilogue, for accumulators of nothing
    # As TMA asks of dy's rows, and the launcher of y's and v's: they are read 16 bytes at once.
    n, y_t, v_t = tl.multiple_of(n, 8), tl.multiple_of(y_t, 8), tl.multiple_of(v_t, 8)
    HALF: tl.constexpr = BLOCK_N // 2
    WHOLE: tl.constexpr = SHARE * SIZE <= HALF  # whether a half has whole groups
    VALUES: tl.constexpr = HALF // SHARE if WHOLE else SIZE  # columns of v beside a half
    tiles_m, tiles_n = tl.cdiv(t, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True
    ):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row, column, value = tile_m * BLOCK_M, tile_n * BLOCK_N, tile_n * (BLOCK_N // SHARE)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        ys = tl.zeros((BLOCK_M, HALF), tl.bfloat16)
        vs = tl.zeros((BLOCK_M, VALUES), tl.bfloat16)
        for start in range(0, d, BLOCK_K):
            left = dout.load([row, start])
            right = w.load([start, column])
            wanted = tl.where(start + BLOCK_K < d, 0, t)  # rows
            rows = row + tl.arange(0, BLOCK_M)
            ys = load_columns(y, rows, column, wanted, n, y_t, HALF)
            vs = load_columns(v, rows, value, wanted, n // SHARE, v_t, VALUES)
            acc = tl.dot(left, right, acc)
        rows = row + tl.arange(0, BLOCK_M)
        dzs = halves(acc)
        following_y = load_columns(y, rows, column + HALF, t, n, y_t, HALF)
        dys, dvs = xsa_gradient(dzs[0], ys, vs, SIZE)
        if WHOLE:
            following_v = load_columns(v, rows, value + VALUES, t, n // SHARE, v_t, VALUES)
        dy.store([row, column], dys.to(tl.bfloat16))
        if WHOLE:
            dv.store([row, value], dvs.to(tl.bfloat16))
            dys, dvs = xsa_gradient(dzs[1], following_y, following_v, SIZE)
            dv.store([row, value + VALUES], dvs.to(tl.bfloat16))
        else:
            dys, rest = xsa_gradient(dzs[1], following_y, vs, SIZE)
            dv.store([row, value], (dvs + rest).to(tl.bfloat16))
        dy.store([row, column + HALF], dys.to(tl.bfloat16))


def dgrad(
    dout: Tensor, w: Tensor, y: Tensor, v: Tensor, tma: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients (dy, dv) of xsa(y, v) @ w^T for the product's gradient: new contiguous tensors.

    Args:
        dout: (N T, D) bf16 or fp32, any strides.
        w: (D, H d), the same dtype.
        y: (N, T, H, d); v: (N, T, G, d): any strides, but the last dimension is contiguous.
        tma: force (True) or forbid (False) the epilogue; None takes it where it is possible.

    Raises:
        ValueError: tma=True where the epilogue is not possible.
    """
    config = pick("xsa_linear_dgrad_tma")
    obstacle = _no_tiles(y, v, config) or _no_matrix(y=y, v=v)
    operands = (dout, w) if obstacle else (dout, w, _matrix(y), _matrix(v))
    if not takes_tma("xsa_linear", tma, *operands, obstacle=obstacle):
        return xsa_backward((dout @ w).view(y.shape), y, v)
    dy = torch.empty(tuple(y.shape), dtype=y.dtype, device=y.device)
    dv = torch.empty(tuple(v.shape), dtype=v.dtype, device=v.device)
    size, share = y.size(3), y.size(2) // v.size(2)
    block_m, block_n, block_k = block_shape(config)
    half = block_n // 2
    with on_device_of(dout):
        launch(
            xsa_linear_dgrad_tma, persistent_grid(config, dout, w.size(1)), config,
            dout=TensorDescriptor.from_tensor(dout, [block_m, block_k]),
            w=TensorDescriptor.from_tensor(w, [block_k, block_n]),
            dy=TensorDescriptor.from_tensor(_matrix(dy), [block_m, half]),
            dv=TensorDescriptor.from_tensor(_matrix(dv), [block_m, max(size, half // share)]),
            y=y, v=v, y_t=y.stride(1), v_t=v.stride(1),
            t=dout.size(0), d=dout.size(1), n=w.size(1), SIZE=size, SHARE=share,
        )  # fmt: skip
    return dy, dv


def _no_tiles(y: Tensor, v: Tensor, config: Config) -> str:
    """Why groups of these heads make no tiles, or an empty string."""
    size, share, width = y.size(3), y.size(2) // v.size(2), config.blocks["BLOCK_N"]
    powers = all(n & (n - 1) == 0 for n in (size, share))
    if powers and 8 <= size <= width // 2 and size * share <= width:
        return ""
    return (
        f"{share} heads of {size} elements to a value are not powers of two, from 8 to "
        f"{width // 2} elements, that together have at most {width}"
    )


def _no_matrix(**tensors: Tensor) -> str:
    """Which of these (N, T, H, d) cannot be seen as a matrix (N T, H d), or an empty string."""
    for name, x in tensors.items():
        n, t, heads, size = x.shape
        if (heads > 1 and x.stride(2) != size) or (n > 1 and x.stride(0) != t * x.stride(1)):
            return f"{name} {tuple(x.shape)} with strides {x.stride()} is no matrix of its tokens"
    return ""


def _matrix(x: Tensor) -> Tensor:
    """x (N, T, H, d) as (N T, H d), where `_no_matrix` finds nothing."""
    n, t, heads, size = x.shape
    return x.as_strided((n * t, heads * size), (x.stride(1), 1))

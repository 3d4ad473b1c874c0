"""XSA value subtraction: each head's output loses its component along its group's value.

    m = max(|v|_2, 1e-12),  s = 1 / m^2,  a = y . v,  b = dz . v      (fp32)
    z  = y - s a v
    dy = dz - s b v
    dv = sum over the group's heads of -s (a dz + b y) + 2 (s a) (s b) v

The last term is the norm's gradient, absent where |v| < 1e-12 and the norm is a constant. Products
stay in the order written: s^2 alone overflows where v is tiny.

One program takes a block of (token, group) pairs, with v in registers for all heads of the group.
A token's index is split into n and t because attention's outputs have no single stride over both.
Shapes: y, z, dy, dz (N, T, H, d), v, dv (N, T, G, d); head h belongs to group h // (H / G).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.launch import Config, cdiv, launch, on_device_of, pick

NORM_FLOOR = tl.constexpr(1e-12)


@triton.jit
def block_of_pairs(
    t, pairs, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """This program's pairs as (n, t, g), their row in a contiguous (N T G, d), columns, mask."""
    pair = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    token = pair // GROUPS
    columns = tl.arange(0, BLOCK_SIZE)[None, :]
    inside = (pair < pairs)[:, None] & (columns < SIZE)
    return token // t, token % t, pair % GROUPS, pair.to(tl.int64), columns, inside


@triton.jit
def offsets(n, t, h, stride_n, stride_t, stride_h):
    """Elements before the first of each (n, t, h), as a column; beyond 2^31 in large tensors."""
    n, t, h = n.to(tl.int64), t.to(tl.int64), h.to(tl.int64)
    return (n * stride_n + t * stride_t + h * stride_h)[:, None]


@triton.jit
def norm_and_scale(v):
    """|v| of each row and s, as columns; NaN in v is in y . v as well, and stays in the results."""
    norm = tl.sqrt_rn(tl.sum(v * v, axis=1))[:, None]
    clamped = tl.maximum(norm, NORM_FLOOR)
    return norm, 1.0 / (clamped * clamped)


@triton.jit
def xsa_forward_kernel(
    y, v, z, t, pairs,
    y_n, y_t, y_h, v_n, v_t, v_g,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    SHARE: tl.constexpr = HEADS // GROUPS
    i_n, i_t, i_g, pair, columns, inside = block_of_pairs(
        t, pairs, GROUPS, SIZE, BLOCK_PAIRS, BLOCK_SIZE
    )
    v_at = v + offsets(i_n, i_t, i_g, v_n, v_t, v_g) + columns
    y_at = y + offsets(i_n, i_t, i_g * SHARE, y_n, y_t, y_h) + columns
    z_at = z + pair[:, None] * (SHARE * SIZE) + columns

    vs = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
    next_y = tl.load(y_at, mask=inside, other=0.0)
    _, scale = norm_and_scale(vs)
    for head in tl.static_range(SHARE):
        ys = next_y.to(tl.float32)
        if head + 1 < SHARE:  # before this head's store, which the compiler moves no load across
            y_at += y_h
            next_y = tl.load(y_at, mask=inside, other=0.0)
        a = tl.sum(ys * vs, axis=1)[:, None]
        zs = ys - (scale * a) * vs
        tl.store(z_at + head * SIZE, zs.to(z.dtype.element_ty), mask=inside)


@triton.jit
def xsa_backward_kernel(
    dz, y, v, dy, dv, t, pairs,
    dz_n, dz_t, dz_h, y_n, y_t, y_h, v_n, v_t, v_g,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    SHARE: tl.constexpr = HEADS // GROUPS
    i_n, i_t, i_g, pair, columns, inside = block_of_pairs(
        t, pairs, GROUPS, SIZE, BLOCK_PAIRS, BLOCK_SIZE
    )
    v_at = v + offsets(i_n, i_t, i_g, v_n, v_t, v_g) + columns
    y_at = y + offsets(i_n, i_t, i_g * SHARE, y_n, y_t, y_h) + columns
    dz_at = dz + offsets(i_n, i_t, i_g * SHARE, dz_n, dz_t, dz_h) + columns
    dy_at = dy + pair[:, None] * (SHARE * SIZE) + columns

    vs = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
    next_y = tl.load(y_at, mask=inside, other=0.0)
    next_dz = tl.load(dz_at, mask=inside, other=0.0)
    norm, scale = norm_and_scale(vs)
    dvs = tl.zeros([BLOCK_PAIRS, BLOCK_SIZE], tl.float32)
    along_v = tl.zeros([BLOCK_PAIRS, 1], tl.float32)  # sum of (s a) (s b)
    for head in tl.static_range(SHARE):
        ys = next_y.to(tl.float32)
        dzs = next_dz.to(tl.float32)
        if head + 1 < SHARE:
            y_at += y_h
            dz_at += dz_h
            next_y = tl.load(y_at, mask=inside, other=0.0)
            next_dz = tl.load(dz_at, mask=inside, other=0.0)
        sa = scale * tl.sum(ys * vs, axis=1)[:, None]
        sb = scale * tl.sum(dzs * vs, axis=1)[:, None]
        dys = dzs - sb * vs
        tl.store(dy_at + head * SIZE, dys.to(dy.dtype.element_ty), mask=inside)
        dvs -= sa * dzs + sb * ys
        along_v += sa * sb
    # `>`, because the floor as float32 is a little below 1e-12
    dvs += tl.where(norm > NORM_FLOOR, 2.0 * along_v, 0.0) * vs
    tl.store(dv + pair[:, None] * SIZE + columns, dvs.to(dv.dtype.element_ty), mask=inside)


def xsa(y: Tensor, v: Tensor) -> Tensor:
    """y (N, T, H, d) without its component along v (N, T, G, d): a new contiguous tensor.

    fp32 or bf16, the same for both; any strides, but the last dimension is contiguous.
    """
    z = torch.empty(tuple(y.shape), dtype=y.dtype, device=y.device)
    shared, grid, config = _shared("xsa_forward_kernel", y, v)
    with on_device_of(y):
        launch(xsa_forward_kernel, grid, config, y=y, v=v, z=z, **_strides(y=y, v=v), **shared)
    return z


def xsa_backward(dz: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dy, dv) of `xsa` for the output's gradient dz; new contiguous tensors.

    Each input has strides of its own, with a contiguous last dimension.
    """
    dy = torch.empty(tuple(y.shape), dtype=y.dtype, device=y.device)
    dv = torch.empty(tuple(v.shape), dtype=v.dtype, device=v.device)
    shared, grid, config = _shared("xsa_backward_kernel", y, v)
    tensors = dict(dz=dz, y=y, v=v, dy=dy, dv=dv)
    with on_device_of(y):
        launch(xsa_backward_kernel, grid, config, **tensors, **_strides(dz=dz, y=y, v=v), **shared)
    return dy, dv


def _shared(kernel: str, y: Tensor, v: Tensor) -> tuple[dict[str, int], tuple[int], Config]:
    """Arguments that both kernels have, the grid, and the configuration."""
    n, t, heads, size = y.shape
    groups = v.size(2)
    pairs = n * t * groups
    block_size = 1 << (size - 1).bit_length()
    config = pick(kernel, block_bytes=block_size * y.element_size())
    block_pairs = config.blocks["BLOCK_PAIRS"]
    if pairs > 2**31 - block_pairs:
        raise ValueError(f"xsa: {n} x {t} x {groups} values, but a kernel counts fewer than 2^31")
    arguments = dict(t=t, pairs=pairs, HEADS=heads, GROUPS=groups, SIZE=size)
    return arguments | dict(BLOCK_SIZE=block_size), (cdiv(pairs, block_pairs),), config


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of the first three dimensions, named as the kernels name them."""
    return {
        f"{name}_{dim}": stride
        for name, tensor in tensors.items()
        for dim, stride in zip("ntg" if name == "v" else "nth", tensor.stride()[:3], strict=True)
    }

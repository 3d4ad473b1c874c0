"""Newton-Schulz orthogonalisation of a batch of matrices of one shape.

    X = G / (safety |G|_F + 1e-7), its rows of norm 1 before that if `row_norm`
    A = X X^T,   Bm = b A + c A A,   X <- a X + Bm X      for each (a, b, c)

Two launches normalise, three make an iteration. Every product is one kernel, alpha P Q + beta S,
which reads through strides: a tall matrix is iterated as its transpose without a copy.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.gemm import DTYPES, dot_precision, matmul_tile, tile_of
from pgolf.triton_kernels.launch import launch, on_device_of, pick


@triton.jit
def newton_schulz_norms(
    g, row_norms, partials, r, c, stride_gb, stride_gr, stride_gc,
    ROW_NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of squares of BLOCK_R rows of a matrix; with ROW_NORM of the normalised rows.

    row_norms (b, r) receives the norms of the rows, partials (b, ceil(r / BLOCK_R)) the sums.
    """
    blocks = tl.cdiv(r, BLOCK_R)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    g += matrix * stride_gb + rows.to(tl.int64)[:, None] * stride_gr
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, c, BLOCK_C):
        inside = (rows < r)[:, None] & (start + cols < c)[None, :]
        offsets = (start + cols).to(tl.int64)[None, :] * stride_gc
        x = tl.load(g + offsets, mask=inside, other=0.0).to(tl.float32)
        squares += x * x
    sums = tl.sum(squares, axis=1)
    if ROW_NORM:
        norms = tl.sqrt_rn(sums)
        norms = tl.where(norms < 1e-7, 1e-7, norms)  # unlike a maximum, it keeps NaN
        tl.store(row_norms + matrix * r + rows, norms, mask=rows < r)
        sums = sums / norms / norms
    tl.store(partials + matrix * blocks + block, tl.sum(sums, axis=0))


@triton.jit
def newton_schulz_scale(
    g, row_norms, partials, x, r, c, count, stride_gb, stride_gr, stride_gc, safety,
    ROW_NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x (b, r, c) contiguous = g / (safety |g|_F + 1e-7), from `count` partial sums a matrix."""
    tiles_c = tl.cdiv(c, BLOCK_C)
    tiles = tl.cdiv(r, BLOCK_R) * tiles_c
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    lanes = tl.arange(0, BLOCK_P)
    sums = tl.zeros((BLOCK_P,), tl.float32)  # every program adds in the same order
    for start in range(0, count, BLOCK_P):
        inside = start + lanes < count
        sums += tl.load(partials + matrix * count + start + lanes, mask=inside, other=0.0)
    divisor = safety * tl.sqrt_rn(tl.sum(sums, axis=0)) + 1e-7

    rows = tile // tiles_c * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < r)[:, None] & (cols < c)[None, :]
    wide_rows, wide_cols = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    g += matrix * stride_gb + wide_rows * stride_gr + wide_cols * stride_gc
    value = tl.load(g, mask=inside, other=0.0).to(tl.float32)
    if ROW_NORM:
        value /= tl.load(row_norms + matrix * r + rows, mask=rows < r, other=1.0)[:, None]
    value = value / divisor
    x += (matrix * r + wide_rows) * c + wide_cols
    tl.store(x, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def triangle_tile(index):
    """(row, column) of a tile on or below the diagonal, counted row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)  # the square root is rounded
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def newton_schulz_product(
    p, q, s, out, m, n, k, alpha, beta,
    stride_pb, stride_pm, stride_pk, stride_qb, stride_qk, stride_qn, stride_b, stride_m, stride_n,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = alpha P Q + beta S, or alpha P Q without S, for P (b, m, k), Q (b, k, n).

    S and out share their strides. SYMMETRIC is for a result that equals its transpose (m = n,
    BLOCK_M = BLOCK_N): tiles below the diagonal are stored with their mirror image.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles = tiles_m * (tiles_m + 1) // 2 if SYMMETRIC else tiles_m * tiles_n
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    index = tl.program_id(0) % tiles
    if SYMMETRIC:
        tile_m, tile_n = triangle_tile(index)
    else:
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = matmul_tile(
        p + matrix * stride_pb, q + matrix * stride_qb, rows, cols, m, n, k,
        stride_pm, stride_pk, stride_qk, stride_qn, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    value = alpha * acc
    offsets = rows.to(tl.int64)[:, None] * stride_m + cols.to(tl.int64)[None, :] * stride_n
    offsets += matrix * stride_b
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if s is not None:
        value += beta * tl.load(s + offsets, mask=inside, other=0.0).to(tl.float32)
    value = value.to(out.dtype.element_ty)
    if SYMMETRIC:
        mirror = tl.trans(value)
        # A tile on the diagonal is made its own mirror image: no order of summation is relied on.
        value = tl.where(rows[:, None] >= cols[None, :], value, mirror)
        offsets_t = cols.to(tl.int64)[:, None] * stride_m + rows.to(tl.int64)[None, :] * stride_n
        offsets_t += matrix * stride_b
        inside_t = (cols < m)[:, None] & (rows < n)[None, :] & (tile_m != tile_n)
        tl.store(out + offsets_t, mirror, mask=inside_t)
    tl.store(out + offsets, value, mask=inside)


def newton_schulz(
    g: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
    row_norm: bool = False,
    safety: float = 1.0,
    normalized: bool = False,
) -> Tensor:
    """Orthogonalise each matrix of g.

    Args:
        g: (B, R, C) fp32 or bf16, any strides.
        coefficients: (a, b, c) of each iteration.
        dtype: bf16 or fp32, of every stored matrix; sums are fp32.
        row_norm: divide each row by its norm first.
        safety: factor on the Frobenius norm.
        normalized: g is X already.

    Returns:
        (B, R, C) contiguous in `dtype`.
    """
    x = torch.empty(g.shape, dtype=dtype, device=g.device)
    if x.numel() == 0:
        return x
    with on_device_of(g):
        if normalized:
            first = g.to(dtype).contiguous()
            return _iterate(first, x, coefficients) if coefficients else x.copy_(first)
        _normalize(g, x, row_norm, safety)
        return _iterate(x, x, coefficients) if coefficients else x


def _normalize(g: Tensor, x: Tensor, row_norm: bool, safety: float) -> None:
    b, r, c = g.shape
    strides = dict(zip(("stride_gb", "stride_gr", "stride_gc"), g.stride(), strict=True))
    config = pick("newton_schulz_norms")
    count = triton.cdiv(r, config.blocks["BLOCK_R"])
    partials = torch.empty((b, count), dtype=torch.float32, device=g.device)
    row_norms = None
    if row_norm:
        row_norms = torch.empty((b, r), dtype=torch.float32, device=g.device)
    launch(
        newton_schulz_norms, (b * count,), config,
        g=g, row_norms=row_norms, partials=partials, r=r, c=c, **strides, ROW_NORM=row_norm,
    )  # fmt: skip
    config = pick("newton_schulz_scale")
    tiles = triton.cdiv(r, config.blocks["BLOCK_R"]) * triton.cdiv(c, config.blocks["BLOCK_C"])
    launch(
        newton_schulz_scale, (b * tiles,), config,
        g=g, row_norms=row_norms, partials=partials, x=x, r=r, c=c, count=count, **strides,
        safety=float(safety), ROW_NORM=row_norm,
    )  # fmt: skip


def _iterate(
    x: Tensor, room: Tensor, coefficients: Sequence[tuple[float, float, float]]
) -> Tensor:
    """The iterations on X (b, r, c), which is not written unless it is `room`, one of the buffers.

    Both are contiguous.
    """
    b, r, c = x.shape
    side = min(r, c)
    gram = torch.empty((b, side, side), dtype=x.dtype, device=x.device)
    poly = torch.empty((b, side, side), dtype=x.dtype, device=x.device)
    after, spare = torch.empty((b, r, c), dtype=x.dtype, device=x.device), room
    for ca, cb, cc in coefficients:
        wide, wide_after = (x.mT, after.mT) if r > c else (x, after)
        _product(wide, wide.mT, None, gram, 1.0, 0.0, symmetric=True)
        _product(gram, gram, gram, poly, cc, cb, symmetric=True)
        _product(poly, wide, wide, wide_after, 1.0, ca, symmetric=False)
        x, after, spare = after, spare, after
    return x


def _product(
    p: Tensor, q: Tensor, s: Tensor | None, out: Tensor, alpha: float, beta: float, symmetric: bool
) -> None:
    """out = alpha P Q + beta S; S (None: no such term) has out's strides."""
    b, m, n = out.shape
    squares = triton.cdiv(m, 128) * triton.cdiv(n, 128) * b
    config = pick(
        "newton_schulz_product", dtype=DTYPES[out.dtype], precision=dot_precision(out.dtype),
        symmetric=symmetric, m=m, squares=squares,
    )  # fmt: skip
    tiles_m = triton.cdiv(m, config.blocks["BLOCK_M"])
    tiles_n = triton.cdiv(n, config.blocks["BLOCK_N"])
    tiles = tiles_m * (tiles_m + 1) // 2 if config.blocks["SYMMETRIC"] else tiles_m * tiles_n
    launch(
        newton_schulz_product, (b * tiles,), config,
        p=p, q=q, s=s, out=out, m=m, n=n, k=p.size(2), alpha=float(alpha), beta=float(beta),
        stride_pb=p.stride(0), stride_pm=p.stride(1), stride_pk=p.stride(2),
        stride_qb=q.stride(0), stride_qk=q.stride(1), stride_qn=q.stride(2),
        stride_b=out.stride(0), stride_m=out.stride(1), stride_n=out.stride(2),
        PRECISION=dot_precision(out.dtype),
    )  # fmt: skip

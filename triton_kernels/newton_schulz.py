"""Newton-Schulz orthogonalisation of batches of matrices, each batch of one shape.

    X = G / (safety |G|_F + 1e-7), its rows of norm 1 before that if `row_norm`
    A = X X^T,   Bm = b A + c A A,   X <- a X + Bm X      for each (a, b, c)

Two launches a batch normalise, three make an iteration of all batches. Every product is one kernel,
alpha P Q + beta S, which reads through strides: tall matrices are iterated as their transposes
without a copy. Where the sums of squares of G's rows are known nothing normalises: the first
iteration starts from G, and its first and third product apply each matrix's factor.
"""

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.gemm import DTYPES, dot_precision, matmul_tile, tile_of
from pgolf.triton_kernels.launch import cdiv, launch, on_device_of, pick

BATCHES = 4  # a launch, at most: the kernel has a branch for each
# P, Q, S or None, where it goes, and sums of squares or None
Product = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]
LANES = tl.constexpr(256)  # that add up sums of squares, of rows or parts of a matrix


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
def divisor_of(squares, count, safety, BLOCK_P: tl.constexpr):
    """safety |g|_F + 1e-7 of a matrix, from `count` sums of squares."""
    lanes = tl.arange(0, BLOCK_P)
    sums = tl.zeros((BLOCK_P,), tl.float32)  # every program adds in the same order
    for start in range(0, count, BLOCK_P):
        sums += tl.load(squares + start + lanes, mask=start + lanes < count, other=0.0)
    return safety * tl.sqrt_rn(tl.sum(sums, axis=0)) + 1e-7


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
    divisor = divisor_of(partials + matrix * count, count, safety, BLOCK_P)
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
def product_of_tile(
    p, q, s, out, squares, m, n, k, count, alpha, beta, safety, program,
    stride_pb, stride_pm, stride_pk, stride_qb, stride_qk, stride_qn, stride_b, stride_m, stride_n,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out = alpha P Q + beta S, or alpha P Q without S, for P (b, m, k), Q (b, k, n).

    S and out share their strides. With squares (b, count) the result is of X = g / (safety |g|_F +
    1e-7), from g in its place: as P and Q, or with S as Q and S. SYMMETRIC is for a result that
    equals its transpose (m = n, BLOCK_M = BLOCK_N): tiles below the diagonal are stored with their
    mirror image.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tiles = tiles_m * (tiles_m + 1) // 2 if SYMMETRIC else tiles_m * tiles_n
    matrix = (program // tiles).to(tl.int64)
    index = program % tiles
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
    if squares is not None:
        factor = 1.0 / divisor_of(squares + matrix * count, count, safety, LANES)
        scaled = value * factor
        if s is None:
            scaled *= factor
        # Of squares whose sum is infinite nothing is left, and no NaN.
        value = tl.where(factor == 0.0, 0.0, scaled)
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


@triton.jit
def newton_schulz_product(
    ps, qs, ss, outs, squares, ms, ns, ks, counts, firsts, alpha, beta, safety,
    strides_pb, strides_pm, strides_pk, strides_qb, strides_qk, strides_qn,
    strides_b, strides_m, strides_n,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile a program, of whichever batch's product it is: firsts are where each one begins."""
    program = tl.program_id(0)
    for i in tl.static_range(len(ps)):
        if (program >= firsts[i]) & (program < firsts[i + 1]):
            product_of_tile(
                ps[i], qs[i], ss[i], outs[i], squares[i], ms[i], ns[i], ks[i], counts[i],
                alpha, beta, safety, program - firsts[i],
                strides_pb[i], strides_pm[i], strides_pk[i],
                strides_qb[i], strides_qk[i], strides_qn[i],
                strides_b[i], strides_m[i], strides_n[i],
                SYMMETRIC, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PRECISION,
            )  # fmt: skip


def newton_schulz_all(
    gs: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
    row_norm: bool = False,
    safety: float = 1.0,
    squares: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Orthogonalise each matrix of each g.

    Args:
        gs: each (B, R, C) fp32 or bf16, any strides, on one device.
        coefficients: (a, b, c) of each iteration.
        dtype: bf16 or fp32, of every stored matrix; sums are fp32.
        row_norm: divide each row by its norm first.
        safety: factor on the Frobenius norm.
        squares: (B, R) fp32 contiguous, of each g or of none: the sums of squares of its rows.

    Returns:
        (B, R, C) contiguous in `dtype` for each g.
    """
    outs = [torch.empty(g.shape, dtype=dtype, device=g.device) for g in gs]
    kept = [i for i, g in enumerate(gs) if g.numel()]
    if not kept:
        return outs
    with on_device_of(gs[0]):
        if squares and coefficients:
            xs, sums = [gs[i].to(dtype).contiguous() for i in kept], [squares[i] for i in kept]
        else:
            sums = None
            for i in kept:
                _normalize(gs[i], outs[i], row_norm, safety, squares[i] if squares else None)
            xs = [outs[i] for i in kept]
        if coefficients:
            xs = _iterate(xs, [outs[i] for i in kept], coefficients, sums, safety)
    for i, x in zip(kept, xs, strict=True):
        outs[i] = x
    return outs


def newton_schulz(
    g: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
    row_norm: bool = False,
    safety: float = 1.0,
    squares: Tensor | None = None,
) -> Tensor:
    """One g (B, R, C); arguments as in `newton_schulz_all`."""
    known = () if squares is None else (squares,)
    return newton_schulz_all([g], coefficients, dtype, row_norm, safety, known)[0]


def _normalize(
    g: Tensor, x: Tensor, row_norm: bool, safety: float, squares: Tensor | None
) -> None:
    """Fill x with g over its norm."""
    b, r, c = g.shape
    strides = dict(zip(("stride_gb", "stride_gr", "stride_gc"), g.stride(), strict=True))
    row_norms, partials = None, squares
    if partials is None:
        config = pick("newton_schulz_norms")
        count = cdiv(r, config.blocks["BLOCK_R"])
        partials = torch.empty((b, count), dtype=torch.float32, device=g.device)
        if row_norm:
            row_norms = torch.empty((b, r), dtype=torch.float32, device=g.device)
        launch(
            newton_schulz_norms, (b * count,), config,
            g=g, row_norms=row_norms, partials=partials, r=r, c=c, **strides, ROW_NORM=row_norm,
        )  # fmt: skip
    config = pick("newton_schulz_scale")
    tiles = cdiv(r, config.blocks["BLOCK_R"]) * cdiv(c, config.blocks["BLOCK_C"])
    launch(
        newton_schulz_scale, (b * tiles,), config,
        g=g, row_norms=row_norms, partials=partials, x=x, r=r, c=c, count=partials.size(1),
        **strides, safety=float(safety), ROW_NORM=row_norms is not None,
    )  # fmt: skip


def _iterate(
    xs: Sequence[Tensor],
    buffers: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    squares: Sequence[Tensor] | None,
    safety: float,
) -> list[Tensor]:
    """The iterations on each X (b, r, c); all tensors are contiguous.

    Each has one of `buffers`, which may be X itself: other xs are not written. With squares (b, r)
    each x is g, which stands for its quotient by its norm until an iteration has written X.
    """
    grams, polys, afters = [], [], []
    for x in xs:
        b, side = x.size(0), min(x.shape[1:])
        grams.append(torch.empty((b, side, side), dtype=x.dtype, device=x.device))
        polys.append(torch.empty((b, side, side), dtype=x.dtype, device=x.device))
        afters.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    spares, nothing = list(buffers), [None] * len(xs)
    if squares:  # buffers are not X: an odd number of iterations, which is usual, ends there
        afters, spares = spares, afters
    sums = squares or nothing
    for ca, cb, cc in coefficients:
        wides, wide_afters = [_wide(x) for x in xs], [_wide(x) for x in afters]
        transposed = [w.mT for w in wides]
        of_grams = zip(wides, transposed, nothing, grams, sums, strict=True)
        _products(of_grams, 1.0, 0.0, True, safety)
        _products(zip(grams, grams, grams, polys, nothing, strict=True), cc, cb, True)
        _products(zip(polys, wides, wides, wide_afters, sums, strict=True), 1.0, ca, False, safety)
        xs, afters, spares, sums = afters, spares, afters, nothing
    return list(xs)


def _wide(x: Tensor) -> Tensor:
    """The matrices, or their transposes, that have no more rows than columns."""
    return x.mT if x.size(1) > x.size(2) else x


def _products(
    products: Iterable[Product], alpha: float, beta: float, symmetric: bool, safety: float = 1.0
) -> None:
    """out = alpha P Q + beta S of each; S (None: no such term) has out's strides.

    With sums of squares they are of X, from g in its place (`product_of_tile`). Up to BATCHES in
    one launch, the longest sums first: the last programs to end are short ones.
    """
    ordered = sorted(products, key=lambda product: -product[0].size(2))
    for start in range(0, len(ordered), BATCHES):
        _launch_products(ordered[start : start + BATCHES], alpha, beta, symmetric, safety)


def _launch_products(
    products: Sequence[Product], alpha: float, beta: float, symmetric: bool, safety: float
) -> None:
    ps, qs, ss, outs, sums = zip(*products, strict=True)
    shapes = [out.shape for out in outs]
    dtype = outs[0].dtype
    config = pick(
        "newton_schulz_product", dtype=DTYPES[dtype], precision=dot_precision(dtype),
        symmetric=symmetric, m=min(m for _, m, _ in shapes),
        squares=sum(cdiv(m, 128) * cdiv(n, 128) * b for b, m, n in shapes),
    )  # fmt: skip
    firsts = [0]
    for b, m, n in shapes:
        tiles_m = cdiv(m, config.blocks["BLOCK_M"])
        tiles_n = cdiv(n, config.blocks["BLOCK_N"])
        triangle = tiles_m * (tiles_m + 1) // 2
        tiles = triangle if config.blocks["SYMMETRIC"] else tiles_m * tiles_n
        firsts.append(firsts[-1] + b * tiles)
    strides = {
        name: tuple(t.stride(dim) for t in tensors)
        for tensors, names in (
            (ps, ("strides_pb", "strides_pm", "strides_pk")),
            (qs, ("strides_qb", "strides_qk", "strides_qn")),
            (outs, ("strides_b", "strides_m", "strides_n")),
        )
        for dim, name in enumerate(names)
    }
    launch(
        newton_schulz_product, (firsts[-1],), config,
        ps=ps, qs=qs, ss=ss, outs=outs, squares=sums,
        ms=tuple(m for _, m, _ in shapes), ns=tuple(n for _, _, n in shapes),
        ks=tuple(p.size(2) for p in ps),
        counts=tuple(0 if t is None else t.size(1) for t in sums),
        firsts=tuple(firsts), alpha=float(alpha), beta=float(beta), safety=float(safety),
        **strides, PRECISION=dot_precision(dtype),
    )  # fmt: skip

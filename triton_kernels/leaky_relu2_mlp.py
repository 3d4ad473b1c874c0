"""LeakyReLU^2 MLP: the up projection with its activation, the gradient through both.

    pre = rstd[row] * (h @ w_up^T),   post = max(pre, slope pre)^2,   bit = pre > 0
    dpre = (dout @ w_down) * act'(post, bit) * rstd[row],   act' = 2 or -2 slope times sqrt(post)

Each is one GEMM whose epilogue works on the fp32 accumulator. post and one sign bit an element are
all that the backward needs of the hidden layer: element f of a row is bit f % 32 of word f // 32.

Two variants of each: persistent with TMA descriptors (bf16, sm_90 and the like), and with pointers,
for GPUs without TMA or with too little shared memory for it, for fp32 and for unaligned shapes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pgolf.triton_kernels.gemm import (
    DTYPES,
    block_shape,
    dot_precision,
    halves,
    matmul_tile,
    persistent_grid,
    takes_tma,
    tile_of,
    tiles,
)
from pgolf.triton_kernels.launch import Config, cdiv, launch, on_device_of, pick


@triton.jit
def load_rstd(rstd, rows, t):
    """(rows, 1) factors of the rows of a tile."""
    return tl.load(rstd + rows, mask=rows < t, other=0.0)[:, None]


@triton.jit
def word_offsets(rows, tile_n, words, BLOCK_N: tl.constexpr):
    """Columns of the sign words of a tile, and their offsets in `bits`."""
    columns = tile_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    return columns, rows.to(tl.int64)[:, None] * words + columns[None, :]


@triton.jit
def activate(
    acc, bits, rstd, rows, tile_n, t, words, slope, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Post-activation of an accumulator, whose sign words are stored.

    What lies beyond the last column is 0 or NaN, so that the unused bits are 0.
    """
    if rstd is not None:
        acc *= load_rstd(rstd, rows, t)
    signs = tl.reshape((acc > 0).to(tl.int32), (BLOCK_M, BLOCK_N // 32, 32))
    packed = tl.sum(signs << tl.arange(0, 32)[None, None, :], axis=2)
    columns, offsets = word_offsets(rows, tile_n, words, BLOCK_N)
    tl.store(bits + offsets, packed, mask=(rows < t)[:, None] & (columns < words)[None, :])
    leaky = tl.where(acc > 0, acc, slope * acc)  # unlike a maximum, it keeps NaN
    return leaky * leaky


@triton.jit
def load_signs(bits, rows, tile_n, t, words, BLOCK_N: tl.constexpr):
    """Sign words of a tile, anything beyond the edges."""
    columns, offsets = word_offsets(rows, tile_n, words, BLOCK_N)
    return tl.load(bits + offsets, mask=(rows < t)[:, None] & (columns < words)[None, :])


@triton.jit
def load_post(post, rows, tile_n, t, f, BLOCK_N: tl.constexpr):
    """post of a tile, anything beyond the edges.

    By pointers: it is waited for where it is used, what a descriptor loads where it is loaded.
    """
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * f + columns[None, :]
    return tl.load(post + offsets, mask=(rows < t)[:, None] & (columns < f)[None, :])


@triton.jit
def differentiate(acc, post, packed, rstd, rows, t, slope):
    """acc * act'(post, bits) * rstd, in fp32."""
    positive = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    factor = tl.where(tl.reshape(positive, acc.shape) != 0, 2.0, -2.0 * slope)
    if rstd is not None:
        factor *= load_rstd(rstd, rows, t)
    return acc * (factor * tl.sqrt(post.to(tl.float32)))


@triton.jit
def products_of_rows(a, b, first, n):
    """Sums of a * b along rows, over their columns from `first` on that are below n.

    Beyond lies anything.
    """
    columns = first + tl.arange(0, a.shape[1])
    return tl.sum(tl.where((columns < n)[None, :], a * b.to(tl.float32), 0.0), axis=1)


@triton.jit
def leaky_relu2_up_tma(
    h, w_up, post, bits, rstd, t, d, f, words, slope,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PER_SM: tl.constexpr,
):  # fmt: skip
    """post, bits from descriptors of h (t, d), w_up (f, d) and post (t, f)."""
    tl.assume(d > 0)  # spares a second copy of the epilogue, for accumulators of nothing
    tiles_m, tiles_n = tl.cdiv(t, BLOCK_M), tl.cdiv(f, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=PER_SM == 1
    ):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, d, BLOCK_K):
            left = h.load([tile_m * BLOCK_M, start])
            right = w_up.load([tile_n * BLOCK_N, start])
            acc = tl.dot(left, right.T, acc)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        # In halves: beside a whole tile of post a fourth stage does not fit in shared memory.
        parts = halves(acc)
        for half in tl.static_range(2):
            value = activate(
                parts[half], bits, rstd, rows, 2 * tile_n + half, t, words, slope,
                BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            corner = [tile_m * BLOCK_M, tile_n * BLOCK_N + half * (BLOCK_N // 2)]
            post.store(corner, value.to(tl.bfloat16))


@triton.jit
def leaky_relu2_dgrad_tma(
    dout, w_down, post, bits, rstd, dpre, dots, t, d, f, words, slope,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PER_SM: tl.constexpr,
):  # fmt: skip
    """dpre from descriptors of dout (t, d), w_down (d, f) and dpre (t, f) and a pointer to post.

    dots, where they are wanted: (tiles of columns, t) parts of the products of dpost's rows with
    post's.

    The epilogue goes through a tile in quarters. It finds signs and post of the first two, which
    were requested before the last products, and requests those of the others two quarters ahead.
    """
    tl.assume(d > 0)  # spares a second copy of the epilogue, for accumulators of nothing
    f = tl.multiple_of(f, 8)  # as TMA asks of dpre's rows, so that post is read 16 bytes at once
    tiles_m, tiles_n = tl.cdiv(t, BLOCK_M), tl.cdiv(f, BLOCK_N)
    QUARTER: tl.constexpr = BLOCK_N // 4
    # Whether factors are loaded for a tile or for each quarter: whichever takes fewer registers.
    ONCE: tl.constexpr = dots is not None and PER_SM == 1
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=PER_SM == 1
    ):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        signs = tl.zeros((BLOCK_M, QUARTER // 16), tl.int32)
        this = tl.zeros((BLOCK_M, QUARTER), tl.bfloat16)
        following = this
        for start in range(0, d, BLOCK_K):
            left = dout.load([tile_m * BLOCK_M, start])
            right = w_down.load([start, tile_n * BLOCK_N])
            wanted = tl.where(start + BLOCK_K < d, 0, t)  # rows
            rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
            signs = load_signs(bits, rows, 2 * tile_n, wanted, words, 2 * QUARTER)
            this = load_post(post, rows, 4 * tile_n, wanted, f, QUARTER)
            following = load_post(post, rows, 4 * tile_n + 1, wanted, f, QUARTER)
            acc = tl.dot(left, right, acc)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        scale = load_rstd(rstd, rows, t) if rstd is not None and ONCE else None
        each = None if ONCE else rstd
        sums = halves(acc)
        of_rows = tl.zeros((BLOCK_M,), tl.float32)
        for half in tl.static_range(2):
            parts, packed = halves(sums[half]), halves(signs)
            if half == 0:
                signs = load_signs(bits, rows, 2 * tile_n + 1, t, words, 2 * QUARTER)
            for i in tl.static_range(2):
                part = 4 * tile_n + 2 * half + i
                saved = this
                this = following
                if half == 0:
                    following = load_post(post, rows, part + 2, t, f, QUARTER)
                value = differentiate(parts[i], saved, packed[i], each, rows, t, slope)
                if scale is not None:
                    value *= scale
                dpre.store([tile_m * BLOCK_M, part * QUARTER], value.to(tl.bfloat16))
                if dots is not None:
                    of_rows += products_of_rows(parts[i], saved, part * QUARTER, f)
        if dots is not None:
            tl.store(dots + tile_n.to(tl.int64) * t + rows, of_rows, mask=rows < t)


@triton.jit
def leaky_relu2_up(
    h, w_up, post, bits, rstd, t, d, f, words, slope,
    stride_ht, stride_hd, stride_wf, stride_wd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """post, bits from pointers to h (t, d), w_up (f, d) and post (t, f)."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(t, BLOCK_M), tl.cdiv(f, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = matmul_tile(
        h, w_up, rows, cols, t, f, d, stride_ht, stride_hd, stride_wd, stride_wf,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    value = activate(acc, bits, rstd, rows, tile_n, t, words, slope, BLOCK_M, BLOCK_N)
    offsets = rows.to(tl.int64)[:, None] * f + cols[None, :]
    inside = (rows < t)[:, None] & (cols < f)[None, :]
    tl.store(post + offsets, value.to(post.dtype.element_ty), mask=inside)


@triton.jit
def leaky_relu2_dgrad(
    dout, w_down, post, bits, rstd, dpre, t, d, f, words, slope,
    stride_dt, stride_dd, stride_wd, stride_wf,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dpre from pointers to dout (t, d), w_down (d, f), post (t, f) and dpre (t, f)."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(t, BLOCK_M), tl.cdiv(f, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = matmul_tile(
        dout, w_down, rows, cols, t, f, d, stride_dt, stride_dd, stride_wd, stride_wf,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    packed = load_signs(bits, rows, tile_n, t, words, BLOCK_N)
    saved = load_post(post, rows, tile_n, t, f, BLOCK_N)
    value = differentiate(acc, saved, packed, rstd, rows, t, slope)
    offsets = rows.to(tl.int64)[:, None] * f + cols[None, :]
    inside = (rows < t)[:, None] & (cols < f)[None, :]
    tl.store(dpre + offsets, value.to(dpre.dtype.element_ty), mask=inside)


def up(
    h: Tensor, w_up: Tensor, slope: float, rstd: Tensor | None = None, tma: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Up projection, row scale, activation.

    Args:
        h: (T, D) bf16 or fp32, any strides.
        w_up: (F, D), the same dtype.
        slope: of the negative side, 0 to 1; 0 is relu^2.
        rstd: (T,) fp32 contiguous, row factors on the projection, or None.
        tma: force (True) or forbid (False) the TMA variant; None takes it where it is possible.

    Returns:
        post (T, F) in h's dtype and the sign words (T, ceil(F / 32)) int32.

    Raises:
        ValueError: tma=True where TMA is not possible.
    """
    (t, d), f = h.shape, w_up.size(0)
    post = torch.empty((t, f), dtype=h.dtype, device=h.device)
    bits = torch.empty((t, cdiv(f, 32)), dtype=torch.int32, device=h.device)
    sizes = {"t": t, "d": d, "f": f, "words": bits.size(1), "slope": float(slope)}
    with on_device_of(h):
        if takes_tma("leaky_relu2_mlp", tma, h, w_up, post):
            config = pick("leaky_relu2_up_tma")
            block_m, block_n, block_k = block_shape(config)
            launch(
                leaky_relu2_up_tma, persistent_grid(config, h, f), config,
                h=TensorDescriptor.from_tensor(h, [block_m, block_k]),
                w_up=TensorDescriptor.from_tensor(w_up, [block_n, block_k]),
                post=TensorDescriptor.from_tensor(post, [block_m, block_n // 2]),
                bits=bits, rstd=rstd, **sizes,
            )  # fmt: skip
        else:
            config = _pick_pointer("leaky_relu2_up", h)
            launch(
                leaky_relu2_up, (tiles(config, t, f),), config,
                h=h, w_up=w_up, post=post, bits=bits, rstd=rstd, **sizes,
                stride_ht=h.stride(0), stride_hd=h.stride(1),
                stride_wf=w_up.stride(0), stride_wd=w_up.stride(1),
                PRECISION=dot_precision(h.dtype),
            )  # fmt: skip
    return post, bits


def down_dgrad(
    dout: Tensor,
    w_down: Tensor,
    post: Tensor,
    bits: Tensor,
    slope: float,
    rstd: Tensor | None = None,
    tma: bool | None = None,
    dots: Tensor | None = None,
) -> Tensor:
    """Gradient of the pre-activation: through the down projection, the activation, the row scale.

    Args:
        dout: (T, D) bf16 or fp32, any strides: gradient of post @ w_down^T.
        w_down: (D, F), the same dtype.
        post, bits: as `up` returned them, contiguous.
        slope, rstd, tma: as given to `up`.
        dots: (`dot_parts` of F, T) fp32 contiguous: is filled with parts of the products of the
            rows of dout @ w_down with those of post. TMA only.

    Returns:
        dpre (T, F) in dout's dtype: the gradient of h @ w_up^T, which is times rstd already.

    Raises:
        ValueError: tma=True where TMA is not possible.
    """
    (t, d), f = dout.shape, w_down.size(1)
    dpre = torch.empty((t, f), dtype=dout.dtype, device=dout.device)
    sizes = {"t": t, "d": d, "f": f, "words": bits.size(1), "slope": float(slope)}
    with on_device_of(dout):
        if takes_tma("leaky_relu2_mlp", tma, dout, w_down, post, dpre):
            config = pick("leaky_relu2_dgrad_tma")
            block_m, block_n, block_k = block_shape(config)
            launch(
                leaky_relu2_dgrad_tma, persistent_grid(config, dout, f), config,
                dout=TensorDescriptor.from_tensor(dout, [block_m, block_k]),
                w_down=TensorDescriptor.from_tensor(w_down, [block_k, block_n]),
                dpre=TensorDescriptor.from_tensor(dpre, [block_m, block_n // 4]),
                post=post, bits=bits, rstd=rstd, dots=dots, **sizes,
            )  # fmt: skip
        else:
            config = _pick_pointer("leaky_relu2_dgrad", dout)
            launch(
                leaky_relu2_dgrad, (tiles(config, t, f),), config,
                dout=dout, w_down=w_down, post=post, bits=bits, rstd=rstd, dpre=dpre, **sizes,
                stride_dt=dout.stride(0), stride_dd=dout.stride(1),
                stride_wd=w_down.stride(0), stride_wf=w_down.stride(1),
                PRECISION=dot_precision(dout.dtype),
            )  # fmt: skip
    return dpre


def dot_parts(f: int) -> int:
    """How many parts `down_dgrad` has of the products of rows of f columns."""
    return cdiv(f, pick("leaky_relu2_dgrad_tma").blocks["BLOCK_N"])


def _pick_pointer(kernel: str, x: Tensor) -> Config:
    return pick(kernel, dtype=DTYPES[x.dtype], precision=dot_precision(x.dtype))

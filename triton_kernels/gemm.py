"""What GEMM kernels share: the order of tiles, the masked pointer loop, the precision of fp32."""

import torch
import triton
import triton.language as tl

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # as configs.json spells them


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of a product: fp32's is what torch's own matmuls are set to."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile: GROUP_M rows of tiles together, column by column, for the L2."""
    group = index // (GROUP_M * tiles_n)
    inside = index % (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + inside % height, inside // height


@triton.jit
def matmul_tile(
    a, b, rows, cols, m, n, k, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 (BLOCK_M, BLOCK_N) tile of A (m, k) @ B (k, n), 0 beyond the edges.

    All offsets are 64-bit, for operands of more than 2^31 elements.
    """
    inner = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64)
    a += rows.to(tl.int64)[:, None] * stride_am + inner.to(tl.int64)[None, :] * stride_ak
    b += inner.to(tl.int64)[:, None] * stride_bk + cols.to(tl.int64)[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        left = tl.load(a, mask=(rows < m)[:, None] & (inner < k - start)[None, :], other=0.0)
        right = tl.load(b, mask=(inner < k - start)[:, None] & (cols < n)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += step * stride_ak
        b += step * stride_bk
    return acc

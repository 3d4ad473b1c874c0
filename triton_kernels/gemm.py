"""What GEMM kernels share: the order of tiles, the masked pointer loop, the precision of fp32, and
where TMA descriptors and persistent programs are possible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf.triton_kernels.launch import Config, cdiv

H100_SMS = 132  # the grid for tensors that lie on no GPU: compiled ahead of time, interpreted
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
def halves(x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def load_columns(x, rows, first, t, n, stride, WIDTH: tl.constexpr):
    """WIDTH columns of a matrix (t, n) from `first` on, anything beyond the edges.

    By pointers: they are waited for where they are used, not where they are loaded.
    """
    columns = first + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(x + offsets, mask=(rows < t)[:, None] & (columns < n)[None, :])


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


def takes_tma(
    operator: str, wanted: bool | None, *operands: Tensor, obstacle: str = ""
) -> bool:
    """Whether these matrices go through TMA.

    Args:
        wanted: by the caller; None: where it is possible.
        obstacle: what else speaks against it, '' for nothing.

    Raises:
        ValueError: it is wanted and not possible; says why.
    """
    if wanted is False:
        return False
    obstacle = device_obstacle(operands[0].device) or obstacle or tma_obstacle(*operands)
    if wanted and obstacle:
        raise ValueError(f"{operator}: tma=True is not possible: {obstacle}")
    return not obstacle


def device_obstacle(device: torch.device) -> str:
    """Why this device cannot run the TMA variants, or an empty string.

    Devices before 9.x have no TMA; 12.x have it, but not the shared memory for these tiles.
    Tensors on no GPU are taken for an H100's: they are compiled for one, or interpreted.
    """
    if device.type != "cuda":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if (9, 0) <= capability < (12, 0):
        return ""
    return f"the device's capability {capability} is not 9.0 to 11.x"


def tma_obstacle(*operands: Tensor) -> str:
    """Why no TMA descriptors of these matrices can be, or an empty string."""
    for x in operands:
        if problem := _no_descriptor(x):
            what = f"an operand {tuple(x.shape)} {x.dtype} with strides {x.stride()}"
            return f"{what} {problem}"
    return ""


def _no_descriptor(x: Tensor) -> str:
    rows, columns = x.stride()
    if x.dtype != torch.bfloat16:
        return "is not bfloat16"
    if x.numel() == 0:
        return "is empty"
    if columns != 1 or rows * x.element_size() % 16 or x.data_ptr() % 16:
        return "is not aligned to 16 bytes row by row"
    return "has rows that overlap" if rows < x.size(1) else ""


def block_shape(config: Config) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K."""
    return tuple(config.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))


def tiles(config: Config, rows: int, columns: int) -> int:
    """How many tiles a result has."""
    block_m, block_n, _ = block_shape(config)
    return cdiv(rows, block_m) * cdiv(columns, block_n)


def persistent_grid(config: Config, x: Tensor, columns: int) -> tuple[int]:
    """PER_SM programs on each multiprocessor, at most one a tile of (rows of x, columns)."""
    count = H100_SMS
    if x.is_cuda:
        count = torch.cuda.get_device_properties(x.device).multi_processor_count
    return (min(count * config.blocks["PER_SM"], tiles(config, x.size(0), columns)),)

"""What GEMM kernels share: every tile once, near ones together; fp32 products as torch's."""

import pytest
import torch
import triton
import triton.language as tl

from pgolf.triton_kernels.gemm import dot_precision, tile_of


@triton.jit
def tiles_kernel(out, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    row, column = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize(
    ("tiles_m", "tiles_n", "group"), [(19, 3, 8), (8, 5, 8), (3, 4, 8), (1, 6, 4), (5, 1, 2)]
)
def test_every_tile_once_group_by_group(tiles_m: int, tiles_n: int, group: int) -> None:
    out = torch.empty(tiles_m * tiles_n, 2, dtype=torch.int32)
    tiles_kernel[(len(out),)](out, tiles_m, tiles_n, group)
    wanted = [
        [row, column]
        for first in range(0, tiles_m, group)
        for column in range(tiles_n)
        for row in range(first, min(first + group, tiles_m))
    ]
    assert out.tolist() == wanted


@pytest.mark.parametrize(("setting", "wanted"), [("highest", "ieee"), ("high", "tf32")])
def test_precision_is_torchs(setting: str, wanted: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert dot_precision(torch.float32) == wanted
        assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)

"""What mutants of the LeakyReLU^2 MLP have to get past."""

import pytest
import torch

from .tiles import small_tiles

BF16, FP32 = torch.bfloat16, torch.float32


def mlp_with_tma() -> None:
    _mlp(BF16, (130, 136, 264), tma=True)


def mlp_with_pointers() -> None:
    _mlp(FP32, (70, 33, 300), tma=False)
    _mlp(BF16, (130, 40, 264), tma=False)
    from tests.triton import test_leaky_relu2_mlp as t

    t.test_operands_of_any_strides(t.Variant(FP32))


def _mlp(dtype: torch.dtype, shape: tuple[int, int, int], tma: bool) -> None:
    small_tiles("leaky_relu2", BLOCK_M=32, BLOCK_N=128, BLOCK_K=16, GROUP_M=2)
    from tests.triton import test_leaky_relu2_mlp as t

    t.gemm.H100_SMS = 2  # persistent programs that have several tiles each
    t.check(t.random_inputs(*shape, dtype, with_rstd=True), 0.5, tma)
    variant = t.Variant(dtype, tma)
    t.test_exact_on_small_integers(variant)
    t.test_relu_squared_has_no_gradient_below_zero(variant)
    t.test_nan_stays_in_its_row(variant, 0.5)
    t.test_touched_bytes_are_inputs_and_outputs(variant)
    x = t.random_inputs(*shape, dtype, with_rstd=False)
    with t.touched() as record:
        post, bits = t.up(x.h, x.w_up, 0.5, tma=tma)
        t.down_dgrad(x.dout, x.w_down, post, bits, 0.5, tma=tma)
    assert sum(map(len, record.writes)) == len(record.written)  # no tile is computed twice


def mlp_with_dots() -> None:
    """What the gradient of the norm takes from the epilogue, over several tiles of columns."""
    small_tiles("leaky_relu2", BLOCK_M=32, BLOCK_N=128, BLOCK_K=16, GROUP_M=2)
    from tests.triton import test_norm_mlp_dots as t

    t.gemm.H100_SMS = 2
    t.test_dots_are_products_of_rows(70, 48, 264, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        t.test_dots_beyond_int32(patch)


CHECKS = {
    "leaky_relu2_up_tma": [mlp_with_tma],
    "leaky_relu2_dgrad_tma": [mlp_with_tma, mlp_with_dots],
    "leaky_relu2_up": [mlp_with_pointers],
    "leaky_relu2_dgrad": [mlp_with_pointers],
}

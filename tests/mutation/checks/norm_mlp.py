"""What mutants of the gradient of the MLP's norm have to get past."""

import math

import pytest

from .tiles import small_tiles


def norm_mlp_in_small_tiles() -> None:
    """With and without factors of x; then all else in one call."""
    small_tiles("norm_mlp", BLOCK_M=16, BLOCK_N=64, BLOCK_K=16, GROUP_M=2)
    from tests.triton import test_norm_mlp as t

    t.gemm.H100_SMS = 2  # persistent programs that have several tiles each
    for scaled in (True, False):
        t.test_exact_on_small_integers(scaled)
        for shape in ((70, 40, 144), (35, 24, 16)):
            t.check(t.random_inputs(*shape, scaled))
            t.test_touched_bytes_are_inputs_and_outputs(*shape, scaled)
    for name in ("g", "x", "dots"):
        t.test_what_is_not_finite_stays_in_its_row(name, math.inf)
    with pytest.MonkeyPatch.context() as patch:
        t.test_what_the_epilogue_reads_is_requested_early(patch)


def norm_mlp_beyond_int32() -> None:
    from tests.triton import test_norm_mlp as t

    small_tiles("norm_mlp", BLOCK_M=128, BLOCK_N=64, BLOCK_K=16)
    t.test_offsets_beyond_int32()
    with pytest.MonkeyPatch.context() as patch:
        t.test_results_beyond_int32(patch)


CHECKS = {
    "norm_mlp_dgrad_tma": [norm_mlp_in_small_tiles, norm_mlp_beyond_int32],
}

"""What mutants of the gradient through an output projection and XSA have to get past."""

import math

from .tiles import small_tiles


def xsa_linear_in_small_tiles() -> None:
    """Groups that are half of a tile, a tile, and several in a half; then all else in one call."""
    small_tiles("xsa_linear", BLOCK_M=16, BLOCK_N=64, BLOCK_K=16, GROUP_M=2)
    from tests.triton import test_xsa_linear as t

    t.gemm.H100_SMS = 2  # persistent programs that have several tiles each
    for grouping in ((6, 3, 32), (3, 3, 32), (12, 6, 8)):
        t.check(t.random_inputs(2, 35, grouping, 72))
        t.test_touched_bytes_are_inputs_and_outputs(grouping)
    for grouping in ((6, 3, 32), (3, 3, 32)):
        for norm in (0.0, 0.999e-12, 1.001e-12):
            t.test_norms_of_v(norm, grouping)
        for name in ("y", "v"):
            t.test_what_is_not_finite_stays_where_torch_lets_it(grouping, name, math.nan)


def xsa_linear_around_the_floor_of_the_norm() -> None:
    from tests.triton import test_xsa_linear as t

    small_tiles("xsa_linear", BLOCK_M=16, BLOCK_N=64, BLOCK_K=16, GROUP_M=2)
    t.test_values_at_the_floor_of_the_norm()


CHECKS = {
    "xsa_linear_dgrad_tma": [
        xsa_linear_in_small_tiles,
        xsa_linear_around_the_floor_of_the_norm,
    ],
}

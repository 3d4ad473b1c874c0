"""What mutants of projections that are added to the residual stream have to get past."""

import math

import pytest

from .tiles import small_tiles


def linear_residual_in_small_tiles() -> None:
    """Rows within a tile, and beyond several of them; then all else in one call."""
    small_tiles("linear_residual", BLOCK_M=16, BLOCK_N=64, BLOCK_K=16)
    from tests.triton import test_linear_residual as t

    t.gemm.H100_SMS = 2  # persistent programs that have several tiles each
    for form in t.FORMS:
        t.check(t.random_inputs(35, 24, 24, form))
    for form in ("residual", "all"):
        t.check(t.random_inputs(70, 40, 136, form))
        t.test_touched_bytes_are_inputs_and_outputs(70, 40, 136, form)
    t.test_exact_on_small_integers("all")
    t.test_sizes_of_rows(0.0)
    with pytest.MonkeyPatch.context() as patch:
        t.test_programs_have_the_tiles_of_their_rows_and_no_more(3, patch)
    for form in ("residual", "skip"):
        with pytest.MonkeyPatch.context() as patch:
            t.test_what_the_epilogue_reads_is_requested_early(form, patch)
    for name in ("z", "x", "skip"):
        t.test_what_is_not_finite_stays_in_its_row(name, math.inf)


CHECKS = {
    "linear_residual_tma": [linear_residual_in_small_tiles],
}

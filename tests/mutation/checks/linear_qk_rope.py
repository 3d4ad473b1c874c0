"""What mutants of the projection to queries, keys and values have to get past."""

import math

import pytest

from .tiles import small_tiles


def linear_qk_rope_in_small_tiles() -> None:
    """Heads of a whole half and several in one; then all else in one call."""
    small_tiles("linear_qk_rope", BLOCK_M=16, BLOCK_N=128, BLOCK_K=16)
    from tests.triton import test_linear_qk_rope as t

    t.gemm.H100_SMS = 2  # persistent programs that have several tiles each
    for heads in (t.Heads(3, 2, 64, 8), t.Heads(8, 4, 16, 8)):
        for beside in t.BESIDE:
            t.check(t.inputs(heads, (3, 17, 40), beside))
    t.test_touched_bytes_are_inputs_and_outputs("table")
    t.test_touched_bytes_are_inputs_and_outputs("values")
    for gain in (0.0, -0.0, -(2.0**-101)):
        t.test_a_gain_of_nearly_nothing_leaves_the_normed_heads_in_q(gain)
    t.test_the_least_gain_that_is_taken_as_it_is()
    t.test_what_does_not_turn_goes_through_exactly()
    t.test_sizes_of_rows(0.0)
    for bad in (-1, 7):
        t.test_an_id_that_the_table_does_not_have_gives_no_numbers(bad)
    for name in ("x", "value"):
        t.test_what_is_not_finite_stays_in_its_token(name, math.inf)
    t.test_offsets_beyond_int32()
    with pytest.MonkeyPatch.context() as patch:
        t.test_programs_have_the_tiles_of_their_rows_and_no_more(3, patch)
    with pytest.MonkeyPatch.context() as patch:
        t.test_results_beyond_int32(patch)


CHECKS = {
    "linear_qk_rope_tma": [linear_qk_rope_in_small_tiles],
}

"""For each kernel, the checks that its mutants have to get past, from quick to thorough.

They are those of tests/triton, on the few inputs that tell most. Kernels are imported inside of
them, since each mutant has a process of its own.
"""

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch

BF16, FP32 = torch.bfloat16, torch.float32


def small_tiles(prefix: str, **blocks: int) -> None:
    """Give these tile sizes to all configurations of some kernels: quick, and all different.

    A matrix has many tiles then, also in groups, and M in N's place is not the same number.
    """
    from pgolf.triton_kernels.launch import configs

    for kernel, rows in configs().items():
        if kernel.startswith(prefix):
            for i, row in enumerate(rows):
                known = {name: size for name, size in blocks.items() if name in row.blocks}
                rows[i] = dataclasses.replace(row, blocks={**row.blocks, **known})


def xsa_in_general() -> None:
    from tests.triton import test_xsa as t

    t.check(*t.as_attention_gives(2, 7, 6, 2, 20, FP32))
    t.check(*t.as_attention_gives(1, 17, 4, 4, 64, BF16))


def xsa_at_the_edges() -> None:
    from tests.triton import test_xsa as t

    t.test_strides((1, 0, 2, 3), FP32)
    t.test_touched_bytes_are_inputs_and_outputs(FP32)
    for norm in (0.0, 0.999e-12, 1.001e-12):
        t.test_norms_of_v(norm, FP32)
    for up in (False, True):
        t.test_the_two_float32_norms_around_the_floor(up)
    for which in range(3):
        t.test_what_is_not_finite_stays_in_its_group(which, math.nan, FP32)


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


def linear_residual_in_small_tiles() -> None:
    """Rows within a tile, and beyond several of them; then all else in one call."""
    small_tiles("linear_residual", BLOCK_M=16, BLOCK_N=64, BLOCK_K=16)
    from tests.triton import test_linear_residual as t

    t.gemm.H100_SMS = 2  # persistent programs that have several tiles each
    for shape in ((35, 24, 24), (70, 40, 136)):
        for form in t.FORMS:
            t.check(t.random_inputs(*shape, form))
        t.test_touched_bytes_are_inputs_and_outputs(*shape, "all")
    for form in ("residual", "joined", "all"):
        t.test_exact_on_small_integers(form)
    t.test_sizes_of_rows(0.0)
    with pytest.MonkeyPatch.context() as patch:
        t.test_programs_have_the_tiles_of_their_rows_and_no_more(3, patch)
    for form in ("residual", "skip"):
        with pytest.MonkeyPatch.context() as patch:
            t.test_what_the_epilogue_reads_is_requested_early(form, patch)
    for name in ("z", "x", "skip"):
        t.test_what_is_not_finite_stays_in_its_row(name, math.inf)


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


def mlp_with_dots() -> None:
    """What the gradient of the norm takes from the epilogue, over several tiles of columns."""
    small_tiles("leaky_relu2", BLOCK_M=32, BLOCK_N=128, BLOCK_K=16, GROUP_M=2)
    from tests.triton import test_norm_mlp as t

    t.gemm.H100_SMS = 2
    t.test_dots_are_products_of_rows(70, 48, 264, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        t.test_dots_beyond_int32(patch)


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


def newton_schulz_normalisation() -> None:
    small_tiles("newton_schulz", BLOCK_R=8, BLOCK_C=32, BLOCK_P=4)
    from tests.triton import test_newton_schulz as t

    for row_norm in (False, True):
        t.check(1e3 * t.random_matrices(2, 43, 70), [], FP32, row_norm, 1.02)
        t.check(t.random_matrices(4, 20, 36).mT, [], FP32, row_norm)
        t.check(t.random_matrices(2, 9, 12, dtype=BF16), t.CLASSIC[:1], BF16, row_norm)
    t.test_zeros_and_nan_stay_in_their_matrix(True)
    t.test_a_row_of_zeros_among_others()


def newton_schulz_of_tiny_matrices() -> None:
    """Where the constants beside the norms count."""
    from tests.triton import test_newton_schulz as t

    g = torch.nn.functional.normalize(t.random_matrices(1, 3, 40), dim=-1)
    g *= torch.tensor([0.5e-7, 1.5e-7, 3e-7])[:, None]
    t.check(g, [], FP32)
    t.check(g, [], FP32, row_norm=True)


def newton_schulz_touches_nothing_else() -> None:
    from tests.triton import test_newton_schulz as t
    from tests.triton.interpreter import addresses, touched

    t.test_touched_bytes()
    g, plain = t.random_matrices(2, 13, 40), torch.empty
    allocated = []

    def empty(*args: object, **named: object) -> torch.Tensor:
        allocated.append(plain(*args, **named))
        return allocated[-1]

    with pytest.MonkeyPatch.context() as patch, touched() as record:
        patch.setattr(torch, "empty", empty)
        x = t.newton_schulz(g, [], FP32, row_norm=True)
    between = [tensor for tensor in allocated if tensor is not x]
    assert np.array_equal(record.read, addresses(g, *between))
    assert np.array_equal(record.written, addresses(x, *between))


def newton_schulz_products() -> None:
    small_tiles("newton_schulz_product", BLOCK_M=16, BLOCK_N=32, BLOCK_K=64, GROUP_M=2)
    from tests.triton import test_newton_schulz as t

    t.check(t.random_matrices(2, 33, 70), t.POLAR_EXPRESS, FP32)
    t.check(t.random_matrices(1, 70, 33), t.CLASSIC[:2], BF16)
    t.test_batches_of_several_shapes_are_as_each_alone(BF16)
    t.test_from_sums_of_squares(t.POLAR_EXPRESS[:2], FP32)
    newton_schulz_of_a_tiny_matrix()


def newton_schulz_of_a_tiny_matrix() -> None:
    """From its sums of squares, where the constant beside the norm counts."""
    from tests.triton import test_newton_schulz as t

    g = 1e-8 * t.random_matrices(1, 5, 9)
    x = t.newton_schulz(g, t.CLASSIC[:1], FP32, squares=t.rows_of_squares(g))
    torch.testing.assert_close(x, t.newton_schulz(g, t.CLASSIC[:1], FP32))


def newton_schulz_one_triangle() -> None:
    small_tiles("newton_schulz_product", BLOCK_M=16, BLOCK_N=16, BLOCK_K=32)
    from tests.triton import test_newton_schulz as t

    with pytest.MonkeyPatch.context() as patch:
        t.test_one_triangle_of_a_product_that_is_not_symmetric(patch)
        t.test_sums_of_squares_by_one_triangle(patch)
        row = next(i for i, c in enumerate(t.PRODUCTS) if c.blocks["SYMMETRIC"])
        t.test_symmetric_products(row, False, patch)
        p, out = t.random_matrices(1, 40, 20), torch.zeros(1, 40, 120)[:, :, ::3]
        patch.setattr(t.ns, "pick", t.everywhere(t.PRODUCTS[row]))
        t.ns._products([(p, p.mT, None, out, None)], 1.0, 0.0, symmetric=True)
        torch.testing.assert_close(out, p @ p.mT)


def newton_schulz_triangle_with_a_gpus_square_root() -> None:
    """A unit in the last place off to either side, also where rounding alone is off."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from tests.triton import test_newton_schulz as t
    from tests.triton.interpreter import last_program, vast

    for toward in (0.0, math.inf):

        def root(self, x, toward=toward):
            return TensorHandle(np.nextafter(np.sqrt(x.data), toward), x.dtype.scalar)

        with mock.patch.object(InterpreterBuilder, "create_sqrt", root):
            t.test_tiles_of_the_triangle()
            for row in range(5000, 5010):
                first = row * (row + 1) // 2
                for index, wanted in ((first, [row, 0]), (first - 1, [row - 1, row - 1])):
                    out = vast(8 * index + 8).view(torch.int32)
                    arguments = {"out": out}
                    last_program(
                        t.Launch(t.triangle_kernel, (index + 1,), arguments, t.PRODUCTS[0])
                    )
                    assert out[-2:].tolist() == wanted


def fake_quant_in_general() -> None:
    small_tiles("fake_quant", BLOCK=128)
    from tests.triton import test_fake_quant as t

    t.check(*t.weights(9, 70, FP32), bits=4, floor=1e-3)
    t.check(*t.weights(9, 130, FP32), bits=4, full=True)
    for multiple, full in t.GRIDS:
        t.check(*t.weights(3, 7, BF16), 5, 1.0, 0.0, multiple, full)
    t.test_off_changes_nothing(FP32)
    t.test_strided_rows(FP32)


def fake_quant_of_several_matrices() -> None:
    """One launch: other widths, strides, bits and scales, and rows longer than a block."""
    small_tiles("fake_quant", BLOCK=128)
    from pgolf.triton_kernels.fake_quant import fake_quant_all
    from tests.triton import test_fake_quant as t

    on = torch.tensor(1.0)
    for shapes in ([(3, 70), (5, 20), (2, 128)], [(3, 70), (1, 300), (4, 7)]):
        inputs = [t.weights(*shape, FP32, seed) for seed, shape in enumerate(shapes)]
        ws, clips = zip(*inputs, strict=True)
        bits = [torch.tensor(4.0 + i) for i in range(3)]
        with t.GuardZones() as zones:
            ws, clips, bits = ([zones.input(x) for x in some] for some in (ws, clips, bits))
            values, scales = fake_quant_all(ws, clips, bits, on, 0.0, 1, False, BF16, True)
        for i, (value, scale) in enumerate(zip(values, scales, strict=True)):
            wanted, step, _ = t.defined(ws[i], clips[i], 4 + i, 0.0, 1, False)
            assert t.same_bits(value, wanted.to(BF16)) and t.same_bits(scale, step)
        again, none = fake_quant_all(ws, clips, bits, on, 0.0, 1, False, BF16, False)
        assert none == [] and all(map(torch.equal, again, values))


def fake_quant_of_long_rows() -> None:
    from tests.triton import test_fake_quant as t

    t.check(*t.weights(2, 300, FP32), multiple=4)
    t.check(*t.weights(2, 300, FP32), on=0.0, multiple=4)


def fake_quant_at_the_edges() -> None:
    from tests.triton import test_fake_quant as t

    for multiple in (1, 4):
        t.test_ties_go_to_the_even_code(multiple)
    t.test_weights_far_beyond_the_clip(FP32)
    t.test_steps_that_fp16_holds_badly(FP32)
    t.test_zeros_keep_their_sign(FP32)
    t.test_what_is_not_finite_stays_in_its_row(FP32)
    for bits in (3.0, 9.0, 5.5, math.nan):
        t.test_unknown_bits_give_nan(bits, 70)
    t.test_touched_bytes_are_inputs_and_outputs(77, FP32)


XSA = [xsa_in_general, xsa_at_the_edges]
NORMALISATION = [
    newton_schulz_normalisation,
    newton_schulz_of_tiny_matrices,
    newton_schulz_touches_nothing_else,
]
FAKE_QUANT = [fake_quant_in_general, fake_quant_of_long_rows, fake_quant_at_the_edges]
CHECKS = {
    "xsa_forward_kernel": XSA,
    "xsa_backward_kernel": XSA,
    "leaky_relu2_up_tma": [mlp_with_tma],
    "leaky_relu2_dgrad_tma": [mlp_with_tma, mlp_with_dots],
    "leaky_relu2_up": [mlp_with_pointers],
    "leaky_relu2_dgrad": [mlp_with_pointers],
    "xsa_linear_dgrad_tma": [
        xsa_linear_in_small_tiles,
        xsa_linear_around_the_floor_of_the_norm,
    ],
    "linear_residual_tma": [linear_residual_in_small_tiles],
    "norm_mlp_dgrad_tma": [norm_mlp_in_small_tiles, norm_mlp_beyond_int32],
    "linear_qk_rope_tma": [linear_qk_rope_in_small_tiles],
    "newton_schulz_norms": NORMALISATION,
    "newton_schulz_scale": NORMALISATION,
    "newton_schulz_product": [
        newton_schulz_products,
        newton_schulz_one_triangle,
        newton_schulz_touches_nothing_else,
        newton_schulz_triangle_with_a_gpus_square_root,
    ],
    "fake_quant_forward_kernel": [*FAKE_QUANT, fake_quant_of_several_matrices],
    "fake_quant_backward_kernel": FAKE_QUANT,
}

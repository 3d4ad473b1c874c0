"""What mutants of Newton-Schulz have to get past."""

import math
from unittest import mock

import numpy as np
import pytest
import torch

from .tiles import small_tiles

BF16, FP32 = torch.bfloat16, torch.float32


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


NORMALISATION = [
    newton_schulz_normalisation,
    newton_schulz_of_tiny_matrices,
    newton_schulz_touches_nothing_else,
]
CHECKS = {
    "newton_schulz_norms": NORMALISATION,
    "newton_schulz_scale": NORMALISATION,
    "newton_schulz_product": [
        newton_schulz_products,
        newton_schulz_one_triangle,
        newton_schulz_touches_nothing_else,
        newton_schulz_triangle_with_a_gpus_square_root,
    ],
}

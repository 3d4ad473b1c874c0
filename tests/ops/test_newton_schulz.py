"""Newton-Schulz against the same iteration in numpy float64."""

import numpy as np
import pytest
import torch

from pgolf.ops.newton_schulz import CLASSIC, POLAR_EXPRESS, newton_schulz, newton_schulz_all
from pgolf.ops.operator import OPERATORS

from ..triton.interpreter import repair
from .cases import implementations

repair()

SHAPES = [(16, 16), (8, 24), (24, 8), (1, 6), (6, 1)]


def by_hand(g: np.ndarray, steps: int = 5) -> np.ndarray:
    """One matrix, float64, on the side the matrix has: no transposing."""
    x = g / (np.sqrt((g**2).sum()) + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def sample(shape: tuple[int, int], count: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(shape[0])
    return torch.randn(count, *shape, generator=g)


@pytest.mark.parametrize("shape", SHAPES)
def test_follows_the_formula(shape: tuple[int, int]) -> None:
    g = sample(shape)
    expected = np.stack([by_hand(m.double().numpy()) for m in g])
    double = newton_schulz(g.double(), dtype=torch.float64)
    # 1e-7 and not 1e-15: only rounding differs between X X^T X and X X^T X on the other side
    np.testing.assert_allclose(double.numpy(), expected, rtol=0, atol=1e-10)
    single = newton_schulz(g, dtype=torch.float32)
    assert single.dtype is torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=2e-4)
    for steps in (1, 3):
        expected = np.stack([by_hand(m.double().numpy(), steps) for m in g])
        double = newton_schulz(g.double(), CLASSIC[:steps], torch.float64)
        np.testing.assert_allclose(double.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = sample(shape)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    graded = torch.linspace(1, 100, min(shape))  # condition number 100
    out = newton_schulz(u * graded @ vt, dtype=dtype)
    assert out.dtype is dtype and out.shape == g.shape
    s = torch.linalg.svdvals(out.float())
    assert s.min() > 0.5 and s.max() < 1.3, s
    # the singular vectors stay those of the input
    core = u.mT @ out.float() @ vt.mT
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < (1e-3 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_matrices_one_by_one(shape: tuple[int, int]) -> None:
    g = sample(shape)
    batch = newton_schulz(g, dtype=torch.float32)
    for i in range(len(g)):
        torch.testing.assert_close(newton_schulz(g[i : i + 1], dtype=torch.float32)[0], batch[i])


@pytest.mark.parametrize("impl", ["reference", *implementations(OPERATORS["newton_schulz"])])
def test_batches_together_are_as_each_alone(impl: str) -> None:
    gs = [sample((8, 24)), sample((24, 8), 1), sample((16, 16), 2), sample((6, 1))[0]]
    options = {"coefficients": CLASSIC[:2], "dtype": torch.float32, "impl": impl}
    together = newton_schulz_all(gs, **options)
    for g, x in zip(gs, together, strict=True):
        assert torch.equal(x, newton_schulz(g, **options))


def test_batches_that_do_not_fit_together() -> None:
    g = sample((8, 24))
    with pytest.raises(ValueError, match="batch 1 is torch.float64 and batch 0 is torch.float32"):
        newton_schulz_all([g, g.double()])
    with pytest.raises(ValueError, match="the list of batches is empty"):
        newton_schulz_all([])


def test_scale_does_not_matter() -> None:
    g = sample((8, 24))
    out = newton_schulz(g, dtype=torch.float32)
    for factor in (1e-3, 1e4):
        torch.testing.assert_close(
            newton_schulz(g * factor, dtype=torch.float32), out, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_matrix_stays_zero_and_leaves_its_batch_alone(dtype: torch.dtype) -> None:
    g = sample((8, 24))
    g[1] = 0
    out = newton_schulz(g, dtype=dtype)
    assert not out[1].any() and out.isfinite().all()
    torch.testing.assert_close(out[0], newton_schulz(g[:1], dtype=dtype)[0])


def test_tiny_gradients_do_not_vanish_in_bf16() -> None:
    g = sample((8, 24)) * 1e-30  # normalised in fp32 before the cast
    assert newton_schulz(g * 1e20, dtype=torch.bfloat16).abs().max() > 0.1


def test_strided_input_is_read_right_and_not_written() -> None:
    g = sample((24, 8))
    view = g.mT.contiguous().mT
    kept = view.clone()
    torch.testing.assert_close(
        newton_schulz(view, dtype=torch.float32), newton_schulz(g, dtype=torch.float32)
    )
    assert torch.equal(view, kept)


@pytest.mark.parametrize("impl", ["reference", *implementations(OPERATORS["newton_schulz"])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3])
def test_from_sums_of_squares(steps: int, dtype: torch.dtype, impl: str) -> None:
    """As from g alone; wide, tall, large and tiny, a batch of zeros, a single matrix."""
    gs = [1e3 * sample((8, 24)), 1e-9 * sample((40, 12), 2), 0 * sample((6, 6)), sample((5, 9))[0]]
    assert newton_schulz(1e20 * gs[3], CLASSIC, dtype, impl=impl,
                         squares=torch.full((5,), torch.inf)).isfinite().all()  # fmt: skip
    squares = [g.square().sum(-1) for g in gs]
    options = {"coefficients": POLAR_EXPRESS[:steps], "safety": 1.02, "impl": impl}
    together = newton_schulz_all(gs, **options, dtype=dtype, squares=squares)
    exact = newton_schulz_all([g.double() for g in gs], **options | {"impl": "reference"},
                              dtype=torch.float64)  # fmt: skip
    for g, s, x, truth in zip(gs, squares, together, exact, strict=True):
        assert torch.equal(x, newton_schulz(g, **options, dtype=dtype, squares=s))
        usual = newton_schulz(g, **options, dtype=dtype)
        error, allowed = ((t.double() - truth).norm() for t in (x, usual))
        # A rounding of the norm, which the first step's slope of 8 makes larger.
        assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps * truth.norm()


def test_squares_that_do_not_fit() -> None:
    g = sample((8, 24))
    squares = g.square().sum(-1)
    for wrong in (squares[:, 1:], squares.double(), squares[:1]):
        with pytest.raises(ValueError, match=r"squares is .*: for these g it has to be"):
            newton_schulz(g, squares=wrong)
    with pytest.raises(ValueError, match="row_norm=True with squares: divide the rows before"):
        newton_schulz(g, row_norm=True, squares=squares)


@pytest.mark.parametrize(("row_norm", "known"), [(False, False), (True, False), (False, True)])
def test_without_a_gradient_all_shapes_together_are_each_by_itself(row_norm, known) -> None:
    """Tall ones beside their transposes, two batches of one shape, Gram matrices of one size."""
    shapes = [*SHAPES, (8, 30), (8, 24)]
    gs = [0.02 * sample(shape, i % 3 + 1).double() for i, shape in enumerate(shapes)]
    options = {"dtype": torch.float64, "row_norm": row_norm, "impl": "reference"}
    sums = [g.square().sum(-1) if known else None for g in gs]
    with torch.no_grad():
        together = newton_schulz_all(gs, **options, squares=sums if known else None)
    for g, found, squares in zip(gs, together, sums, strict=True):
        alone = newton_schulz(g.requires_grad_(), **options, squares=squares)
        torch.testing.assert_close(found, alone.detach(), rtol=0, atol=1e-12)

"""The integer grids against numpy float64, their edge cases, and the straight-through gradient."""

import math

import numpy as np
import pytest
import torch

from pgolf.ops import fake_quant, fake_quant_all
from pgolf.ops.int_grid import row_codes, row_step

from ..triton.interpreter import repair

repair()

BITS = (4, 5, 6, 7, 8)
ONE, ZERO = torch.ones(()), torch.zeros(())


def weights(rows: int = 9, columns: int = 33, std: float = 0.05) -> torch.Tensor:
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=g) * std


def by_hand(
    w: torch.Tensor, factor: torch.Tensor, bits: int, floor: float, multiple: int, full: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(codes, values) by the formula; divisions are the fp32 ones that are specified."""
    w, factor = w.numpy(), factor.numpy()
    qmax = 2 ** (bits - 1) - 1
    clip = np.maximum(np.abs(w).max(1) * factor, np.float32(floor))
    step = np.clip(clip / np.float32(qmax), 2.0**-24, 65504).astype(np.float16).astype(np.float32)
    codes = np.rint(w / step[:, None])  # rint rounds half to even
    if multiple > 1:
        codes = np.rint(codes / multiple) * multiple
    codes = np.clip(codes, -qmax - full, qmax)
    return codes, codes * step[:, None]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("floor", "multiple", "full", "cut"),
    [(0, 1, False, 1.0), (1, 1, False, 1.0), (0, 4, False, 1.0), (0, 1, True, 0.6)],
)
def test_follows_the_formula(
    bits: int, floor: float, multiple: int, full: bool, cut: float
) -> None:
    w = weights()
    factor = torch.full((len(w),), cut)
    codes, values = by_hand(w, factor, bits, floor, multiple, full)
    step = row_step(w.abs().amax(1) * factor, bits, floor)
    assert step.dtype is torch.float32
    assert torch.equal(step, step.half().float()), "the step is an fp16 number"
    assert np.array_equal(row_codes(w, step, bits, multiple, full).numpy(), codes)
    quantised = fake_quant(w, factor, torch.tensor(float(bits)), ONE, floor, multiple, full)
    assert np.array_equal(quantised.numpy(), values), "training must see what is decoded"
    if cut < 1:
        low = -(2 ** (bits - 1)) + (0 if full else 1)
        assert codes.min() == low and codes.max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", BITS)
def test_bits_as_number_and_as_tensor_agree_bit_for_bit(bits: int) -> None:
    w = weights(64, 65)
    clip = w.abs().amax(1)
    for held in (torch.tensor(bits), torch.tensor(float(bits))):
        step = row_step(clip, bits)
        assert torch.equal(row_step(clip, held), step)
        for full in (False, True):
            assert torch.equal(
                row_codes(w, step, held, full_range=full),
                row_codes(w, step, bits, full_range=full),
            )


@pytest.mark.parametrize("bits", BITS)
def test_unclipped_error_is_at_most_half_a_step(bits: int) -> None:
    w = weights(16, 100)
    factor = torch.ones(16)
    value = fake_quant(w, factor, torch.tensor(float(bits)), ONE)
    step = row_step(w.abs().amax(1), bits)
    # fp16 rounds the step by up to 2^-11, which the largest codes feel qmax times
    slack = 0.5 + 2.0**-11 * 2 ** (bits - 1)
    assert ((value - w).abs() <= slack * step[:, None]).all()


def test_a_value_on_the_grid_stays() -> None:
    step = 2.0**-6
    codes = torch.arange(-31, 32).float()[None]
    assert torch.equal(
        fake_quant(codes * step, torch.ones(1), torch.tensor(6.0), ONE), codes * step
    )


def test_ties_round_to_even() -> None:
    step = torch.tensor([0.25])
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]) * 0.25
    assert row_codes(w, step, 6).tolist() == [[0, 2, 2, 0, -2, -2]]
    assert row_codes(torch.tensor([[2.0, 6.0, -6.0]]), torch.ones(1), 8, 4).tolist() == [[0, 8, -8]]


def test_multiples_stay_within_the_range() -> None:
    """PR 543: int8 codes that are multiples of 4, clamped to 127."""
    w = torch.linspace(-1, 1, 301)[None]
    codes = row_codes(w, row_step(torch.ones(1), 8), 8, 4)
    inner = codes[codes.abs() != 127]
    assert (inner % 4 == 0).all() and codes.abs().max() == 127


def test_a_zero_row() -> None:
    w = torch.zeros(2, 4)
    w[1] = 0.5
    assert row_step(w.abs().amax(1), 6)[0] == 2.0**-24
    out = fake_quant(w, torch.ones(2), torch.tensor(6.0), ONE)
    assert not out[0].any() and out[1].allclose(w[1], rtol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-6, 1e-4])
def test_tiny_rows_use_subnormal_steps(size: float) -> None:
    w = weights(4, 64, 1.0) * size
    step = row_step(w.abs().amax(1), 6)
    assert (step >= 2.0**-24).all()
    out = fake_quant(w, torch.ones(4), torch.tensor(6.0), ONE)
    assert out.isfinite().all()
    assert (out - w).abs().max() <= max(0.5 * step.max().item(), 0) + 0.5 * 2.0**-24 * 31


@pytest.mark.parametrize("clip", [65504.0 * 31, 1e30, math.inf])
def test_huge_rows_clip_at_the_largest_fp16(clip: float) -> None:
    assert row_step(torch.tensor([clip]), 6).item() == 65504.0


def test_the_published_floor() -> None:
    clip = torch.tensor([0.3, 1.0, 4.0])
    expected = torch.tensor([1 / 31, 1 / 31, 4 / 31]).half().float()
    assert torch.equal(row_step(clip, 6, 1.0), expected)


@pytest.mark.parametrize("full", [False, True])
def test_gradient_is_exactly_one_everywhere(full: bool) -> None:
    w = weights().requires_grad_()
    upstream = torch.randn(w.shape)
    for on in (ONE, ZERO):
        out = fake_quant(w, torch.full((9,), 0.5), torch.tensor(5.0), on, full_range=full)
        (grad,) = torch.autograd.grad(out, w, upstream)
        assert torch.equal(grad, upstream)


def test_off_returns_the_weights_exactly() -> None:
    w = torch.cat((weights(), weights() * 1e30, weights() * 1e-30))
    assert torch.equal(fake_quant(w, torch.full((27,), 0.3), torch.tensor(4.0), ZERO), w)


def test_each_row_has_its_own_step_and_clip() -> None:
    w, factor, bits = weights(), torch.linspace(0.3, 1, 9), torch.tensor(6.0)
    whole = fake_quant(w, factor, bits, ONE)
    for i in range(9):
        row = slice(i, i + 1)
        assert torch.equal(fake_quant(w[row], factor[row], bits, ONE), whole[row])


def test_nan_and_infinity_are_not_hidden() -> None:
    """A diverged weight must reach the loss, where training stops."""
    for bad in (math.nan, math.inf):
        w = weights()
        w[2, 3] = bad
        out = fake_quant(w, torch.ones(9), torch.tensor(6.0), ONE)
        assert not out[2].isfinite().all()
        assert out[[0, 1, 3, 4, 5, 6, 7, 8]].isfinite().all()


def test_strided_weights() -> None:
    w = weights(8, 8)
    bits = torch.tensor(6.0)
    assert torch.equal(
        fake_quant(w.T, torch.ones(8), bits, ONE),
        fake_quant(w.T.contiguous(), torch.ones(8), bits, ONE),
    )


def test_the_compiled_step_is_the_stored_one() -> None:
    """Inductor drops pairs of casts to fp16 and back; training has to see what is decoded."""
    clip = torch.logspace(-8, 6, 400)
    w, factor = weights(64, 65), torch.ones(64)
    compiled = torch.compile(row_step, fullgraph=True)
    whole = torch.compile(fake_quant, fullgraph=True)
    for bits in BITS:
        held = torch.tensor(float(bits))
        assert torch.equal(compiled(clip, held), row_step(clip, bits))
        assert torch.equal(row_step(clip, bits), row_step(clip, bits).half().float())
        assert torch.equal(whole(w, factor, held, ONE), fake_quant(w, factor, held, ONE))


def test_steps_round_as_fp16_does() -> None:
    """Every fp16 number, its neighbours in fp32, and every tie between two of them."""
    exact = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    middle = (exact[1:] + exact[:-1]) / 2
    around = [
        f(x)
        for x in (exact, middle)
        for f in (
            lambda x: x,
            lambda x: x.nextafter(torch.tensor(0.0)),
            lambda x: x.nextafter(torch.tensor(1e9)),
        )
    ]
    x = torch.cat(around).clamp(2.0**-24, 65504)
    assert torch.equal(row_step(x * 7, 4), x.half().float())


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("clip_mask", [False, True])
def test_several_matrices_are_each_alone(impl: str, clip_mask: bool) -> None:
    """In one call, with bits of their own; more than one launch of the Triton kernel takes."""
    shapes = [(3, 8), (5, 40), (1, 8), (4, 16), (2, 33), (6, 8), (7, 24), (2, 8), (3, 48), (1, 1)]
    ws = [weights(*shape).requires_grad_() for shape in shapes]
    factors = [torch.linspace(0.5, 1, rows) for rows, _ in shapes]
    bits = [torch.tensor(float(4 + i % 5)) for i in range(len(shapes))]
    options = dict(clip_mask=clip_mask, dtype=torch.bfloat16)
    together = fake_quant_all(ws, factors, bits, ONE, **options, impl=impl)
    upstream = [torch.randn_like(value) for value in together]
    gradients = torch.autograd.grad(together, ws, upstream)
    for w, factor, k, value, up, gradient in zip(
        ws, factors, bits, together, upstream, gradients, strict=True
    ):
        alone = fake_quant(w, factor, k, ONE, **options, impl="reference")
        assert value.dtype is torch.bfloat16 and torch.equal(value, alone)
        assert torch.equal(gradient, torch.autograd.grad(alone, w, up)[0])


def test_matrices_that_nothing_flows_back_to() -> None:
    ws = [weights(3, 8).requires_grad_(), weights(4, 8).requires_grad_()]
    bits = [torch.tensor(6.0)] * 2
    first, _ = fake_quant_all(ws, [torch.ones(3), torch.ones(4)], bits, ONE, clip_mask=True)
    first.sum().backward()
    assert (ws[0].grad == 1).all() and (ws[1].grad is None or not ws[1].grad.any())


def test_every_nan_stays_a_nan_in_the_step() -> None:
    """0x7FFFFFFF is what a GPU makes of an invalid operation."""
    for pattern in (0x7FFFFFFF, 0x7FC00000, -1, -0x400000):
        clip = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        assert clip.isnan() and row_step(clip, 6).isnan()

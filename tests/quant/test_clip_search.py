"""Clip search: torch.quantile's percentiles, least error, and the grid that late QAT sees."""

import pytest
import torch

from pgolf.config import QuantConfig
from pgolf.ops import fake_quant
from pgolf.quant import clip_search
from pgolf.quant.clip_search import clip_factors, quantize_rows
from pgolf.quant.dequantize import QuantizedTensor, dequantize
from pgolf.quant.plan import TensorPlan, plan_tensors
from pgolf.quant.quantize import quantize

CANDIDATES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def heavy_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of different widths with outliers, so that the best percentile differs by row."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * torch.rand(rows, 1, generator=g)
    outlier = torch.rand(rows, columns, generator=g) > 0.999
    return w + outlier * 4 * torch.randn(rows, columns, generator=g)


def int_plan(clip: str = "search_row", bits: int = 6, candidates=CANDIDATES, **more) -> TensorPlan:
    return TensorPlan("int", "test", bits, clip=clip, percentiles=candidates, **more)


def decoded(w: torch.Tensor, factors: torch.Tensor, plan: TensorPlan) -> torch.Tensor:
    codes, steps = quantize_rows(w, factors, plan)
    return dequantize(QuantizedTensor(codes, plan.bits, steps))


def row_errors(w: torch.Tensor, plan: TensorPlan) -> torch.Tensor:
    """(P, R) squared errors of every candidate, one at a time."""
    single = [clip_factors(w, int_plan("quantile", candidates=(p,))) for p in plan.percentiles]
    return torch.stack([(decoded(w, f, plan) - w).square().sum(dim=1) for f in single])


@pytest.mark.parametrize("columns", [1, 2, 7, 512, 1409])
@pytest.mark.parametrize("p", [0.3, 0.5, 0.999, 0.9999984, 1.0])
def test_percentiles_are_those_of_torch_quantile(columns: int, p: float):
    w = heavy_rows(33, columns)
    expected = torch.quantile(w.abs(), p, dim=1) / w.abs().amax(dim=1)
    # Versions of torch differ in the precision of the rank: far less than a rank.
    torch.testing.assert_close(
        clip_factors(w, int_plan("quantile", candidates=(p,))), expected, rtol=1e-4, atol=0
    )


def test_row_search_takes_the_least_error_of_each_row():
    w, plan = heavy_rows(200, 700), int_plan()
    best = (decoded(w, clip_factors(w, plan), plan) - w).square().sum(dim=1)
    errors = row_errors(w, plan)
    assert torch.equal(best, errors.amin(dim=0))
    assert errors.argmin(dim=0).unique().numel() > 1, "the rows must disagree for this to test"


def test_matrix_search_takes_one_percentile_and_is_never_better():
    w = heavy_rows(200, 700)
    plan = int_plan("search_matrix")
    factors = clip_factors(w, plan)
    best = int(row_errors(w, plan).double().sum(dim=1).argmin())
    expected = clip_factors(w, int_plan("quantile", candidates=(CANDIDATES[best],)))
    assert torch.equal(factors, expected)
    by_row = decoded(w, clip_factors(w, int_plan()), plan)
    assert (by_row - w).square().sum() < (decoded(w, factors, plan) - w).square().sum()


@pytest.mark.parametrize("clip", ["search_row", "search_matrix"])
def test_chunks_do_not_change_the_result(monkeypatch, clip: str):
    w, plan = heavy_rows(50, 300), int_plan(clip)
    whole = clip_factors(w, plan)
    monkeypatch.setattr(clip_search, "CHUNK", 7 * 300)
    assert torch.equal(clip_factors(w, plan), whole)


def test_ties_take_the_first_candidate():
    w = 0.01 * heavy_rows(20, 300)  # the floor of 1 decides every step
    first = clip_factors(w, int_plan("quantile", candidates=CANDIDATES[:1]))
    assert torch.equal(clip_factors(w, int_plan(floor=1.0)), first)


def test_rows_of_zeros_and_zero_quantiles_keep_factor_one():
    w = torch.zeros(3, 1000)
    w[1, 5] = -0.75  # its 0.9 quantile is 0, which would wipe the row out
    plan = int_plan("quantile", candidates=(0.9,))
    assert clip_factors(w, plan).tolist() == [1.0, 1.0, 1.0]
    value = decoded(w, clip_factors(w, plan), plan)
    assert value[1, 5] == pytest.approx(-0.75, rel=1e-3)
    assert value.count_nonzero() == 1


@pytest.mark.parametrize("bits", ["4", "5", "6", "7", "8", "8/4"])
@pytest.mark.parametrize("clip", ["row", "matrix", "max"])
@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("full_range", [False, True])
def test_late_qat_sees_exactly_what_is_exported(bits, clip, floor, full_range):
    config = QuantConfig(
        attn_bits=bits, clip_search=clip, min_step=floor, full_range=full_range,
        clip_percentiles="0.9,0.99,0.999",  # narrow: outliers are clipped to less than half
    )
    name = "blocks.0.attn.c_q.weight"
    w = heavy_rows(300, 257).requires_grad_()
    plan = plan_tensors(config, {name: tuple(w.shape)})[name]
    factors = clip_factors(w, plan)
    on = torch.tensor(1.0)
    qat = fake_quant(w, factors, torch.tensor(float(plan.bits)), on, **plan.grid())
    assert torch.equal(qat.detach(), decoded(w, factors, plan))
    weight = torch.randn(w.shape)
    (qat * weight).sum().backward()
    assert torch.equal(w.grad, weight), "the gradient passes straight through"
    off = fake_quant(w, factors, torch.tensor(float(plan.bits)), torch.tensor(0.0), **plan.grid())
    assert torch.equal(off, w)


@pytest.mark.parametrize("bits", ["5", "8", "8/4"])
def test_late_qat_on_one_step_sees_what_is_exported(bits: str):
    config = QuantConfig(attn_bits=bits, grid="uniform", width=12.0, small_numel=0)
    name = "blocks.0.attn.c_q.weight"
    w = heavy_rows(300, 257)
    w[4] = 0
    plan = plan_tensors(config, {name: tuple(w.shape)})[name]
    factors = clip_factors(w, plan)
    assert (factors > 1).any(), "most rows' largest weights are not worth the largest code"
    qat = fake_quant(w, factors, torch.tensor(float(plan.bits)), torch.tensor(1.0), **plan.grid())
    q = quantize({name: w}, config, progress=False).tensors[name]
    assert torch.equal(qat, dequantize(q))
    step = 12.0 * w.square().mean().sqrt() / {"5": 15, "8": 127, "8/4": 31}[bits]
    usual = q.steps.float().median()
    assert (usual / step).log2().abs() <= 1 / 32 + 1e-3
    too_wide = w.abs().amax(dim=1) > 127 * usual * 1.03
    assert (q.steps[~too_wide & (w.abs().amax(dim=1) < 127 * usual * 0.97)] <= usual.half()).all()
    assert (q.steps[too_wide] > usual).all() and bool(too_wide.any()) == (bits == "8")

"""GPTQ by a Hessian that knows too little: other text shows it, and the matrix is rounded."""

from functools import cache

import pytest
import torch

from pgolf.config import QuantConfig
from pgolf.quant.dequantize import dequantize
from pgolf.quant.gptq import Factors
from pgolf.quant.hessians import Calibration
from pgolf.quant.quantize import QuantizedModel, quantize
from pgolf.quant.safeguard import bits_a_code, expected_to_add, rounded_at_bits

from .gptq_cases import row_error, weights

NAME = "blocks.0.attn.c_q.weight"
ROWS, COLUMNS = 96, 64


def statistics(count: int, seed: int, held_out: Calibration | None = None) -> Calibration:
    """Of `count` inputs, always from one distribution of correlated inputs."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(COLUMNS, COLUMNS, generator=g) / COLUMNS**0.5 + torch.eye(COLUMNS)
    x = torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed)) @ mix
    moments = {NAME: torch.linspace(0.5, 1.5, ROWS)}
    return Calibration({NAME: x.T @ x / count}, moments, count, held_out)


@cache
def truth() -> torch.Tensor:
    return statistics(100_000, 1).hessians[NAME]


def stored(known: Calibration, damping: float, **settings) -> QuantizedModel:
    config = QuantConfig(small_numel=0, damping=damping, **settings)
    factors = Factors(known.hessians, damping)
    w = {NAME: weights(ROWS, COLUMNS)}
    return quantize(w, config, False, factors, known.moments, held_out=known.held_out)


def true_error(model: QuantizedModel) -> float:
    return row_error(weights(ROWS, COLUMNS), dequantize(model.tensors[NAME]), truth()).sum()


@pytest.mark.parametrize("grid", ["rows", "uniform"])
@pytest.mark.parametrize("held_out", [8, 200])
def test_few_inputs_and_hardly_any_damping(grid: str, held_out: int) -> None:
    known = statistics(16, 2)
    trusted = stored(known, 1e-6, grid=grid)
    judged = stored(statistics(16, 2, statistics(held_out, 3)), 1e-6, grid=grid)
    assert trusted.stats[NAME].hessian_error < judged.stats[NAME].hessian_error, (
        "the Hessian that was minimised shows nothing"
    )
    assert judged.stats[NAME].rounded and not trusted.stats[NAME].rounded
    assert true_error(trusted) > 2 * true_error(judged)
    bits = [bits_a_code(m.tensors[NAME].data) for m in (trusted, judged)]
    assert bits[1] <= bits[0] * (1.0 if grid == "uniform" else 1.05)


@pytest.mark.parametrize("grid", ["rows", "uniform"])
def test_gptq_stays_where_it_is_better(grid: str) -> None:
    trusted = stored(statistics(2000, 2), 0.01, grid=grid)
    judge = statistics(200, 3)
    judged = stored(statistics(2000, 2, judge), 0.01, grid=grid)
    assert not judged.stats[NAME].rounded
    assert torch.equal(trusted.tensors[NAME].data, judged.tensors[NAME].data)
    loss = expected_to_add(
        weights(ROWS, COLUMNS), judged.tensors[NAME], judge.hessians[NAME], judge.moments[NAME]
    )
    assert judged.stats[NAME].loss == loss != trusted.stats[NAME].loss


@pytest.mark.parametrize("width", [1.0, 4.5, 40.0, 100.0])
def test_rounding_takes_a_fine_step_within_the_bits(width: float) -> None:
    model = stored(statistics(2000, 2), 0.01, grid="uniform", width=width)
    w = weights(ROWS, COLUMNS)
    like, plan = model.tensors[NAME], model.plans[NAME]
    rounded = rounded_at_bits(w, like, plan)
    limit, step = bits_a_code(like.data), rounded.steps.float().min().item()
    assert bits_a_code(rounded.data) <= limit
    finer = (w / (step * 2 ** (-1 / 8))).round().clamp(-127, 127).char()
    assert bits_a_code(finer) > limit or (rounded.data.abs() == 127).any()
    assert torch.allclose(dequantize(rounded), w, atol=rounded.steps.float().max().item() * 0.51)


def test_what_it_adds_is_by_moments_and_hessian() -> None:
    q, known = stored(statistics(50, 2), 0.01).tensors[NAME], statistics(9, 5)
    w, moment = weights(ROWS, COLUMNS), known.moments[NAME]
    rows = row_error(w, dequantize(q), known.hessians[NAME])
    expected = 0.5 * (moment.double().numpy() @ rows)
    assert expected_to_add(w, q, known.hessians[NAME], moment) == pytest.approx(expected, rel=1e-4)

"""Pruning to fit: order by cost, least count, few probes, and when it cannot fit."""

import dataclasses

import pytest
import torch

from pgolf.errors import BudgetError
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.prune import prune_to_fit
from pgolf.quant.quantize import QuantizedModel


def model(**tensors: QuantizedTensor) -> QuantizedModel:
    return QuantizedModel(tensors, {}, {})


def ints(codes: list[list[int]], steps: list[float], bits: int = 6) -> QuantizedTensor:
    return QuantizedTensor(torch.tensor(codes, dtype=torch.int8), bits, torch.tensor(steps).half())


def nonzeros(m: QuantizedModel) -> int:
    """A size that falls by one for each code that is zeroed."""
    return sum(int(q.data.count_nonzero()) for q in m.tensors.values())


SMALL = dict(
    a=ints([[1, -1, 5], [0, 2, -1]], [0.5, 0.25]),
    b=ints([[4, -8, -4]], [0.1], bits=8),  # multiples of 4: the cost of a 4 is 16 steps squared
    c=QuantizedTensor(torch.ones(3).half()),
)


def fit(m: QuantizedModel, target: int, **more) -> tuple[QuantizedModel, int]:
    return prune_to_fit(m, nonzeros, target, progress=False, **more)


@pytest.mark.parametrize(
    ("count", "a", "b"),
    [
        (1, [[1, -1, 5], [0, 2, 0]], [[4, -8, -4]]),  # 0.25² first
        (2, [[1, -1, 5], [0, 2, 0]], [[0, -8, -4]]),  # then (4 x 0.1)², in flat order
        (3, [[1, -1, 5], [0, 2, 0]], [[0, -8, 0]]),
        (4, [[0, -1, 5], [0, 2, 0]], [[0, -8, 0]]),  # then 0.5²
        (5, [[0, 0, 5], [0, 2, 0]], [[0, -8, 0]]),
    ],
)
def test_cheapest_first_ties_in_flat_order(count: int, a: list, b: list):
    before = model(**SMALL)
    pruned, zeroed = fit(before, nonzeros(before) - count)
    assert zeroed == count
    assert pruned.tensors["a"].data.tolist() == a
    assert pruned.tensors["b"].data.tolist() == b
    assert torch.equal(pruned.tensors["c"].data, SMALL["c"].data), "fp16 values are left alone"
    assert SMALL["a"].data.tolist()[0] == [1, -1, 5], "the input is left alone"


def test_columns_weigh_in_and_are_kept():
    q = dataclasses.replace(ints([[1, 1, 1]], [1.0]), columns=torch.tensor([1.0, 0.25, 0.5]).half())
    pruned, zeroed = fit(model(a=q), 1)
    assert zeroed == 2 and pruned.tensors["a"].data.tolist() == [[1, 0, 0]]
    assert torch.equal(pruned.tensors["a"].columns, q.columns)


def test_a_model_that_fits_is_returned_as_it_is():
    m = model(**SMALL)
    assert fit(m, nonzeros(m)) == (m, 0)


def test_too_small_a_target_is_a_budget_error():
    m = model(**SMALL)
    with pytest.raises(BudgetError, match="1 bytes too large even with all 5"):
        fit(m, nonzeros(m) - 6)


def test_nothing_to_prune_is_a_budget_error():
    with pytest.raises(BudgetError, match="all 0"):
        fit(model(c=SMALL["c"]), 0)


@pytest.mark.parametrize("curve", ["linear", "square", "root", "steps"])
def test_least_count_on_a_real_size_curve(curve: str):
    """The count is close to the least one for any monotone size, within the probes allowed."""
    torch.manual_seed(0)
    codes = torch.randint(-3, 4, (200, 500)).to(torch.int8)
    m = model(w=QuantizedTensor(codes, 6, torch.rand(200).half()))
    total = int((codes.abs() == 1).sum())
    probes = []

    def size(candidate: QuantizedModel) -> int:
        zeroed = nonzeros(m) - nonzeros(candidate)
        probes.append(zeroed)
        share = zeroed / total
        saved = {"linear": share, "square": share**2, "root": share**0.5}.get(curve)
        return 1_000_000 - int(500_000 * (int(share * 50) / 50 if saved is None else saved))

    target = 1_000_000 - 171_000
    pruned, zeroed = prune_to_fit(m, size, target, progress=False)
    assert size(pruned) <= target
    least = {"linear": 0.342, "square": 0.342**0.5, "root": 0.342**2, "steps": 0.36}[curve] * total
    assert least - 1 <= zeroed <= least + 0.002 * total
    assert len(probes) <= 13
    exact, count = prune_to_fit(m, size, target, probes=60, progress=False)
    assert count == pytest.approx(least, abs=2) and nonzeros(m) - nonzeros(exact) == count

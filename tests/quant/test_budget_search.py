"""The search for a budget, on sizes that follow the law of high rates and on ones that do not."""

import math
from collections.abc import Callable, Mapping

import pytest

from pgolf.errors import BudgetError
from pgolf.quant.budget import PROBES, WINDOW, Fit, WaterLevel, fit
from pgolf.quant.step_grid import PER_OCTAVE

SHAPES = {f"m{i}": (1 << 18) + 1000 * i for i in range(60)}


def level(**finest: float) -> WaterLevel:
    relative = {n: math.exp(0.7 * math.sin(7 * i)) for i, n in enumerate(SHAPES)}
    return WaterLevel(relative, dict.fromkeys(SHAPES, 2.0**-10) | finest)


def size_of(steps) -> int:
    """Entropy of unit Gaussians at these steps, and never less than nothing."""
    bits = (max(2.05 - index / PER_OCTAVE, 0.02) * SHAPES[n] for n, index in steps.items())
    return int(sum(bits) / 8) + 12_345


def fitted(
    d: WaterLevel, start: float, budget: int, size: Callable[[Mapping], int] = size_of
) -> Fit:
    def measure(steps: Mapping[str, int]) -> tuple[int, float]:
        return size(steps), sum(4.0 ** (index / PER_OCTAVE) for index in steps.values())

    return fit(d, start, sum(SHAPES[n] for n in d.offsets), budget, measure, progress=False)


@pytest.mark.parametrize("budget", [6_000_000, 9_000_000, 15_937_000])
@pytest.mark.parametrize("start", [-100.0, -40.0, 0.0, 30.0])
def test_it_lands_in_the_window(budget: int, start: float) -> None:
    fit = fitted(level(), start, budget)
    assert budget - budget // WINDOW <= fit.chosen.size <= budget
    assert fit.full and fit.probes <= 5
    assert size_of(fit.chosen.steps) == fit.chosen.size


def test_the_neighbours_move_one_matrix_by_one_index() -> None:
    fit = fitted(level(), 0.0, 9_000_000)
    for beside, sign in ((fit.coarser, 1), (fit.finer, -1)):
        moved = {n: beside.steps[n] - i for n, i in fit.chosen.steps.items()
                 if beside.steps[n] != i}  # fmt: skip
        assert list(moved.values()) == [sign]
        assert (beside.size - fit.chosen.size) * sign < 0
        assert (beside.loss - fit.chosen.loss) * sign > 0


def test_ratios_of_steps_are_those_asked_for() -> None:
    d = level()
    fit = fitted(d, 0.0, 9_000_000)
    off = [index - (fit.chosen.level + d.offsets[n]) for n, index in fit.chosen.steps.items()]
    assert max(map(abs, off)) <= 0.5 + 1e-9


def test_the_finest_steps_may_leave_bytes_unused() -> None:
    d = level()
    finest = size_of(d.finest)
    fit = fitted(d, 0.0, 2 * finest)
    assert fit.chosen.size == finest and not fit.full and fit.finer is None


def test_what_no_step_makes_small_enough() -> None:
    with pytest.raises(BudgetError, match="too large even with the coarsest steps"):
        fitted(level(), 0.0, 10_000)


def test_sizes_with_a_jump_still_fit() -> None:
    def jumping(steps) -> int:
        size = size_of(steps)
        return size + 2_000_000 if size > 8_800_000 else size

    fit = fitted(level(), 0.0, 9_000_000, jumping)
    assert fit.chosen.size <= 8_800_000 and not fit.full
    assert fit.chosen.size > 8_700_000 and fit.probes <= PROBES


def test_one_matrix_alone_comes_as_near_as_the_grid_allows() -> None:
    alone = WaterLevel({"m0": 1.0}, {"m0": 2.0**-10})
    fit = fitted(alone, 0.0, 100_000)
    index = fit.chosen.steps["m0"]
    assert size_of({"m0": index}) <= 100_000 < size_of({"m0": index - 1})


def test_neighbours_of_a_setting_that_the_finest_steps_hold_back() -> None:
    d = WaterLevel({"a": 1.0, "b": 1.0}, {"a": 2.0**-4, "b": 2.0**-8})
    at = -100.0  # a is held at -64, 36 indices above where the level would have it
    assert d.at(at) == {"a": -64, "b": -100}
    assert d.at(d.next(at, +1)) == {"a": -64, "b": -99}
    assert d.at(d.next(at, -1)) == {"a": -64, "b": -101}

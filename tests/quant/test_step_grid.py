"""The geometric grid of steps: nearest, covering, and what lies outside."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf.quant.step_grid import (
    HIGHEST,
    LEAST_STEP,
    LOWEST,
    covering_index,
    exact_index,
    nearest_index,
    snap,
    step_values,
)

ALL = torch.arange(LOWEST, HIGHEST + 1)


def test_every_step_is_its_own_and_close_to_its_power_of_two():
    steps = step_values(ALL)
    assert torch.equal(exact_index(steps), ALL)
    assert torch.equal(covering_index(steps), ALL)
    torch.testing.assert_close(steps.double(), 2 ** (ALL.double() / 16), rtol=2.0**-11, atol=0)
    assert exact_index(torch.tensor([1.0, 1.001]).half()) is None


@given(st.floats(2.0**-14, 60000))
def test_nearest_and_covering(step: float):
    x = torch.tensor([step], dtype=torch.float64)
    near, above = nearest_index(x), covering_index(x)
    ratio = (step_values(near).double() / x).log2().abs()
    assert ratio <= 1 / 32 + 1e-3
    assert step_values(above).double() >= x * (1 - 2.0**-11)
    assert above == LOWEST or step_values(above - 1).double() < x


def test_snap_leaves_what_is_below_the_grid():
    x = torch.tensor([0.0, LEAST_STEP / 2, LEAST_STEP, 1.03])
    assert torch.equal(snap(x)[:3], x[:3]) and snap(x)[3] == step_values(torch.tensor(1)).float()
    assert snap(x, covering_index)[3] == step_values(torch.tensor(1)).float()

"""Ticks cover the data, are round, and read differently from each other."""

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from pgolf.report.axis import make_axis

VALUES = st.lists(st.floats(-1e299, 1e299), min_size=1, max_size=20)
COUNTS = st.integers(5, 10)


def is_round(step: Fraction) -> bool:
    """Whether a step is 1, 2 or 5 times a power of ten."""
    while step >= 10:
        step /= 10
    while step < 1:
        step *= 10
    return step in (1, 2, 5)


@given(VALUES, COUNTS)
def test_covering_axis_holds_all_values_between_its_outer_ticks(values, count):
    axis = make_axis(values, count)
    # A range of values below 1e-280 in size is taken for 0.
    assert axis.lo - 1e-280 <= min(values) and max(values) <= axis.hi + 1e-280
    slack = 1e-5 * (axis.hi - axis.lo)
    assert axis.ticks[0] <= min(values) + slack and axis.ticks[-1] >= max(values) - slack
    assert all(0 <= axis.share(v) <= 1 for v in values)


@given(VALUES, COUNTS, st.booleans(), st.booleans())
def test_ticks_rise_by_one_round_step_and_stay_few(values, count, zero, cover):
    axis = make_axis(values, count, zero=zero, cover=cover)
    # As decimals: the difference of two ticks must be round exactly, not up to rounding.
    exact = [Fraction(str(t)) for t in axis.ticks]
    steps = {b - a for a, b in zip(exact, exact[1:], strict=False)}
    assert len(steps) == 1 and is_round(steps.pop())
    assert 2 <= len(axis.ticks) <= count + 2
    assert all(math.isfinite(t) for t in axis.ticks)


@given(VALUES, COUNTS, st.booleans(), st.booleans(), st.booleans())
def test_labels_are_distinct_and_in_step(values, count, zero, cover, short):
    axis = make_axis(values, count, zero=zero, cover=cover, short=short)
    assert len(axis.labels) == len(axis.ticks) == len(set(axis.labels))
    units = {"k": 1e3, "M": 1e6, "B": 1e9}
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        digits, _, unit = label.partition(" ")
        assert float(digits) * units.get(unit, 1) == approx(tick, rel=1e-6, abs=1e-290)


@given(st.lists(st.floats(0, 1e299), max_size=20), COUNTS)
def test_an_axis_from_zero_ends_where_the_values_end(values, count):
    axis = make_axis(values, count, zero=True, cover=False)
    assert axis.lo == 0 == axis.ticks[0]
    if max(values, default=0) > 1e-270:
        assert axis.hi == max(values)
        assert axis.share(max(values)) == 1


def test_known_axes():
    assert make_axis([6.9, 2.3]).ticks == (2, 3, 4, 5, 6, 7)
    assert make_axis([0.1, 0.3]).labels == ("0.10", "0.15", "0.20", "0.25", "0.30")
    assert make_axis([737280], zero=True, cover=False, short=True).labels == (
        "0", "200 k", "400 k", "600 k")
    assert make_axis([5.5e9], zero=True, cover=False, short=True).labels == ("0", "2 B", "4 B")
    assert make_axis([2_500_000], zero=True, cover=False, short=True).labels[1] == "0.5 M"
    assert make_axis([]).ticks[0] == 0
    flat = make_axis([0.95])
    assert flat.lo < 0.95 < flat.hi

"""p-values against tables, closed forms and published examples."""

import math

import pytest

from pgolf.report.t_test import incomplete_beta, t_test, two_sided


@pytest.mark.parametrize(
    ("freedom", "t", "p"),
    [  # Student's table
        (1, 12.706205, 0.05), (2, 4.302653, 0.05), (4, 2.776445, 0.05), (10, 2.228139, 0.05),
        (30, 2.042272, 0.05), (120, 1.979930, 0.05), (4, 4.604095, 0.01), (10, 3.169273, 0.01),
        (2, 9.924843, 0.01), (5, 6.868827, 0.001), (1e9, 1.959964, 0.05),
    ],
)  # fmt: skip
def test_table(freedom, t, p):
    assert two_sided(t, freedom) == two_sided(-t, freedom) == pytest.approx(p, rel=2e-6)


@pytest.mark.parametrize("t", [0.0, 1e-8, 0.1, 1.0, 3.0, 50.0, 1e6])
def test_closed_forms(t):
    """One, two and three degrees of freedom."""
    assert two_sided(t, 1) == pytest.approx(2 * math.atan2(1, t) / math.pi, rel=1e-12)
    root = math.sqrt(2 + t * t)
    assert two_sided(t, 2) == pytest.approx(2 / (root * (root + t)), rel=1e-12)
    angle = math.atan(t / math.sqrt(3))
    exact = 1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle))
    assert two_sided(t, 3) == pytest.approx(exact, rel=1e-12, abs=1e-15)


def test_incomplete_beta():
    assert incomplete_beta(2, 3, 0.5) == pytest.approx(11 / 16, rel=1e-14)
    assert incomplete_beta(0.5, 0.5, 0.25) == pytest.approx(1 / 3, rel=1e-14)
    assert (incomplete_beta(2, 3, 0.0), incomplete_beta(2, 3, 1.0)) == (0.0, 1.0)


def test_one_sample():
    result = t_test([5.1, 4.9, 5.6, 5.8, 5.2], [5.0])
    assert result.name == "one-sample" and result.freedom == 4
    assert result.difference == pytest.approx(0.32)
    # squares of 0.548 around the mean
    assert result.t == pytest.approx(0.32 / math.sqrt(0.548 / 20), rel=1e-9)
    assert result.p == pytest.approx(two_sided(result.t, 4))


def test_welch():
    result = t_test([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0])
    assert (result.name, result.difference) == ("Welch", -3.0)
    # squared standard errors 1/3 and 5/3
    assert result.t == pytest.approx(-3 / math.sqrt(2))
    assert result.freedom == pytest.approx(4 / (1 / 9 / 2 + 25 / 9 / 3))
    assert result.p == pytest.approx(integrated(result.t, result.freedom), rel=1e-9)


def integrated(t: float, freedom: float) -> float:
    """The two tails of Student's density, by Simpson's rule over u = atan(x / sqrt(freedom))."""
    # there the density is cos(u)^(freedom - 1), up to a factor
    count, start = 4000, math.atan(abs(t) / math.sqrt(freedom))
    width = (math.pi / 2 - start) / count

    def density(i: int) -> float:
        return max(math.cos(start + i * width), 0.0) ** (freedom - 1)

    inner = sum((4 if i % 2 else 2) * density(i) for i in range(1, count))
    tail = (density(0) + inner + density(count)) * width / 3
    half = math.sqrt(math.pi) / 2 * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2)
    return tail / half


def test_no_spread():
    """Then any difference is certain, and none is none."""
    assert t_test([2.0, 2.0], [1.5]).p == 0.0 and t_test([2.0, 2.0], [1.5]).t == math.inf
    assert t_test([2.0, 2.0], [2.5, 2.5]).t == -math.inf
    assert t_test([2.0, 2.0], [2.0, 2.0]).p == 1.0

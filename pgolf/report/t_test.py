"""Student's and Welch's t-tests of a few scores, with p by the incomplete beta function.

Welch 1947, Biometrika 34; the continued fraction: Abramowitz and Stegun 26.5.8, by Lentz's method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

SMALLEST = 1e-300  # in place of 0 in a denominator of the continued fraction


@dataclass(frozen=True)
class TTest:
    """Whether the mean of some numbers differs from another.

    Attributes:
        name: of the test.
        difference: of the means, the first less the other.
        t: that difference in standard errors; infinite if they are 0 and it is not.
        freedom: degrees of it.
        p: probability of such a difference, in either direction, where there is none.
    """

    name: str
    difference: float
    t: float
    freedom: float
    p: float


def t_test(numbers: Sequence[float], against: Sequence[float]) -> TTest:
    """Student's one-sample test against a single number, Welch's against several.

    Args:
        numbers: two or more.
    """
    difference = fmean(numbers) - fmean(against)
    squared, freedom, name = variance(numbers) / len(numbers), len(numbers) - 1.0, "one-sample"
    if len(against) > 1:
        other, name = variance(against) / len(against), "Welch"
        shares = squared**2 / freedom + other**2 / (len(against) - 1)
        squared += other
        freedom = squared**2 / shares if shares else freedom
    if squared:
        t = difference / math.sqrt(squared)
    else:
        t = math.copysign(math.inf, difference) if difference else 0.0
    return TTest(name, difference, t, freedom, two_sided(t, freedom))


def two_sided(t: float, freedom: float) -> float:
    """The probability that |T| >= |t| for T of Student's distribution."""
    if math.isinf(t):
        return 0.0
    if t * t < freedom:  # the other argument would round to 1
        return 1.0 - incomplete_beta(0.5, freedom / 2, t * t / (freedom + t * t))
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), to about 1e-14; a, b > 0, x in [0, 1]."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x)
    return math.exp(log + b * math.log1p(-x)) / (a * _fraction(a, b, x))


def _fraction(a: float, b: float, x: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), from the top down."""
    value = numerator = 1.0
    reciprocal = 0.0
    for n in range(1, 1000):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        reciprocal = 1.0 / (1.0 + term * reciprocal or SMALLEST)
        numerator = 1.0 + term / numerator or SMALLEST
        value *= numerator * reciprocal
        if abs(numerator * reciprocal - 1.0) < 1e-15:
            break
    return value

"""Axes: round tick values that cover the data, and their labels.

A tick is an integer times 1, 2 or 5 times a power of ten, written as that decimal number, so that
no tick reads 0.30000000000000004.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Below this share of the values' size, or below this size, a range is taken for a single value.
_FLAT, _TINY = 1e-6, 1e-280


@dataclass(frozen=True)
class Axis:
    """A linear scale from `lo` to `hi` with its ticks and their labels."""

    lo: float
    hi: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def share(self, value: float) -> float:
        """Where `value` lies: 0 at `lo`, 1 at `hi`, kept inside the axis."""
        return min(max((value - self.lo) / (self.hi - self.lo), 0.0), 1.0)


def _widened(lo: float, hi: float) -> tuple[float, float]:
    """A range of a single value, opened so that the value lies inside."""
    size = max(abs(lo), abs(hi))
    if size < _TINY:
        return 0.0, 1.0
    return (lo, hi) if hi - lo > _FLAT * size else (lo - size / 50, hi + size / 50)


def _step(span: float, count: int) -> tuple[int, int]:
    """Mantissa m and exponent k of the smallest step m * 10**k that cuts `span` in <= `count`."""
    exponent = math.floor(math.log10(span / count)) - 1
    while True:
        for mantissa in (1, 2, 5):
            if float(f"{mantissa}e{exponent}") * count >= span:
                return mantissa, exponent
        exponent += 1


def _labels(ticks: list[float], exponent: int, short: bool) -> list[str]:
    """Labels with as many decimals as the step needs; `short` counts in k, M or B."""
    largest = max(abs(t) for t in ticks)
    unit, shift = "", 0
    if short:
        for unit, shift in (("B", 9), ("M", 6), ("k", 3), ("", 0)):  # noqa: B007
            if largest >= 10**shift:
                break
    places = max(0, shift - exponent)
    if places > 6 or largest >= 10 ** (shift + 6):
        return [f"{t:.9g}" for t in ticks]
    # Adding 0.0 turns -0.0 into 0.0.
    return [f"{t / 10**shift + 0.0:.{places}f}{f' {unit}' if unit and t else ''}" for t in ticks]


def make_axis(
    values: Iterable[float], count: int = 5, zero: bool = False, cover: bool = True,
    short: bool = False,
) -> Axis:
    """An axis for finite values below 1e300 in size.

    Args:
        values: what the axis shows; none gives 0 to 1.
        count: about how many steps between ticks, at least 3 (5 if not `zero` and not `cover`,
            else there may be a single tick).
        zero: whether the axis begins at 0; values below it count as 0.
        cover: whether the axis ends on ticks; otherwise it ends where the values end.
        short: whether ticks are labelled as 250 k instead of 250000.
    """
    found = [0.0, *(max(v, 0.0) for v in values)] if zero else [*values] or [0.0]
    lo, hi = _widened(min(found), max(found))
    mantissa, exponent = _step(hi - lo, count)
    step = float(f"{mantissa}e{exponent}")
    # The margin keeps a value that is a tick up to rounding from asking for one more tick.
    first, last = math.floor(lo / step + 1e-6), math.ceil(hi / step - 1e-6)
    if not cover:
        first, last = math.ceil(lo / step - 1e-6), math.floor(hi / step + 1e-6)
    ticks = [float(f"{i * mantissa}e{exponent}") for i in range(first, last + 1)]
    if cover:
        lo, hi = min(lo, ticks[0]), max(hi, ticks[-1])
    return Axis(lo, hi, tuple(ticks), tuple(_labels(ticks, exponent, short)))

"""Filling a byte budget: one dial sets the steps of all matrices.

Rounding matrix t with step s costs about c_t s² in loss, and n_t log2(1/s) bits. Both together are
least where a further bit buys the same everywhere, that is where every s_t is one number over
sqrt(c_t / n_t) (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3).
So the search has one unknown, and the size is what the codec really writes.

Steps lie on the grid of `steps`, 16 to the octave. Matrices pass from one to the next at different
places of the dial, which therefore moves the size in parts of a few kB.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pgolf.errors import BudgetError
from pgolf.progress import Progress
from pgolf.quant.steps import HIGHEST, LOWEST, PER_OCTAVE

PROBES = 12
WINDOW = 320  # the size may end up to 1/320 under the budget: 50,000 of 16,000,000 bytes


@dataclass(frozen=True)
class Probe:
    """A setting that was tried.

    Attributes:
        dial: the setting.
        steps: index of each matrix's step.
        size: bytes.
        loss: expected, in nats a token.
    """

    dial: float
    steps: dict[str, int]
    size: int
    loss: float


@dataclass(frozen=True)
class Fit:
    """What was chosen, and the choices beside it.

    Attributes:
        chosen: the finest setting found whose size is within the budget.
        cheaper: with one matrix's step coarser by one index, or None at the end of the grid.
        dearer: with one matrix's step finer.
        probes: how many settings were measured to get there.
        full: whether the size is in the window under the budget; False where even the finest
            steps leave room, or no setting is nearer.
    """

    chosen: Probe
    cheaper: Probe | None
    dearer: Probe | None
    probes: int
    full: bool


class Dial:
    """Step indices of all matrices as a function of one number, in indices.

    Args:
        relative: step of each matrix at dial 0, up to one common factor.
        finest: least step of each matrix.
    """

    def __init__(self, relative: Mapping[str, float], finest: Mapping[str, float]):
        self.offsets = {n: PER_OCTAVE * math.log2(step) for n, step in relative.items()}
        self.finest = {n: self._bound(math.ceil(PER_OCTAVE * math.log2(s)))
                       for n, s in finest.items()}  # fmt: skip

    @staticmethod
    def _bound(index: int) -> int:
        return min(max(index, LOWEST), HIGHEST)

    def at(self, dial: float) -> dict[str, int]:
        """Index of each matrix's step."""
        return {
            name: max(self._bound(math.floor(dial + offset + 0.5)), self.finest[name])
            for name, offset in self.offsets.items()
        }

    def lowest(self) -> float:
        """Where every matrix has its finest step."""
        return min(self.finest[name] - offset for name, offset in self.offsets.items()) - 1

    def highest(self) -> float:
        """Where every matrix has the coarsest step of the grid."""
        return max(HIGHEST - offset for offset in self.offsets.values()) + 1

    def next(self, dial: float, direction: int) -> float | None:
        """The nearest setting with other steps, coarser (1) or finer (-1); None at the end."""
        here = self.at(dial)
        borders = [
            here[name] + 0.5 * direction - offset
            for name, offset in self.offsets.items()
            if (here[name] < HIGHEST if direction > 0 else here[name] > self.finest[name])
        ]
        if not borders:
            return None
        # A border itself rounds up: just behind it, on either side.
        border = min(borders) if direction > 0 else max(borders)
        return border + direction * 1e-6


def fit(
    dial: Dial,
    start: float,
    weights: int,
    budget: int,
    measure: Callable[[Mapping[str, int]], tuple[int, float]],
    progress: bool = True,
) -> Fit:
    """Turn the dial until the size is within the budget and at most 1/320 of it below.

    Args:
        start: where to begin.
        weights: how many weights the dial moves: an index is worth a 16th of a bit of each.
        budget: bytes that `measure` may give.
        measure: step indices -> size in bytes, and expected loss in nats a token.

    Raises:
        BudgetError: with the coarsest steps it is larger still.
    """
    with Progress("fitting the budget", PROBES + 2, "probes", enabled=progress) as bar:

        def probe(at: float) -> Probe:
            steps = dial.at(at)
            size, loss = measure(steps)
            bar.update(note=f"{size:,} bytes, {size - budget:+,}")
            return Probe(at, steps, size, loss)

        best, probes = _search(dial, start, weights / 8 / PER_OCTAVE, budget, probe)
        beside = (dial.next(best.dial, +1), dial.next(best.dial, -1))
        cheaper, dearer = (None if at is None else probe(at) for at in beside)
    return Fit(best, cheaper, dearer, probes, best.size >= _least(budget))


def _least(budget: int) -> int:
    return budget - budget // WINDOW


def _search(
    dial: Dial, start: float, slope: float, budget: int, probe: Callable[[float], Probe]
) -> tuple[Probe, int]:
    """The finest probe that fits, and how many there were; `slope` in bytes an index."""
    lowest, highest = dial.lowest(), dial.highest()
    target = budget - (budget - _least(budget)) / 3
    fits = exceeds = None
    at = min(max(start, lowest), highest)
    count = 0
    while count < PROBES:
        found, count = probe(at), count + 1
        if found.size > budget:
            exceeds = found
            if at == highest:
                raise BudgetError(
                    f"{found.size - budget:,} bytes too large even with the coarsest steps: use "
                    "a smaller model or a larger budget_bytes",
                    found.size - budget,
                )
        else:
            fits = found
            if found.size >= _least(budget) or at == lowest:
                break
        # Further each time: at low rates a step of the dial saves ever less.
        stride = 2.0 ** (count - 1) * (found.size - target) / slope
        at = min(max(at + stride, lowest), highest)
        if fits and exceeds:
            share = (exceeds.size - target) / (exceeds.size - fits.size)
            share = min(max(share, 0.02), 0.98)
            at = exceeds.dial + share * (fits.dial - exceeds.dial)
            if dial.at(at) in (fits.steps, exceeds.steps):
                at = dial.next(exceeds.dial, +1)
                if dial.at(at) == fits.steps:
                    break  # nothing lies between
    if fits is None:
        raise BudgetError(
            f"no setting within {budget:,} bytes in {count} probes", exceeds.size - budget
        )
    return fits, count

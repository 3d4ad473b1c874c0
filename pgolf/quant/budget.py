"""Quantising all matrices of a model to a byte budget: one level sets the steps of all of them.

The expected loss of storing W as W + E is, to second order and in nats a token,

    1/2 sum_r m_r (E H Eᵀ)_rr

with the Hessian H of the inputs and the moments m of the outputs' gradients (`hessians`): a unit
that can be compared between matrices. On a uniform grid with column steps proportional to the
Cholesky diagonal U and row steps to 1/sqrt(m) (`gptq_uniform`), every term is m s²/12 C / g²,
with the geometric means m of the moments and g of U's diagonal: the best steps are in proportion
to g / sqrt(m).

Rounding matrix t with step s costs about c_t s² in loss, and n_t log2(1/s) bits. Both together are
least where a further bit buys the same everywhere, that is where every s_t is one number over
sqrt(c_t / n_t) (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3).
So the search has one unknown, the water level, and the size is what the codec really writes.

Steps lie on the grid of `step_grid`, 16 to the octave. Matrices pass from one to the next at
different levels, which therefore move the size in parts of a few kB.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import QuantConfig
from pgolf.errors import BudgetError, ConfigError
from pgolf.progress import Progress
from pgolf.quant.gptq import Factors
from pgolf.quant.gptq_uniform import LARGEST
from pgolf.quant.hessians import Calibration
from pgolf.quant.plan import plan_tensors
from pgolf.quant.quantize import QuantizedModel, quantize, row_factors
from pgolf.quant.step_grid import HIGHEST, LOWEST, PER_OCTAVE, step_values
from pgolf.ranks import ALONE, Ranks

PROBES = 12
WINDOW = 320  # the size may end up to 1/320 under the budget: 50,000 of 16,000,000 bytes


@dataclass(frozen=True)
class Probe:
    """A setting that was tried.

    Attributes:
        level: the setting.
        steps: index of each matrix's step.
        size: bytes.
        loss: expected, in nats a token.
    """

    level: float
    steps: dict[str, int]
    size: int
    loss: float


@dataclass(frozen=True)
class Fit:
    """What was chosen, and the choices beside it.

    Attributes:
        chosen: the finest setting tried whose size is within the budget.
        coarser: with one matrix's step coarser by one index, or None at the end of the grid.
        finer: with one matrix's step finer.
        probes: how many settings were measured to get there.
        full: whether the size is in the window under the budget; False if even the finest steps
            leave bytes unused, or no setting is nearer.
    """

    chosen: Probe
    coarser: Probe | None
    finer: Probe | None
    probes: int
    full: bool


class WaterLevel:
    """Step indices of all matrices as a function of one number, in indices.

    Args:
        relative: step of each matrix at level 0, up to one common factor.
        finest: least step of each matrix.
    """

    def __init__(self, relative: Mapping[str, float], finest: Mapping[str, float]):
        self.offsets = {n: PER_OCTAVE * math.log2(step) for n, step in relative.items()}
        self.finest = {n: self._bound(math.ceil(PER_OCTAVE * math.log2(s)))
                       for n, s in finest.items()}  # fmt: skip

    @staticmethod
    def _bound(index: int) -> int:
        return min(max(index, LOWEST), HIGHEST)

    def at(self, level: float) -> dict[str, int]:
        """Index of each matrix's step."""
        return {
            name: max(self._bound(math.floor(level + offset + 0.5)), self.finest[name])
            for name, offset in self.offsets.items()
        }

    def lowest(self) -> float:
        """Where every matrix has its finest step."""
        return min(self.finest[name] - offset for name, offset in self.offsets.items()) - 1

    def highest(self) -> float:
        """Where every matrix has the coarsest step of the grid."""
        return max(HIGHEST - offset for offset in self.offsets.values()) + 1

    def next(self, level: float, direction: int) -> float | None:
        """The nearest setting with other steps, coarser (1) or finer (-1); None at the end."""
        here = self.at(level)
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
    level: WaterLevel,
    start: float,
    weights: int,
    budget: int,
    measure: Callable[[Mapping[str, int]], tuple[int, float]],
    progress: bool = True,
) -> Fit:
    """Move the level until the size is within the budget and at most 1/320 of it below.

    Args:
        start: where to begin.
        weights: how many weights the level moves: an index is worth a 16th of a bit of each.
        budget: bytes that `measure` may give.
        measure: step indices -> size in bytes, and expected loss in nats a token.

    Raises:
        BudgetError: with the coarsest steps it is larger still.
    """
    with Progress("fitting the budget", PROBES + 2, "probes", enabled=progress) as bar:

        def probe(at: float) -> Probe:
            steps = level.at(at)
            size, loss = measure(steps)
            bar.update(note=f"{size:,} bytes, {size - budget:+,}")
            return Probe(at, steps, size, loss)

        best, probes = _search(level, start, weights / 8 / PER_OCTAVE, budget, probe)
        beside = (level.next(best.level, +1), level.next(best.level, -1))
        coarser, finer = (None if at is None else probe(at) for at in beside)
    return Fit(best, coarser, finer, probes, best.size >= _least(budget))


def _least(budget: int) -> int:
    return budget - budget // WINDOW


def _search(
    level: WaterLevel, start: float, slope: float, budget: int, probe: Callable[[float], Probe]
) -> tuple[Probe, int]:
    """The finest probe that fits, and how many there were; `slope` in bytes an index."""
    lowest, highest = level.lowest(), level.highest()
    target = budget - (budget - _least(budget)) / 3
    # First a bracket: each probe moves the level by what its excess is worth at `slope`, times 2,
    # 4, 8 ..., because at low rates an index saves ever fewer bytes. Once a probe fits and one
    # exceeds, the next lies on the line between them, aimed a third of the window below the budget
    # and not too near an end. Levels between the same two borders have the same steps: where that
    # would repeat a probe, the next border behind the probe that exceeds is taken.
    fits = exceeds = None
    at = min(max(start, lowest), highest)
    count = 0
    while count < PROBES:
        result, count = probe(at), count + 1
        if result.size > budget:
            exceeds = result
            if at == highest:
                raise BudgetError(
                    f"{result.size - budget:,} bytes too large even with the coarsest steps: use "
                    "a smaller model or a larger budget_bytes",
                    result.size - budget,
                )
        else:
            fits = result
            if result.size >= _least(budget) or at == lowest:
                break
        stride = 2.0 ** (count - 1) * (result.size - target) / slope
        at = min(max(at + stride, lowest), highest)
        if fits and exceeds:
            share = (exceeds.size - target) / (exceeds.size - fits.size)
            share = min(max(share, 0.02), 0.98)
            at = exceeds.level + share * (fits.level - exceeds.level)
            if level.at(at) in (fits.steps, exceeds.steps):
                at = level.next(exceeds.level, +1)
                if level.at(at) == fits.steps:
                    break  # nothing lies between
    if fits is None:
        raise BudgetError(
            f"no setting within {budget:,} bytes in {count} probes", exceeds.size - budget
        )
    return fits, count


def expected_loss(model: QuantizedModel) -> float:
    """Nats a token that the model's quantisation is expected to cost, where that is known."""
    return sum(stats.loss or 0.0 for stats in model.stats.values())


class Steps:
    """Models by the step index of their matrices; a matrix is quantised when its step changes.

    Args:
        state: parameters by name.
        factors: of all matrices that the level moves; others are quantised once.
        ranks: that work together.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: QuantConfig,
        statistics: Calibration,
        factors: Factors,
        ranks: Ranks = ALONE,
    ):
        self.state, self.config, self.moments = state, config, statistics.moments
        self.held_out = statistics.held_out
        self.factors, self.ranks = factors, ranks
        plans = plan_tensors(config, {name: tuple(w.shape) for name, w in state.items()})
        rms = {n: w.float().square().mean().sqrt().item() for n, w in state.items()}
        self.names = [
            n
            for n, plan in plans.items()
            if plan.clip == "uniform" and rms[n] and factors.get(n) is not None
        ]
        self.known: dict[str, int] = {}
        self.model: QuantizedModel | None = None

        nominal = {n: rms[n] * plans[n].relative_step for n in self.names}
        relative = {n: self._relative(n) or nominal[n] for n in self.names}
        self.level = WaterLevel(relative, {n: config.width * rms[n] / LARGEST for n in self.names})
        self.weights = sum(state[n].numel() for n in self.names)
        # Where the mean over weights of log2(step) is that of the plan's steps.
        logs = (state[n].numel() * math.log2(nominal[n] / relative[n]) for n in self.names)
        self.nominal = PER_OCTAVE * sum(logs) / max(self.weights, 1)
        if ranks.world > 1:
            # Factors may differ in their last bits from rank to rank, and then the jobs would too.
            box = [(self.names, self.level.offsets, self.level.finest, self.nominal)]
            dist.broadcast_object_list(box, 0)
            self.names, self.level.offsets, self.level.finest, self.nominal = box[0]

    def _relative(self, name: str) -> float:
        """The best step up to a common factor; 0 where nothing depends on the matrix."""
        spread = self.factors[name].upper.diagonal().double().log().mean().exp().item()
        moment = row_factors(self.moments[name], self.config.damping)[1]
        return spread / math.sqrt(moment) if moment else 0.0

    def at(self, steps: Mapping[str, int], progress: bool = False) -> QuantizedModel:
        """The model with these step indices."""
        changed = {n for n, index in steps.items() if self.known.get(n) != index}
        values = {n: step_values(torch.tensor(steps[n])).item() for n in changed}
        part = quantize(
            self.state, self.config, progress, self.factors, self.moments, values, self.ranks,
            None if self.model is None else changed, self.held_out,
        )  # fmt: skip
        if self.model is None:
            self.model = part
        else:
            self.model = QuantizedModel(
                self.model.tensors | part.tensors, self.model.plans, self.model.stats | part.stats
            )
        self.known |= dict(steps)
        return self.model


def fill_budget(
    steps: Steps, budget: int, size: Callable[[QuantizedModel], int], progress: bool = True
) -> tuple[QuantizedModel, Fit]:
    """The model whose size is just within the budget, and the fit that led to it.

    Args:
        size: bytes of a model after the real codec, the same on every rank.

    Raises:
        BudgetError: it does not fit with the coarsest steps.
        ConfigError: no matrix has a step.
    """
    if not steps.names:
        raise ConfigError(
            "fit_to_budget=true: no matrix has a step to choose, all are stored as fp16 or are "
            "zero: lower small_numel, or give them bits"
        )

    def measure(indices: Mapping[str, int]) -> tuple[int, float]:
        model = steps.at(indices)
        return size(model), expected_loss(model)

    fitted = fit(steps.level, steps.nominal, steps.weights, budget, measure, progress)
    return steps.at(fitted.chosen.steps), fitted


def fit_lines(fitted: Fit, budget: int) -> list[str]:
    """The fit as lines for people: the choice and its neighbours."""
    size, loss = fitted.chosen.size, fitted.chosen.loss
    lines = [
        f"steps fitted with {fitted.probes} probes: {size:,} bytes, {budget - size:,} below the "
        f"{budget:,} that code leaves; expected to add {loss:.5f} nats a token"
    ]
    if not fitted.full:
        lines.append("  finer steps than these are not offered, or are too large")
    for word, probe in (("coarser", fitted.coarser), ("finer", fitted.finer)):
        if probe is not None:
            name = next(n for n, i in probe.steps.items() if i != fitted.chosen.steps[n])
            lines.append(
                f"  next {word}: {name}, {probe.size - size:+,} bytes, "
                f"{probe.loss - loss:+.2e} nats a token"
            )
    return lines

"""Quantising all matrices of a model to a byte budget: what `fit` turns the dial of.

The expected loss of storing W as W + E is, to second order and in nats a token,

    1/2 sum_r m_r (E H Eᵀ)_rr

with the Hessian H of the inputs and the moments m of the outputs' gradients (`hessians`): a unit
that can be compared between matrices. On a uniform grid with column steps proportional to the
Cholesky diagonal U and row steps to 1/sqrt(m) (`uniform`), every term is m s²/12 C / g², with the
geometric means m of the moments and g of U's diagonal: the best steps are in proportion to
g / sqrt(m).
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import QuantConfig
from pgolf.errors import ConfigError
from pgolf.quant.fit import Dial, Fit, fit
from pgolf.quant.gptq import Factors
from pgolf.quant.hessians import Calibration
from pgolf.quant.policy import plan
from pgolf.quant.quantize import QuantizedModel, quantize, row_factors
from pgolf.quant.steps import PER_OCTAVE, step_values
from pgolf.quant.uniform import LARGEST


def expected_loss(model: QuantizedModel) -> float:
    """Nats a token that the model's quantisation is expected to cost, where that is known."""
    return sum(stats.loss or 0.0 for stats in model.stats.values())


class Steps:
    """Models by the step index of their matrices; a matrix is quantised when its step changes.

    Args:
        state: parameters by name.
        factors: of all matrices that the dial moves; others are quantised once.
        share: (rank, world) of the ranks that work together.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: QuantConfig,
        statistics: Calibration,
        factors: Factors,
        share: tuple[int, int] = (0, 1),
    ):
        self.state, self.config, self.moments = state, config, statistics.moments
        self.held_out = statistics.held_out
        self.factors, self.share = factors, share
        plans = plan(config, {name: tuple(w.shape) for name, w in state.items()})
        rms = {n: w.float().square().mean().sqrt().item() for n, w in state.items()}
        self.names = [
            n
            for n, how in plans.items()
            if how.clip == "uniform" and rms[n] and factors.get(n) is not None
        ]
        self.known: dict[str, int] = {}
        self.model: QuantizedModel | None = None

        nominal = {n: rms[n] * plans[n].relative_step for n in self.names}
        relative = {n: self._relative(n) or nominal[n] for n in self.names}
        self.dial = Dial(relative, {n: config.width * rms[n] / LARGEST for n in self.names})
        self.weights = sum(state[n].numel() for n in self.names)
        # Where the mean over weights of log2(step) is that of the policy's steps.
        logs = (state[n].numel() * math.log2(nominal[n] / relative[n]) for n in self.names)
        self.nominal = PER_OCTAVE * sum(logs) / max(self.weights, 1)
        if share[1] > 1:
            # Factors may differ in their last bits from rank to rank, and then the jobs would too.
            box = [(self.names, self.dial.offsets, self.dial.finest, self.nominal)]
            dist.broadcast_object_list(box, 0)
            self.names, self.dial.offsets, self.dial.finest, self.nominal = box[0]

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
            self.state, self.config, progress, self.factors, self.moments, values, self.share,
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
    """The model whose size is just within the budget, and how it was found.

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

    found = fit(steps.dial, steps.nominal, steps.weights, budget, measure, progress)
    return steps.at(found.chosen.steps), found


def fit_lines(found: Fit, budget: int) -> list[str]:
    """What was chosen and what lies beside it, for people."""
    size, loss = found.chosen.size, found.chosen.loss
    lines = [
        f"steps fitted with {found.probes} probes: {size:,} bytes, {budget - size:,} below the "
        f"{budget:,} that code leaves; expected to add {loss:.5f} nats a token"
    ]
    if not found.full:
        lines.append("  finer steps than these are not offered, or are too large")
    for word, probe in (("cheaper", found.cheaper), ("dearer", found.dearer)):
        if probe is not None:
            name = next(n for n, i in probe.steps.items() if i != found.chosen.steps[n])
            lines.append(
                f"  next {word}: {name}, {probe.size - size:+,} bytes, "
                f"{probe.loss - loss:+.2e} nats a token"
            )
    return lines

"""Weights to stored tensors by the plan, with the error that this costs."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import QuantConfig
from pgolf.errors import ConfigError, TrainingError
from pgolf.ops.int_grid import row_step
from pgolf.progress import Progress
from pgolf.quant.clip_search import clip_factors, clip_of_step, quantize_rows, uniform_step
from pgolf.quant.dequantize import QuantizedTensor, dequantize
from pgolf.quant.gptq import Factor, Factors, in_order, row_errors, stacked
from pgolf.quant.gptq_rows import gptq_rows
from pgolf.quant.gptq_uniform import gptq_uniform, least_bits
from pgolf.quant.hessians import Calibration
from pgolf.quant.plan import TensorPlan, plan_tensors
from pgolf.quant.safeguard import expected_to_add, rounded_at_bits
from pgolf.quant.step_grid import snap
from pgolf.ranks import ALONE, Ranks

BATCH = 1 << 24  # weights that a batch of matrices has at most, each clip counted: 64 MB in fp32


@dataclass(frozen=True)
class TensorStats:
    """What quantising one tensor did.

    Attributes:
        relative_error: norm of the error as a share of the norm of the weights.
        floor_share: share of rows whose clip was below the floor.
        hessian_error: tr(E H Eᵀ) / tr(W H Wᵀ), E the error, by the Hessian H of the inputs; None
            where there is none.
        loss: what the error is expected to add to the loss, in nats a token: the second-order term
            tr(M E H Eᵀ) / 2 with the moments M of the outputs, of held-out text where there is
            some; None where they are not known.
        rounded: whether GPTQ did worse than rounding to nearest on held-out text; that is stored.
    """

    relative_error: float
    floor_share: float = 0.0
    hessian_error: float | None = None
    loss: float | None = None
    rounded: bool = False


@dataclass(frozen=True)
class QuantizedModel:
    """Stored tensors by name, in the order of the state dict, with their plans and errors."""

    tensors: dict[str, QuantizedTensor]
    plans: dict[str, TensorPlan]
    stats: dict[str, TensorStats]


def quantize(
    state: Mapping[str, Tensor],
    config: QuantConfig,
    progress: bool = True,
    factors: Factors | None = None,
    moments: Mapping[str, Tensor] | None = None,
    steps: Mapping[str, float] | None = None,
    ranks: Ranks = ALONE,
    only: Collection[str] | None = None,
    held_out: Calibration | None = None,
) -> QuantizedModel:
    """Quantise parameters on the device where they are; the result is on the CPU.

    Args:
        state: parameters by name (no buffers), of any float dtype.
        factors: of the Hessians of some of them, for quantizer=gptq; the others only have their
            clips searched.
        moments: (R,) mean squared gradients of the loss by the outputs of some of them: for
            grid=uniform, a row's step is then divided by the root of its moment, as a share of the
            geometric mean.
        steps: of some matrices, for grid=uniform; the others' follow from `width`. With moments,
            the geometric mean of its rows'.
        ranks: matrices are dealt out over them, and each gets the whole model.
        only: leave out all others; None takes all.
        held_out: statistics of text that is not that of `factors`: where GPTQ is worse by them than
            rounding to nearest at the same bits (`safeguard`), that is taken. None trusts GPTQ.

    Raises:
        TrainingError: a weight is not finite, or too large for fp16; names the tensor.
        ConfigError: the settings do not fit these tensors.
    """
    plans = plan_tensors(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    for name, tensor in state.items():
        _check(name, tensor, plans[name])
    for name in steps or ():
        if name not in plans or plans[name].clip != "uniform":
            raise ConfigError(f"steps: {name} is no matrix of grid=uniform: it has no one step")
    chosen = [name for name in state if only is None or name in only]
    weights = {name: state[name].detach().float() for name in chosen}
    work = _Work(weights, plans, config, factors or {}, moments or {}, steps or {}, held_out)
    own_jobs = _dealt_out(work.jobs(ranks.world), work.cost, ranks)
    done: dict[str, tuple[QuantizedTensor, TensorStats]] = {}
    with Progress("quantising", sum(map(len, own_jobs)), "tensors", enabled=progress) as bar:
        for names in own_jobs:
            done.update(work.run(names))
            bar.update(len(names), note=names[-1])
    if ranks.world > 1:
        parts = [done] * ranks.world
        dist.all_gather_object(parts, done)
        done = {name: result for part in parts for name, result in part.items()}
    tensors = {name: done[name][0] for name in chosen}
    return QuantizedModel(tensors, plans, {name: done[name][1] for name in chosen})


@dataclass(frozen=True)
class _Work:
    """What there is to quantise; the arguments of `quantize`, weights in fp32."""

    weights: Mapping[str, Tensor]
    plans: Mapping[str, TensorPlan]
    config: QuantConfig
    factors: Mapping[str, Factor | None]
    moments: Mapping[str, Tensor]
    steps: Mapping[str, float]
    held_out: Calibration | None = None

    def jobs(self, world: int) -> list[list[str]]:
        """Names by job: one tensor, or matrices that GPTQ takes together, but not all to a rank."""
        batches: dict[tuple, list[str]] = {}
        for name, w in self.weights.items():
            plan = dataclasses.replace(self.plans[name], reason="")
            batches.setdefault((w.shape, plan) if self._by_gptq(name) else (name,), []).append(name)
        jobs = []
        for names in batches.values():
            rows = self.plans[names[0]].clips * self.weights[names[0]].numel()
            count = max(min(BATCH // max(rows, 1), -(-len(names) // world)), 1)
            jobs += [names[i : i + count] for i in range(0, len(names), count)]
        return jobs

    def cost(self, names: Sequence[str]) -> float:
        """Multiplications of a job, nearly."""
        w = self.weights[names[0]]
        each = self.plans[names[0]].clips * w.size(1) if self._by_gptq(names[0]) else 1
        return float(len(names) * w.numel() * each)

    def run(self, names: Sequence[str]) -> dict[str, tuple[QuantizedTensor, TensorStats]]:
        """The stored tensors of a job and what quantising did to them."""
        whole = [n for n in names if self.plans[n].kind == "int"]
        factors = {n: self.factors.get(n) for n in whole}
        by_gptq = [n for n in whole if self._by_gptq(n) and factors[n] is not None]
        stored = {n: self._without_hessian(n) for n in names if n not in by_gptq}
        if by_gptq:
            w, plan = torch.stack([self.weights[n] for n in by_gptq]), self.plans[by_gptq[0]]
            factor = stacked([factors[n] for n in by_gptq], w.device)
            if plan.clip == "uniform":
                steps = torch.stack([self._row_steps(n) for n in by_gptq])
                matrices = gptq_uniform(w, factor, steps, self.config.rate_weight)
            else:
                matrices = gptq_rows(w, factor, plan)
            stored.update(zip(by_gptq, matrices, strict=True))
        return {n: self._judged(n, q, factors.get(n), n in by_gptq) for n, q in stored.items()}

    def _judged(
        self, name: str, q: QuantizedTensor, factor: Factor | None, by_gptq: bool
    ) -> tuple[QuantizedTensor, TensorStats]:
        """The better of q and rounding to nearest on held-out text, and what it does."""
        w, plan, rounded, added = self.weights[name], self.plans[name], False, None
        if self.held_out is not None and name in self.held_out.hessians:
            judge = self.held_out.hessians[name], self.held_out.moments[name]
            added = expected_to_add(w, q, *judge)
            other = self._rounded(name, q) if by_gptq else None
            if other is not None and (least := expected_to_add(w, other, *judge)) < added:
                q, added, rounded = other, least, True
        stats = tensor_stats(w, q, plan, factor, self.moments.get(name))
        if added is not None:
            stats = dataclasses.replace(stats, loss=added, rounded=rounded)
        return q, stats

    def _rounded(self, name: str, q: QuantizedTensor) -> QuantizedTensor | None:
        """The matrix rounded to nearest at the bits of q."""
        if self.plans[name].clip == "uniform":
            return rounded_at_bits(self.weights[name], q, self.plans[name])
        return self._without_hessian(name)

    def _by_gptq(self, name: str) -> bool:
        planned = self.config.quantizer == "gptq" and self.plans[name].kind == "int"
        return planned and name in self.factors

    def _row_steps(self, name: str) -> Tensor:
        """Steps (R,) of a matrix of grid=uniform, before any is made coarser to avoid a clip."""
        w = self.weights[name]
        if name in self.steps:
            step = torch.tensor(self.steps[name], device=w.device)
        else:
            step = uniform_step(w, self.plans[name].relative_step)
        if name not in self.moments:
            return snap(step.expand(w.size(0)))
        return snap(step * row_factors(self.moments[name].to(w.device), self.config.damping)[0])

    def _without_hessian(self, name: str) -> QuantizedTensor:
        w, plan = self.weights[name], self.plans[name]
        if plan.kind == "float16":
            return QuantizedTensor(w.to(torch.float16).cpu())
        if plan.clip != "uniform":
            codes, steps = quantize_rows(w, clip_factors(w, plan), plan)
            return QuantizedTensor(codes.cpu(), plan.bits, steps.cpu())
        codes, steps = quantize_rows(w, clip_of_step(self._row_steps(name), w, plan), plan)
        return QuantizedTensor(codes.cpu(), least_bits(codes), steps.cpu())


def row_factors(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """What the steps of rows with these moments (R,) are multiplied by: (R,), geometric mean 1.

    Also the moment that a row with factor 1 has; 0 where nothing depends on the matrix.
    """
    # As with a Hessian: what no calibration text happened to need is needed a little.
    moment = moment.double() + damping * moment.double().mean()
    if not bool(moment.min() > 0):
        return torch.ones_like(moment, dtype=torch.float32), 0.0
    log = moment.log()
    return ((log.mean() - log) / 2).exp().float(), log.mean().exp().item()


def _dealt_out(
    jobs: Sequence[list[str]], cost: Callable[[list[str]], float], ranks: Ranks
) -> list[list[str]]:
    """The jobs of a rank: the costliest first, each to the rank that has least to do."""
    load, own_jobs = [0.0] * ranks.world, []
    for names in sorted(jobs, key=cost, reverse=True):
        least = load.index(min(load))
        load[least] += cost(names)
        if least == ranks.rank:
            own_jobs.append(names)
    return own_jobs


def _check(name: str, tensor: Tensor, plan: TensorPlan) -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise TrainingError(
            f"{name} has {bad} of {tensor.numel()} weights that are not finite: "
            "the training diverged, quantise an earlier checkpoint"
        )
    if plan.kind == "float16" and not bool(torch.isfinite(tensor.to(torch.float16)).all()):
        raise TrainingError(f"{name} has weights above fp16's 65504: {tensor.abs().max():g}")


def tensor_stats(
    w: Tensor,
    q: QuantizedTensor,
    plan: TensorPlan,
    factor: Factor | None = None,
    moment: Tensor | None = None,
) -> TensorStats:
    """What storing w as q does; with the factor and moments of `quantize`, where there are any."""
    if q.steps is None:
        return TensorStats(relative_error(w, q))
    steps = q.steps.to(w.device, torch.float32)
    floor = row_step(torch.zeros_like(steps), plan.bits, plan.floor)
    error = loss = None
    if factor is not None:
        both = torch.stack([dequantize(q).to(w.device) - w, w])
        alike = stacked([factor, factor], w.device)
        rows = row_errors(in_order(both, alike), alike.hessian)  # (2, R)
        lost, whole = rows.sum(dim=1).tolist()
        error = lost / whole if whole else 0.0
        loss = None if moment is None else (rows[0] @ moment.to(rows)).item() / 2
    return TensorStats(
        relative_error(w, q),
        (steps == floor).float().mean().item() if plan.floor else 0.0,
        error,
        loss,
    )


def relative_error(w: Tensor, q: QuantizedTensor) -> float:
    """Norm of (decoded - w) as a share of the norm of w; 0 if both are zero."""
    w = w.detach().float().cpu()
    error, norm = torch.linalg.vector_norm(dequantize(q) - w), torch.linalg.vector_norm(w)
    return (error / norm).item() if error else 0.0

"""Clip search: of a few percentiles of |row|, the one whose grid gives the least squared error.

The published scripts compare the errors of whole matrices, so one percentile wins for all rows of a
matrix; choosing per row is never worse. Percentiles are torch.quantile's (linear interpolation).
A plan may ask for steps on `step_grid`: a clip then moves up to the next one.
Shapes: w (R, C), P candidates.
"""

import torch
from torch import Tensor

from pgolf.ops.int_grid import row_codes, row_step
from pgolf.quant.plan import TensorPlan
from pgolf.quant.step_grid import LEAST_STEP, covering_index, snap

CHUNK = 1 << 21  # elements worked on at a time: bounds the memory, and stays near the caches


def clip_factors(w: Tensor, plan: TensorPlan) -> Tensor:
    """Clip of each row as a share of its largest magnitude, (R,) fp32; 1 for a row of zeros.

    These are the factors of `fake_quant`: with them it gives the very values that are exported.
    """
    w = w.detach().float()
    if plan.clip == "uniform":
        return clip_of_step(uniform_step(w, plan.relative_step), w, plan)
    candidates, errors = [], []
    for rows in w.split(max(CHUNK // max(w.size(1), 1), 1)):
        candidates.append(candidate_factors(rows, plan))
        if plan.clips > 1:
            errors.append(torch.stack([_row_errors(rows, f, plan) for f in candidates[-1]]))
    factors = torch.cat(candidates, dim=1)
    if not errors:
        return factors[0]
    error = torch.cat(errors, dim=1)
    if plan.clip == "search_matrix":
        return factors[error.sum(dim=1, dtype=torch.float64).argmin()]
    return factors.gather(0, error.argmin(dim=0, keepdim=True))[0]  # ties: first candidate


def quantize_rows(w: Tensor, factors: Tensor, plan: TensorPlan) -> tuple[Tensor, Tensor]:
    """int8 codes (R, C) and fp16 steps (R,) of w for the clip factors (R,)."""
    w = w.detach().float()
    steps = row_steps(w, factors, plan)
    codes = row_codes(w, steps, plan.bits, plan.multiple, plan.full_range)
    return codes.to(torch.int8), steps.to(torch.float16)


def row_steps(w: Tensor, factors: Tensor, plan: TensorPlan) -> Tensor:
    """fp16 steps (R,), held in fp32, of w (R, C) for clip factors (R,)."""
    largest = w.abs().amax(dim=1)
    steps = row_step(largest * factors, plan.bits, plan.floor)
    # Any step does for a row of zeros: one of the grid, if the others are.
    return steps.where(largest > 0, LEAST_STEP) if plan.on_grid else steps


def candidate_factors(w: Tensor, plan: TensorPlan) -> Tensor:
    """(P, R) clips to choose from, as shares of the row's maximum: percentiles, then widths."""
    last = w.size(1) - 1
    ranks = [p * last for p in plan.percentiles]
    # Only the few largest magnitudes matter: for 0.999 of 1536 columns, three.
    top = w.abs().topk(last - int(min(ranks)) + 1, dim=1).values
    clips = [
        torch.lerp(top[:, last - int(rank)], top[:, last - min(int(rank) + 1, last)], rank % 1)
        for rank in ranks
    ]
    if plan.widths:
        std = w.std(dim=1, correction=0)
        clips += [torch.minimum(width * std, top[:, 0]) for width in plan.widths]
    clips = torch.stack(clips)
    # A quantile of 0 in a row that is mostly zeros would wipe the row out: keep its maximum.
    clips = clips.where(clips > 0, top[:, 0])
    if plan.on_grid:
        qmax = 2 ** (plan.bits - 1) - 1
        clips = qmax * snap(clips / qmax, covering_index)
    return torch.where(top[:, 0] > 0, clips / top[:, 0], 1.0)


def uniform_step(w: Tensor, relative_step: float) -> Tensor:
    """The step of a matrix, 0-d, on the grid: `relative_step` times its rms."""
    step = relative_step * w.square().mean(dtype=torch.float64).sqrt().float()
    return snap(step.clamp_min(LEAST_STEP))


def clip_of_step(step: Tensor, w: Tensor, plan: TensorPlan) -> Tensor:
    """Clip factors (R,) that give rows of w (R, C) `step`, 0-d or (R,), or the least without clip.

    Above 1 for most rows: their largest weight is below the value of the largest code.
    """
    largest, qmax = w.abs().amax(dim=1), 2 ** (plan.bits - 1) - 1
    steps = torch.maximum(step, snap(largest / qmax, covering_index))
    return torch.where(largest > 0, qmax * steps / largest, 1.0)


def _row_errors(w: Tensor, factors: Tensor, plan: TensorPlan) -> Tensor:
    """Squared error of each row, (R,)."""
    codes, steps = quantize_rows(w, factors, plan)
    return (codes.float().mul_(steps.float()[:, None]).sub_(w)).square_().sum(dim=1)

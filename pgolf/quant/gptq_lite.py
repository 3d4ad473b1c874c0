"""Clip search: of a few percentiles of |row|, the one whose grid gives the least squared error.

The seed scripts compare the errors of whole matrices, so one percentile wins for all rows of a
matrix; choosing per row is never worse. Percentiles are torch.quantile's (linear interpolation).
Shapes: w (R, C), P candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ops.int_grid import row_codes, row_scale
from pgolf.quant.policy import TensorPlan

CHUNK = 1 << 21  # elements worked on at a time: bounds the memory, and stays near the caches


def clip_factors(w: Tensor, plan: TensorPlan) -> Tensor:
    """Clip of each row as a share of its largest magnitude, (R,) fp32; 1 for a row of zeros.

    These are the factors of `fake_quant`: with them it gives the very values that are exported.
    """
    candidates, errors = [], []
    with torch.no_grad():
        for rows in w.detach().float().split(max(CHUNK // max(w.size(1), 1), 1)):
            candidates.append(_candidate_factors(rows, plan.percentiles))
            if len(plan.percentiles) > 1:
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
    scale = row_scale(w.abs().amax(dim=1) * factors, plan.bits, plan.floor)
    codes = row_codes(w, scale, plan.bits, plan.multiple, plan.full_range)
    return codes.to(torch.int8), scale.to(torch.float16)


def _candidate_factors(w: Tensor, percentiles: Sequence[float]) -> Tensor:
    """(P, R) quantiles of |row| divided by the row's maximum."""
    last = w.size(1) - 1
    ranks = [p * last for p in percentiles]
    # Only the few largest magnitudes matter: for 0.999 of 1536 columns, three.
    top = w.abs().topk(last - int(min(ranks)) + 1, dim=1).values
    clips = torch.stack(
        [
            torch.lerp(top[:, last - int(rank)], top[:, last - min(int(rank) + 1, last)], rank % 1)
            for rank in ranks
        ]
    )
    # A quantile of 0 in a row that is mostly zeros would wipe the row out: keep its maximum.
    return torch.where(clips > 0, clips / top[:, 0], 1.0)


def _row_errors(w: Tensor, factors: Tensor, plan: TensorPlan) -> Tensor:
    """Squared error of each row, (R,)."""
    codes, scale = quantize_rows(w, factors, plan)
    return (codes.float().mul_(scale.float()[:, None]).sub_(w)).square_().sum(dim=1)

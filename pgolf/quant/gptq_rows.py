"""GPTQ on a grid per row: of several clips, each row takes the one with the least error e H eᵀ.

Rows do not depend on each other, so the sweep takes all clips of a row at once, as rows of its own.
Where GPTQ is worse than rounding to nearest, which few columns or few inputs can bring about, the
row is rounded. Shapes: w (B, R, C), P clips.
"""

import torch
from torch import Tensor

from pgolf.ops.int_grid import row_codes
from pgolf.quant.clip_search import candidate_factors, row_steps
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.gptq import Factor, in_order, out_of_order, row_errors, sweep
from pgolf.quant.plan import TensorPlan


def gptq_rows(w: Tensor, factor: Factor, plan: TensorPlan) -> list[QuantizedTensor]:
    """Codes and steps of matrices w (B, R, C), fp32, that have one plan.

    Args:
        factor: of the B matrices, stacked.
    """
    steps = torch.stack(
        [
            torch.stack([row_steps(matrix, f, plan) for f in candidate_factors(matrix, plan)])
            for matrix in w
        ]
    )  # (B, P, R)
    flat = steps.flatten(1)
    weights = in_order(w, factor).repeat(1, 1, steps.size(1))  # (B, C, P R)

    def codes_of(x: Tensor) -> Tensor:
        """Codes of numbers (B, n, P R)."""
        rows = x.mT.reshape(-1, x.size(1))
        codes = row_codes(rows, flat.flatten(), plan.bits, plan.multiple, plan.full_range)
        return codes.view(x.mT.shape).mT

    def quantise(x: Tensor, j: int) -> tuple[Tensor, Tensor]:
        codes = codes_of(x[:, None])[:, 0]
        return codes, codes * flat

    def errors(codes: Tensor) -> Tensor:
        return row_errors(weights - codes * flat[:, None], factor.hessian)

    codes, rounded = sweep(weights, factor.upper, quantise), codes_of(weights).to(torch.int8)
    error, error_rounded = errors(codes).nan_to_num_(nan=torch.inf), errors(rounded)
    codes = codes.where((error <= error_rounded)[:, None], rounded)

    error = torch.minimum(error, error_rounded).view(steps.shape)
    if plan.clip == "search_matrix":
        error = error.sum(dim=2, keepdim=True, dtype=torch.float64).expand_as(error)
    best = error.argmin(dim=1, keepdim=True)  # (B, 1, R); ties: the first clip
    codes = codes.view(*codes.shape[:2], *steps.shape[1:])  # (B, C, P, R)
    codes = codes.gather(2, best[:, None].expand(-1, codes.size(1), -1, -1))[:, :, 0]
    steps = steps.gather(1, best)[:, 0].to(torch.float16)
    return [
        QuantizedTensor(c, plan.bits, s)
        for c, s in zip(out_of_order(codes, factor).cpu(), steps.cpu(), strict=True)
    ]

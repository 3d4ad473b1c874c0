"""GPTQ on one step per matrix, times a factor per column; the entropy coder decides a code's bits.

An error of t steps in column j costs (t step_j / U_jj)², so with steps that are proportional to
U_jj all codes' errors count the same: the least error at a given rate where steps are fine, which
is reverse water-filling (Lifar, Savkin, Ordentlich, Polyanskiy: WaterSIC, arXiv 2603.04956).
Rows whose outputs matter more may have finer steps likewise. Nothing is clipped: where a code would
be above 127, its row or its column gets a coarser step.

With `rate_weight` a code is chosen for its error and its bits: of the two nearest and 0, the least
(t - code)² + rate_weight * bits(code), t in steps. A first pass measures the bits.
Shapes: w (B, R, C), K classes of costs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.codecs.rans_encode import magnitude_bits
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.gptq import Factor, in_order, out_of_order, row_errors, sweep
from pgolf.quant.step_grid import covering_index, snap

LARGEST = 127

Rounding = Callable[[Tensor, int], Tensor]  # (numbers (B, R) in steps, column) -> codes (B, R)


def column_factors(factor: Factor) -> Tensor:
    """(B, C) factors on columns' steps, in GPTQ's order: of the grid, geometric mean near 1."""
    log = factor.upper.diagonal(dim1=1, dim2=2).log()
    return snap((log - log.mean(dim=1, keepdim=True)).exp())


def gptq_uniform(
    w: Tensor, factor: Factor, steps: Tensor, rate_weight: float = 0.0
) -> list[QuantizedTensor]:
    """Codes, steps and column factors of matrices w (B, R, C), fp32.

    Args:
        factor: of the B matrices, stacked.
        steps: (B, R) of rows, on the grid.
        rate_weight: squared steps that a bit is worth.
    """
    weights = in_order(w, factor)  # (B, C, R)
    steps, columns = _unclipped_steps(weights, steps, column_factors(factor))
    in_columns = weights / columns[:, :, None]

    def gptq(rounding: Rounding) -> Tensor:
        def quantise(x: Tensor, j: int) -> tuple[Tensor, Tensor]:
            unit = steps * columns[:, j, None]
            codes = rounding(x / unit, j)
            return codes, codes * unit

        return sweep(weights, factor.upper, quantise)

    def errors(codes: Tensor) -> Tensor:
        """Of each row, in units of what an error of one step costs: (B, R)."""
        values = codes * steps[:, None] * columns[:, :, None]
        unit = (steps * columns[:, :1] / factor.upper[:, :1, 0]).square()
        return row_errors(weights - values, factor.hessian) / unit

    rounded = nearest(in_columns / steps[:, None]).to(torch.int8)
    codes = gptq(lambda t, j: nearest(t))
    cost, cost_rounded = errors(codes).nan_to_num_(nan=torch.inf), errors(rounded)
    if rate_weight:
        costs = Costs(codes)
        codes = gptq(lambda t, j: costs.cheapest(t, j, rate_weight))
        cost = errors(codes) + rate_weight * costs.of_rows(codes)
        cost_rounded = cost_rounded + rate_weight * costs.of_rows(rounded)
    codes = out_of_order(codes.where((cost <= cost_rounded)[:, None], rounded), factor)
    columns = out_of_order(columns[:, :, None], factor)[:, 0]
    return [
        QuantizedTensor(c, least_bits(c), s, f)
        for c, s, f in zip(codes.cpu(), steps.half().cpu(), columns.half().cpu(), strict=True)
    ]


def _unclipped_steps(weights: Tensor, steps: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of rows (B, R) and factors of columns (B, C) that keep every code within 127.

    A weight that is too large makes its row's step coarser or its column's, whichever has the
    larger share of such weights: an input that varies far more than others asks for large codes in
    its column, and steps of all rows that suit it would spoil the rest.
    """
    excess = weights.abs() / (LARGEST * steps[:, None] * columns[:, :, None])  # (B, C, R)
    over = excess > 1
    by_row, by_column = (over.float().mean(dim=d, keepdim=True) for d in (1, 2))
    coarser = excess.where(over & (by_row >= by_column), 1.0).amax(dim=1)
    left = (excess / coarser[:, None]).amax(dim=2).clamp_min(1)
    steps = torch.where(coarser > 1, snap(steps * coarser, covering_index), steps)
    return steps, torch.where(left > 1, snap(columns * left, covering_index), columns)


def nearest(t: Tensor) -> Tensor:
    """The codes of numbers in steps."""
    return t.round().clamp(-LARGEST, LARGEST)


def least_bits(codes: Tensor) -> int:
    """Bits a code, 4 to 8, that hold all of them."""
    largest = int(codes.abs().amax()) if codes.numel() else 0
    return max(largest.bit_length() + 1, 4)


class Costs:
    """Bits of codes (B, C, R) in the entropy coder, by matrix and context."""

    def __init__(self, codes: Tensor):
        pairs = (magnitude_bits(c.mT.cpu().numpy()) for c in codes)
        contexts, tables = (
            torch.stack([torch.from_numpy(a) for a in arrays]).to(codes.device)
            for arrays in zip(*pairs, strict=True)
        )
        self.bits = tables.float()  # (B, K, 128)
        first = torch.arange(len(codes), device=codes.device)[:, None, None] * self.bits.size(1)
        self.rows = 128 * (contexts.mT + first).to(torch.int32)  # of the flat table

    def cheapest(self, t: Tensor, column: int, rate_weight: float) -> Tensor:
        """Codes (B, R) of numbers t (B, R) in steps, of the two nearest and 0."""
        near = nearest(t)
        other = nearest(near + (t - near).sign())
        codes = torch.stack([near, other, torch.zeros_like(near)])
        bits = self.bits.flatten()[self.rows[:, column] + codes.abs().to(torch.int32)]
        best = ((t - codes).square() + rate_weight * bits).argmin(dim=0, keepdim=True)
        return codes.gather(0, best)[0]

    def of_rows(self, codes: Tensor) -> Tensor:
        """Bits of each row, (B, R), of codes (B, C, R)."""
        return self.bits.flatten()[self.rows + codes.abs().to(torch.int32)].sum(dim=1)

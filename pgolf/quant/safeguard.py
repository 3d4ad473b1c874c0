"""Rounding to nearest instead of GPTQ, where GPTQ does worse on text that it has not seen.

GPTQ makes the error that its own Hessian H measures small, by moving it to where H is small. If H
is from little text and hardly damped, it is nearly 0 in most directions: the error there grows
without bound, steps by column and row follow that noise, and H itself, which has been minimised,
shows none of it. Adding the usual damping before comparing shows only a part. So the two errors are
compared by statistics of other text, to which neither has been fitted: they are unbiased for any
length of it, and one sequence is enough to tell factors of 2 apart. They miss one thing: a token
that the other text lacks costs nothing in the token table.
"""

import math

import torch
from torch import Tensor

from pgolf.quant.clip_search import clip_of_step, quantize_rows
from pgolf.quant.dequantize import QuantizedTensor, dequantize
from pgolf.quant.gptq import row_errors
from pgolf.quant.gptq_uniform import Costs, least_bits
from pgolf.quant.plan import TensorPlan
from pgolf.quant.step_grid import HIGHEST, LOWEST, PER_OCTAVE, step_values

TRIES = 8


def expected_to_add(w: Tensor, q: QuantizedTensor, hessian: Tensor, moment: Tensor) -> float:
    """Nats a token that storing w (R, C) as q adds to the loss, to second order: tr(M E H Eᵀ) / 2.

    Args:
        hessian: (C, C) of the inputs.
        moment: (R,) of the outputs' gradients, the diagonal of M.
    """
    error = dequantize(q).to(w.device) - w
    return (row_errors(error.mT[None], hessian[None])[0] @ moment).item() / 2


def rounded_at_bits(w: Tensor, like: QuantizedTensor, plan: TensorPlan) -> QuantizedTensor | None:
    """w (R, C) rounded to nearest on one step, about the finest within the bits of `like`.

    Bits are those of the entropy coder, which knows rows and columns of small codes. Factors of
    columns are not counted, less than a hundredth.

    Returns:
        None, if a few tries find no such step.
    """
    limit = bits_a_code(like.data)
    step = like.steps.double().log2().mean()
    if like.columns is not None:
        step = step + like.columns.double().log2().mean()
    index, best = round(PER_OCTAVE * step.item()), None
    for _ in range(TRIES):
        index = min(max(index, LOWEST), HIGHEST)
        factors = clip_of_step(step_values(torch.tensor(index)).to(w), w, plan)
        codes, steps = quantize_rows(w, factors, plan)
        # An index is worth at most a 16th of a bit, and less at low rates: no step goes too far.
        gap = PER_OCTAVE * (bits_a_code(codes) - limit)
        if gap <= 0:
            best = codes, steps
        move = math.ceil(gap) if gap > 0 else -math.floor(-gap)
        if not move or not LOWEST <= index + move <= HIGHEST:
            break
        index += move
    if best is None:
        return None
    codes, steps = best
    return QuantizedTensor(codes.cpu(), least_bits(codes), steps.cpu())


def bits_a_code(codes: Tensor) -> float:
    """What int8 codes (R, C) cost in the entropy coder, nearly."""
    in_order = codes.mT[None]
    return Costs(in_order).of_rows(in_order).mean().item() / codes.size(1)

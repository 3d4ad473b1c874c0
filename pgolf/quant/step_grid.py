"""Steps on a geometric grid of 16 to the octave: an artifact stores their small indices.

    step(16 e + m) = fp16(2^(e + m/16)),  m = 0 .. 15,  e = -14 .. 15

Two neighbours differ by 4.4 %, so the nearest one is off by 2.2 % at most, which costs next to
nothing: around its best value, a step's error is flat. Indices and values are exact on any machine:
the mantissas are integers of the table below.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PER_OCTAVE = 16
LOWEST, HIGHEST = -14 * PER_OCTAVE, 16 * PER_OCTAVE - 1  # normal fp16 numbers
LEAST_STEP = 2.0**-14
# round(1024 * 2^(m/16)): fp16 numbers have 10 bits of mantissa below the leading one.
MANTISSAS = (1024, 1069, 1117, 1166, 1218, 1272, 1328, 1387,
             1448, 1512, 1579, 1649, 1722, 1798, 1878, 1961)  # fmt: skip


def step_values(index: Tensor) -> Tensor:
    """fp16 steps of integer indices from LOWEST to HIGHEST, of the same shape."""
    index = index.to(torch.int64)
    table = torch.tensor(MANTISSAS, device=index.device)
    exponent = index.div(PER_OCTAVE, rounding_mode="floor")
    bits = ((exponent + 15) << 10) + table[index - PER_OCTAVE * exponent] - 1024
    return bits.to(torch.int16).view(torch.float16)


def nearest_index(step: Tensor) -> Tensor:
    """int64 indices of the grid's steps nearest to `step` (positive), by ratio."""
    index = (PER_OCTAVE * step.double().log2()).round().clamp(LOWEST, HIGHEST)
    return index.to(torch.int64)


def covering_index(step: Tensor) -> Tensor:
    """int64 indices of the least steps of the grid that reach `step` (positive), or the last.

    They reach it up to the rounding of fp16, so that every step of the grid is its own.
    """
    index = nearest_index(step)
    short = step_values(index).double() < step.double() * (1 - 2.0**-11)
    return (index + short).clamp_max(HIGHEST)


def snap(step: Tensor, index: Callable[[Tensor], Tensor] = nearest_index) -> Tensor:
    """The grid's steps for `step` (0 or more), in its dtype; what is below the grid stays as it is.

    Args:
        index: nearest_index or covering_index.
    """
    return torch.where(step < LEAST_STEP, step, step_values(index(step)).to(step.dtype))


def exact_index(step: Tensor) -> Tensor | None:
    """int64 indices of fp16 steps, or None if one of them is not on the grid."""
    if not step.numel() or not bool((step > 0).all()):
        return None
    index = nearest_index(step)
    return index if torch.equal(step_values(index), step) else None


"""A stored tensor and its value: all of quantisation that decoding needs.

Shapes: codes (R, C), steps (R,), columns (C,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes with a step per row and perhaps per column, or plain fp16 values.

    Attributes:
        data: int8 codes (R, C), or fp16 values of any shape.
        bits: bits a code, 4 to 8; 16 for fp16 values.
        steps: fp16 steps (R,); None for fp16 values.
        columns: fp16 factors (C,) on the steps; None where all are 1.
    """

    data: Tensor
    bits: int = 16
    steps: Tensor | None = None
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


def dequantize(q: QuantizedTensor) -> Tensor:
    """The fp32 values that `q` stands for: code * row step * column factor, or the fp16 values."""
    values = q.data.to(torch.float32)
    if q.steps is not None:
        values *= q.steps.to(torch.float32)[:, None]
    if q.columns is not None:
        values *= q.columns.to(torch.float32)
    return values

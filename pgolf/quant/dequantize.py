"""A stored tensor and its value: all of quantisation that decoding needs.

Shapes: codes (R, C), scale (R,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Integer codes with a step per row, or plain fp16 values.

    Attributes:
        data: int8 codes (R, C), or fp16 values of any shape.
        bits: bits a code, 4 to 8; 16 for fp16 values.
        scale: fp16 steps (R,); None for fp16 values.
    """

    data: Tensor
    bits: int = 16
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


def dequantize(q: QuantizedTensor) -> Tensor:
    """The fp32 values that `q` stands for: code times step, or the fp16 values."""
    if q.scale is None:
        return q.data.to(torch.float32)
    return q.data.to(torch.float32) * q.scale.to(torch.float32)[:, None]

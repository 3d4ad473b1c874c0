"""MLP with squared (leaky) ReLU.

    out = leaky_relu(h W_up^T, slope)^2 W_down^T        slope 0: relu^2 (arXiv 2109.08668)

Shapes: h (..., D), w_up (F, D), w_down (D, F).
"""

import torch.nn.functional as F
from torch import Tensor


def leaky_relu2(x: Tensor, slope: float) -> Tensor:
    """max(x, slope x)^2, never negative."""
    return (F.leaky_relu(x, slope) if slope else F.relu(x)).square()


def leaky_relu2_mlp(h: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> Tensor:
    """(..., D) -> (..., D)."""
    return F.linear(leaky_relu2(F.linear(h, w_up), slope), w_down)

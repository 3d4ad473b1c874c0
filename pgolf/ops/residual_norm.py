"""RMS norm and the residual stream around it.

    rms_norm(x)   = x / sqrt(mean(x^2) + eps)                      (arXiv 1910.07467)
    residual_norm = x_in = mix[0] * x + mix[1] * x0,  h = scale * rms_norm(x_in)

Statistics are taken in fp32 whatever the dtype of x. Shapes: x, x0 (..., D), mix (2, D).
"""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x (..., D) with unit mean square over the last dimension; no weight."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def residual_norm(
    x: Tensor, x0: Tensor, mix: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mix the first embedding x0 into x and norm the result: (x_in, h), both (..., D).

    Args:
        mix: (2, D) learned weights of x and x0, cast to x's dtype; None leaves x as it is.
        scale: constant factor of h, 1/sqrt(layer + 1) in the seeds.
    """
    if mix is not None:
        mix = mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
    h = rms_norm(x, eps)
    return x, h if scale == 1.0 else h * scale

"""Per-head RMS norm, partial rotary embedding and query gain.

RoPE (Su et al., arXiv 2104.09864) in the half-split form on the first r dims of a head: pairs
(j, j + r/2), angle t * base^(-2j/r), out = (x1 cos + x2 sin, -x1 sin + x2 cos); the other dims
pass through. The base is the same at every length.
Shapes: q (N, T, H, d), k (N, T, G, d), cos and sin (T, r/2), gain (H,).
"""

import torch
from torch import Tensor

from pgolf.ops.residual_norm import rms_norm


def rope_table(length: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, dims/2) in fp32; angles are computed in fp64."""
    j = torch.arange(0, dims, 2, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * base ** (-j / dims)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.size(-1) dims of x (N, T, heads, d)."""
    half = cos.size(-1)
    if half == 0:
        return x
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    x1, x2, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def qk_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, eps: float, norm: bool = True
) -> tuple[Tensor, Tensor]:
    """Norm (if `norm`), rotate, and scale q by its head's gain."""
    if norm:
        q, k = rms_norm(q, eps), rms_norm(k, eps)
    return rotate(q, cos, sin) * gain.to(q.dtype)[:, None], rotate(k, cos, sin)

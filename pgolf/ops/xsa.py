"""Exclusive self attention: remove from each head's output its component along the value.

    y_h <- y_h - (y_h . n) n,   n = v_g / max(|v_g|_2, 1e-12)             (arXiv 2603.09078)

g is the key/value head of query head h: with H query and G value heads, g = h // (H / G).
Shapes: y (N, T, H, d), v (N, T, G, d).
"""

import torch.nn.functional as F
from torch import Tensor

NORM_FLOOR = 1e-12


def xsa(y: Tensor, v: Tensor) -> Tensor:
    """y without its component along v; (N, T, H, d)."""
    batch, time, heads, size = y.shape
    groups = v.size(2)
    y = y.reshape(batch, time, groups, heads // groups, size)
    n = F.normalize(v, dim=-1, eps=NORM_FLOOR).unsqueeze(3)
    return (y - (y * n).sum(-1, keepdim=True) * n).reshape(batch, time, heads, size)

"""Output matrix, soft cap and cross-entropy.

    z = x W^T;   logits = c tanh(z / c)  (c = 0: logits = z);   loss = -log softmax(logits)[target]

The cap is Gemma 2's (arXiv 2408.00118). Cap and softmax are in fp32. Losses are in nats.
Shapes: x (N, D), w (V, D), targets (N,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def softcap_logits(x: Tensor, w: Tensor, cap: float) -> Tensor:
    """Capped logits (N, V) in fp32."""
    z = F.linear(x, w)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return cap * torch.tanh(z / cap) if cap else z


def softcap_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, cap: float, reduction: str = "mean"
) -> Tensor:
    """Mean loss, or with reduction='none' the loss of every target, in fp32."""
    return F.cross_entropy(softcap_logits(x, w, cap), targets, reduction=reduction)

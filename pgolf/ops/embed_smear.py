"""Token embedding with hashed bigrams, its norm, and SmearGate.

    bigram row of position t = ((36313 id[t]) xor (27191 id[t-1])) mod (B - 1);  B - 1 at t = 0
    x_t = (1 - g) x_t + g x_{t-1},  g = sigmoid(gate),  x_{-1} = 0         (SmearGate, seed form)

Both come from the contest's public records; the hash constants are theirs.
Shapes: ids (N, T) int64, x (N, T, D), gate (D,).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bigram_rows(ids: Tensor, buckets: int) -> Tensor:
    """Row of the bigram table for each position: (N, T), in [0, buckets)."""
    hashed = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (buckets - 1)
    return F.pad(hashed, (1, 0), value=buckets - 1)


def smear(x: Tensor, gate: Tensor, starts: Tensor | None = None) -> Tensor:
    """Blend each position with the one before it.

    Args:
        starts: (N, T) bool, positions that begin a document: they see zeros instead of the
            position before, as position 0 does. None is the seed form.
    """
    g = torch.sigmoid(gate).to(x.dtype)
    previous = F.pad(x[:, :-1], (0, 0, 1, 0))
    if starts is not None:
        previous = previous.masked_fill(starts[..., None], 0)
    return (1 - g) * x + g * previous

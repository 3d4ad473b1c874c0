"""Documents in a batch: where they begin, and causal attention on one after the other.

`borders` (K,) int32 are those of documents in the tokens of a batch end to end. Shapes: as
`pgolf.ops.attention`; lse (H, N T).
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.ops.tensors import compute_dtype

_KERNELS, _CAUSAL = torch.ops.aten, (0.0, True)  # without dropout


def document_borders(starts: Tensor, most: int) -> Tensor:
    """Where the documents of a batch begin, in its tokens end to end, and last where they end.

    Args:
        starts: (N, T) bool, tokens that begin a document; the first of a sequence does anyway.
        most: documents of a sequence that there is room for; those behind are no documents.

    Returns:
        (N most + 1,) int32, ascending. Where a sequence has fewer documents, its end is repeated,
        so that the shape depends on nothing that only the device knows.
    """
    batch, time = starts.shape
    place = torch.arange(time, device=starts.device)
    starts = starts | (place == 0)
    # All tokens but the first ones of documents write where nobody reads.
    slots = torch.where(starts, starts.cumsum(1) - 1, most).clamp(max=most)
    ends = place.new_full((batch, most + 1), time)
    begins = ends.scatter(1, slots, place.expand(batch, time))[:, :most]
    sequences = time * torch.arange(batch, device=starts.device)
    return F.pad((begins + sequences[:, None]).flatten(), (0, 1), value=batch * time).int()


def _documents(borders: Tensor) -> Iterator[slice]:
    return (slice(a, b) for a, b in pairwise(borders.tolist()) if a < b)


def _alone(t: Tensor, own: slice, heads: int) -> Tensor:
    """(1, H, L, d) of the tokens of a document; heads that are shared are repeated."""
    t = t.flatten(0, 1)[own].transpose(0, 1)
    return t.repeat_interleave(heads // t.size(0), 0)[None]


def forward(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """y and lse, by torch's kernel for a CPU."""
    y, (batch, time, heads, _) = q.new_empty(q.shape), q.shape
    lse = q.new_empty((heads, batch * time), dtype=compute_dtype(q.dtype))
    for own in _documents(borders):
        inputs = (_alone(t, own, heads) for t in (q, k, v))
        found = _KERNELS._scaled_dot_product_flash_attention_for_cpu(*inputs, *_CAUSAL)
        y.flatten(0, 1)[own], lse[:, own] = found[0][0].transpose(0, 1), found[1][0]
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
    for own in _documents(borders):
        inputs = (_alone(t, own, q.size(2)) for t in (dy, q, k, v, y))
        found = _KERNELS._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, lse[None, :, own], *_CAUSAL
        )
        for whole, part in zip(gradients, found, strict=True):
            shared = part[0].unflatten(0, (whole.size(2), -1)).sum(1)
            whole.flatten(0, 1)[own] = shared.transpose(0, 1)
    return gradients

"""Tables of embeddings, and what is made of their rows.

Names and shapes are as in `pgolf.model.layers`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.model.layers import TokenRows
from pgolf.model.matrices import Matrix
from pgolf.ops.embed_smear import bigram_rows
from pgolf.ops.tensors import compute_dtype


class Table(nn.Module):
    """An embedding table (rows, width) in its own dtype."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def _gathered(
    rows: Tensor,
    table: Table,
    proj: Matrix | None,
    dtype: torch.dtype,
    scales: Sequence[Tensor | None] = (None,),
) -> list[TokenRows]:
    """Rows of a table, projected, times each of the 0-d scales."""
    trains = torch.is_grad_enabled() and table.weight.requires_grad
    if not trains or rows.numel() <= table.weight.size(0):
        values = table(rows).to(dtype)
        values = values if proj is None else proj(values)
        scaled = [values if scale is None else values * scale.to(dtype) for scale in scales]
        return [TokenRows(t) for t in scaled]
    # Less work on the table than on tokens: E[rows] W^T = (E W^T)[rows], and scales likewise, whose
    # gradients are sums over the table then. Who takes the rows looks them up, and rounds the
    # gradient of a row of the table to `dtype` once, as that of any matrix.
    products = table.weight if proj is None else proj(table.weight.to(dtype))
    products = products.to(compute_dtype(dtype))
    tables = [products if scale is None else products * scale for scale in scales]
    return [TokenRows(t.to(dtype), rows) for t in tables]


class BigramHash(nn.Module):
    """Embedding of the hashed pair (previous id, id), projected to the residual width.

    `scale` is applied where it is added to the tokens' embedding.
    """

    def __init__(self, buckets: int, width: int, dim: int, dtype: torch.dtype):
        super().__init__()
        self.embed = Table(buckets, width, dtype)
        self.proj = Matrix(dim, width) if width != dim else None
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, ids: Tensor, dtype: torch.dtype, starts: Tensor | None = None) -> TokenRows:
        """starts (N, T) bool: tokens that have no previous one."""
        buckets = self.embed.weight.size(0)
        rows = bigram_rows(ids, buckets)
        if starts is not None:
            rows = rows.masked_fill(starts, buckets - 1)
        return _gathered(rows, self.embed, self.proj, dtype)[0]


class ValueEmbedding(nn.Module):
    """One table of values that several layers add, each with a scale of its own."""

    def __init__(self, vocab: int, width: int, kv_dim: int, dtype: torch.dtype):
        super().__init__()
        self.embed = Table(vocab, width, dtype)
        self.proj = Matrix(kv_dim, width) if width != kv_dim else None
        self.scale = nn.Parameter(torch.empty(()))

    def forward(
        self, ids: Tensor, dtype: torch.dtype, scales: Sequence[Tensor]
    ) -> list[TokenRows]:
        """Of G d columns, for each of the layers that have these `scales`."""
        return _gathered(ids, self.embed, self.proj, dtype, [self.scale * s for s in scales])


class SmearGate(nn.Module):
    """Holds the gate of `pgolf.ops.embed_smear`."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))

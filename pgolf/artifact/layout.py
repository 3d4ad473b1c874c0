"""How a model is stored: the header of its artifact, and the arrays that go with it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf import roles
from pgolf.artifact.header import COLUMN_GROUP, PACKINGS, Array, Entry, Header, Vector, arrays
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.step_grid import exact_index

Key = tuple[str | int, str]  # owner and kind of an array


@dataclass(frozen=True)
class Layout:
    """All that a file stores: int8 matrices and fp16 numbers, by owner and kind of the array."""

    header: Header
    stored: dict[Key, Tensor]

    def integers(self) -> tuple[list[Array], list[Tensor]]:
        """The arrays of integers, and their matrices."""
        table, _ = arrays(self.header)
        return table, [self.stored[a.owner, a.kind] for a in table]

    def halves(self) -> tuple[list[Array], list[Tensor]]:
        """The arrays of halves, and their numbers."""
        _, table = arrays(self.header)
        return table, [self.stored[a.owner, a.kind] for a in table]


def lay_out(tensors: Mapping[str, QuantizedTensor], meta: Mapping[str, Any]) -> Layout:
    """Decide how each array is stored; the header's packing is for the writer to change."""
    entries, vectors, factors, groups = [], [], [], {}
    stored: dict[Key, Tensor] = {}
    for name, q in _ordered(tensors):
        if q.steps is None:
            entries.append(Entry(name, 16, q.shape))
            stored[name, "values"] = q.data
            continue
        group = groups.setdefault(roles.without_layer(name), COLUMN_GROUP + 1 + len(groups))
        steps, stored[name, "steps"] = _distances(q.steps)
        stored[name, "codes"] = q.data
        index = None
        if q.columns is not None:
            same = (i for i, f in enumerate(factors) if torch.equal(f, q.columns))
            index = next(same, len(factors))
            if index == len(factors):
                factors.append(q.columns)
                base, stored[index, "columns"] = _distances(q.columns)
                vectors.append(Vector(len(q.columns), base))
        entries.append(Entry(name, q.bits, q.shape, group, steps, index))
    header = Header(dict(meta), PACKINGS[0], tuple(entries), tuple(vectors))
    return Layout(header, stored)


def _distances(numbers: Tensor) -> tuple[int | None, Tensor]:
    """Base and int8 distances (1, n) of fp16 numbers (n,) on the grid of steps; else None and they.

    The base is about their median: the entropy coder expects small distances of either sign.
    """
    index = exact_index(numbers)
    if index is None or index.max() - index.min() > 255:
        return None, numbers
    base = int(index.median().clamp(index.max() - 127, index.min() + 128))
    return base, (index - base).to(torch.int8)[None]


def _ordered(tensors: Mapping[str, QuantizedTensor]) -> list[tuple[str, QuantizedTensor]]:
    """By role, then layer: neighbours with like statistics compress a little better."""

    def key(item: tuple[str, QuantizedTensor]) -> tuple[str, list[int]]:
        return roles.without_layer(item[0]), [int(n) for n in re.findall(r"\d+", item[0])]

    return sorted(tensors.items(), key=key)


def pack_matrix(array: Array, matrix: Tensor, packing: str) -> bytes:
    """An integer matrix as a body holds it."""
    if array.kind == "codes" and packing == "columns":
        matrix = matrix.t()
    return matrix.numpy().tobytes()


def planes(halves: Iterable[Tensor]) -> bytes:
    """Low bytes of all fp16 numbers, then their high bytes."""
    flat = torch.cat([h.flatten() for h in halves] or [torch.empty(0, dtype=torch.float16)])
    return flat.view(torch.uint8).view(-1, 2).t().contiguous().numpy().tobytes()

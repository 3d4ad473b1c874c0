"""The bytes of an artifact by group and by tensor.

With the codec rans, the bytes of codes and of indices of steps come from the coder's own model:
they are exact except for rounding and the few words that end the stream. All else is packed as one,
and its bytes are estimates: the order-0 entropy of each array of integers, and of the bytes of all
halves together, scaled so that they add up to those of the file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pgolf import roles
from pgolf.artifact.container import Artifact
from pgolf.artifact.header import Array
from pgolf.artifact.layout import Layout
from pgolf.codecs import body_codec, codec, rans_encode

GROUPS = ("attn", "mlp", "tok", "bigram", "ve", "scalars", "steps", "meta")


class Part(NamedTuple):
    """A part of the file: its group, the tensor that it belongs to, and its size in some unit."""

    group: str
    tensor: str | None
    size: float


def byte_shares(artifact: Artifact) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a file by group, which add up to its size, and by tensor.

    A tensor's bytes include its steps and column factors; shared factors count for the first tensor
    that has them. The rest of the file is head and header.
    """
    layout = artifact.layout
    table, matrices = layout.integers()
    owners = _owners(layout)
    bits = integer_bits(artifact.codec, table, matrices)
    integers = [_part(a, owners, n) for a, n in zip(table, bits, strict=True)]
    # The file's own codec: a script of a submission has no other.
    header = len(codec(body_codec(artifact.codec)).compress(layout.header.to_json(), 3))
    body = [Part("meta", None, 8 * header), *_halves(layout, owners)]
    if artifact.codec == "rans":
        parts = _scaled(integers, artifact.stream_bytes) + _scaled(body, artifact.body_bytes)
    else:
        parts = _scaled(integers + body, artifact.body_bytes)
    head = artifact.file_bytes - artifact.body_bytes - artifact.stream_bytes
    parts.append(Part("meta", None, head))
    groups = {group: sum(s.size for s in parts if s.group == group) for group in GROUPS}
    tensors = {
        e.name: round(sum(s.size for s in parts if s.tensor == e.name))
        for e in layout.header.tensors
    }
    return _rounded(groups), tensors


def integer_bits(name: str, table: Sequence[Array], matrices: Sequence[Tensor]) -> list[float]:
    """Bits of each array of integers with the codec `name`, see above."""
    if name == "rans":
        return rans_encode.code_lengths([m.numpy() for m in matrices], [a.group for a in table])
    return [m.numel() * entropy(m) for m in matrices]


def entropy(values: Tensor) -> float:
    """Order-0 entropy of int8 or uint8 numbers, in bits a number."""
    counts = np.bincount(values.numpy().view(np.uint8).ravel(), minlength=256)
    share = counts[counts > 0] / max(values.numel(), 1)
    return float(-(share * np.log2(share)).sum())


def _owners(layout: Layout) -> dict[str | int, str]:
    """The tensor that each array is counted for: shared column factors for the first."""
    owners: dict[str | int, str] = {e.name: e.name for e in layout.header.tensors}
    for e in layout.header.tensors:
        if e.columns is not None:
            owners.setdefault(e.columns, e.name)
    return owners


def _part(array: Array, owners: dict[str | int, str], size: float) -> Part:
    tensor = owners[array.owner]
    group = "steps" if array.kind in ("steps", "columns") else roles.group(tensor)
    return Part(group, tensor, size)


def _halves(layout: Layout, owners: dict[str | int, str]) -> list[Part]:
    """Bits of each array of halves, coded with the frequencies of low and high bytes of all."""
    table, numbers = layout.halves()
    planes = [h.numpy().reshape(-1).view(np.uint8).reshape(-1, 2) for h in numbers]
    bits = np.zeros((2, 256))
    for k in range(2):
        counts = sum((np.bincount(p[:, k], minlength=256) for p in planes), np.zeros(256, int))
        bits[k] = np.log2(max(counts.sum(), 1)) - np.log2(np.maximum(counts, 1))
    return [
        _part(a, owners, float(sum(bits[k, p[:, k]].sum() for k in range(2))))
        for a, p in zip(table, planes, strict=True)
    ]


def _scaled(parts: Sequence[Part], total: int) -> list[Part]:
    """With sizes that add up to `total`."""
    scale = total / (sum(s.size for s in parts) or 1)
    return [s._replace(size=s.size * scale) for s in parts]


def _rounded(groups: dict[str, float]) -> dict[str, int]:
    """In whole bytes that add up to the same: the running sum is rounded, not each."""
    rounded, so_far, done = {}, 0.0, 0
    for group, size in groups.items():
        so_far += size
        rounded[group], done = round(so_far) - done, round(so_far)
    return rounded

"""The header of an artifact: its table of tensors, and the arrays that they are stored in.

    header = JSON {"meta": {...}, "packing": "bytes"|"columns",
                   "tensors": [[name, 16, dims] or [name, bits, dims, group, steps, columns], ...],
                   "columns": [[length, base], ...]}

A line of six is a matrix of integer codes. `group` is the entropy coder's; `columns` is null or the
index of a line of "columns", the vectors of column factors, which several matrices may share.

`steps` and the `base` of a column vector say how their fp16 numbers are stored. An integer is the
index of a step in `pgolf.quant.step_grid`, and each number is stored as its int8 distance from that
index. null means that the halves themselves are stored.

The arrays of a file follow from the table, in this order: codes, indices of steps, indices of
column factors, then as halves steps, column factors and values; each kind in the order of its
table.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from pgolf.errors import ArtifactError

INT_BITS = (4, 5, 6, 7, 8)
PACKINGS = ("bytes", "columns")
STEP_GROUP, COLUMN_GROUP, MAX_GROUP = 0, 1, 63  # groups of codes begin behind the two

MAX_WEIGHTS = 512 << 20
MAX_TENSORS = 4096
MAX_DIMS = 4
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MAX_NAME = 128


@dataclass(frozen=True)
class Entry:
    """A line of the tensor table; bits 16 means fp16 values, which have no group and no steps."""

    name: str
    bits: int
    shape: tuple[int, ...]
    group: int = 0
    steps: int | None = None
    columns: int | None = None


@dataclass(frozen=True)
class Vector:
    """A line of the table of column factors."""

    length: int
    base: int | None


@dataclass(frozen=True)
class Header:
    """All that the header says, checked: every reference leads to something that fits."""

    meta: dict[str, Any]
    packing: str
    tensors: tuple[Entry, ...]
    columns: tuple[Vector, ...]

    def to_json(self) -> bytes:
        """The header's text, the same for equal headers."""
        table = [
            [e.name, e.bits, e.shape] + ([] if e.bits == 16 else [e.group, e.steps, e.columns])
            for e in self.tensors
        ]
        columns = [[v.length, v.base] for v in self.columns]
        header = {"meta": self.meta, "packing": self.packing, "tensors": table, "columns": columns}
        text = json.dumps(header, separators=(",", ":"), sort_keys=True, allow_nan=False)
        return text.encode("ascii")


class Array(NamedTuple):
    """A stored array: whose it is (a tensor, or a vector of column factors), its kind, bits of an
    element (16: halves), shape and group (of integers)."""

    owner: str | int
    kind: str  # codes, steps, columns, values
    bits: int
    shape: tuple[int, ...]
    group: int = 0

    def body_bytes(self) -> int:
        """Bytes that it takes in a body."""
        return math.prod(self.shape) * (2 if self.bits == 16 else 1)


def arrays(header: Header) -> tuple[list[Array], list[Array]]:
    """The integer arrays of a file, all of them matrices, and its halves, in their order."""
    matrices = [e for e in header.tensors if e.bits != 16]
    table = [Array(e.name, "codes", e.bits, e.shape, e.group) for e in matrices]
    table += [_numbers(e.name, "steps", e.shape[0], e.steps) for e in matrices]
    table += [_numbers(i, "columns", v.length, v.base) for i, v in enumerate(header.columns)]
    table += [Array(e.name, "values", 16, e.shape) for e in header.tensors if e.bits == 16]
    return [a for a in table if a.bits != 16], [a for a in table if a.bits == 16]


def _numbers(owner: str | int, kind: str, length: int, base: int | None) -> Array:
    if base is None:
        return Array(owner, kind, 16, (length,))
    return Array(owner, kind, 8, (1, length), STEP_GROUP if kind == "steps" else COLUMN_GROUP)


def parse_header(text: bytes) -> Header:
    """Read and check a header.

    Raises:
        ArtifactError: it is not one, or one of its limits is exceeded.
    """
    try:
        header = json.loads(text.decode("utf-8"), parse_constant=_number, parse_float=_number)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"the header is not UTF-8 JSON: {e}") from None
    keys = ("meta", "packing", "tensors", "columns")
    if not isinstance(header, dict) or set(header) != set(keys):
        raise ArtifactError(f"the header is not an object of {', '.join(keys)}")
    meta, packing = header["meta"], header["packing"]
    if not isinstance(meta, dict):
        raise ArtifactError("meta is not an object")
    if packing not in PACKINGS:
        known = " and ".join(PACKINGS)
        raise ArtifactError(
            f"unknown packing {packing!r:.40}: this version reads {known}; pack the model again"
        )
    vectors = tuple(_parse_vector(line) for line in _lines(header, "columns"))
    entries: dict[str, Entry] = {}
    for line in _lines(header, "tensors"):
        entry = _parse_entry(line, vectors)
        if entry.name in entries:
            raise ArtifactError(f"tensor {entry.name} comes twice")
        entries[entry.name] = entry
    if unused := set(range(len(vectors))) - {e.columns for e in entries.values()}:
        raise ArtifactError(f"no tensor has the column factors {min(unused)}")
    weights = sum(math.prod(e.shape) for e in entries.values())
    if weights + sum(v.length for v in vectors) > MAX_WEIGHTS:
        raise ArtifactError(f"more than {MAX_WEIGHTS} weights")
    return Header(meta, packing, tuple(entries.values()), vectors)


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def _lines(header: dict[str, Any], key: str) -> list[Any]:
    lines = header[key]
    if not isinstance(lines, list) or len(lines) > MAX_TENSORS:
        raise ArtifactError(f"the table of {key} is not a list of at most {MAX_TENSORS}")
    return lines


def _integer(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _base(value: Any) -> bool:
    return value is None or _integer(value, -(1 << 15), (1 << 15) - 1)


def _parse_vector(line: Any) -> Vector:
    if (
        not isinstance(line, list)
        or len(line) != 2
        or not _integer(line[0], 0, MAX_WEIGHTS)
        or not _base(line[1])
    ):
        raise ArtifactError(f"table of columns: {line!r:.80} is not [length, base]")
    return Vector(*line)


def _parse_entry(line: Any, vectors: tuple[Vector, ...]) -> Entry:
    if not isinstance(line, list) or len(line) not in (3, 6):
        raise ArtifactError(f"table of tensors: {line!r:.80} is not a line of 3 or 6")
    name, bits, dims = line[:3]
    if not isinstance(name, str) or len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise ArtifactError(f"table of tensors: {name!r:.80} is not a tensor name")
    if type(bits) is not int or bits not in ((16,) if len(line) == 3 else INT_BITS):
        raise ArtifactError(f"tensor {name}: {bits!r:.40} bits in a line of {len(line)}")
    if (
        not isinstance(dims, list)
        or len(dims) > MAX_DIMS
        or not all(_integer(d, 0, MAX_WEIGHTS) for d in dims)
        or math.prod(dims) > MAX_WEIGHTS
        or (bits != 16 and len(dims) != 2)
    ):
        raise ArtifactError(f"tensor {name}: bad shape {dims!r:.80}")
    entry = Entry(name, bits, tuple(dims), *line[3:])
    if bits == 16:
        return entry
    if not _integer(entry.group, COLUMN_GROUP + 1, MAX_GROUP):
        raise ArtifactError(f"tensor {name}: bad group {entry.group!r:.40}")
    if not _base(entry.steps):
        raise ArtifactError(f"tensor {name}: bad base of steps {entry.steps!r:.40}")
    if entry.columns is not None:
        if not _integer(entry.columns, 0, len(vectors) - 1):
            raise ArtifactError(f"tensor {name}: no column factors {entry.columns!r:.40}")
        if vectors[entry.columns].length != dims[1]:
            raise ArtifactError(
                f"tensor {name}: {vectors[entry.columns].length} factors for {dims[1]} columns"
            )
    return entry

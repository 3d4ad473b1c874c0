"""The artifact format and its reader: no pickle, and every limit is checked before memory is taken.

    file  = magic(6) version(u16) codec(u8) body size(u32) packed size(u32) blake2b-128(16)
            packed body, stream
    body  = length(u32) header, integers, low bytes of all halves, high bytes of all halves

All numbers are little-endian. The digest covers the 17 bytes before it and all that follows it. The
body is packed by the codec, or by lzma if that is rans. The module `header` describes the header
and the arrays of a file. Integers are codes and indices of steps. With the codec rans they are in
the stream; with other codecs they are in the body, and the stream is empty. In a body, integers are
a byte each, row by row; codes may also be column by column (packing "columns"). Halves are fp16;
their high bytes repeat far more than their low ones, so the two are stored apart.
"""

import hashlib
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.artifact.foreign import explain
from pgolf.artifact.header import Array, Header, arrays, parse_header
from pgolf.artifact.layout import Key, Layout
from pgolf.codecs import CODECS, body_codec, codec
from pgolf.errors import ArtifactError
from pgolf.quant.dequantize import QuantizedTensor, dequantize

MAGIC, VERSION = b"PGOLF\0", 2
HEAD = struct.Struct("<6sHBII16s")
DIGEST_BYTES = 16

MAX_FILE = MAX_DECODED = 512 << 20  # bytes
FREE_EXPANSION, MAX_EXPANSION = 64 << 20, 8  # a body is at most 64 MiB + 8 x file; a stream: `rans`
MAX_HEADER = 1 << 20
CHUNK = 1 << 16  # indices looked up at a time


@dataclass(frozen=True)
class Artifact:
    """What a file holds. Tensors are in the order of its table.

    Attributes:
        layout: the header, and the arrays that the tensors are made from.
        body_bytes, stream_bytes: of the packed body and of the stream; all else is the head.
        decoded_bytes: of the unpacked body, and a byte for each code of the stream.
    """

    tensors: dict[str, QuantizedTensor]
    codec: str
    layout: Layout
    file_bytes: int
    body_bytes: int
    stream_bytes: int
    decoded_bytes: int

    @property
    def meta(self) -> dict[str, Any]:
        return self.layout.header.meta

    @property
    def packing(self) -> str:
        return self.layout.header.packing

    def state_dict(self) -> dict[str, Tensor]:
        """fp32 weights by name."""
        return {name: dequantize(q) for name, q in self.tensors.items()}


def read_artifact(source: Path | str | bytes) -> Artifact:
    """Decode an artifact, from a file or from its bytes.

    Raises:
        ArtifactError: anything at all is wrong with it; the message says what. Nothing else is
            raised, and memory stays within a small multiple of the size that the file declares,
            which has to be within the limits above.
    """
    data = source if isinstance(source, bytes) else _read_file(Path(source))
    try:
        return _decode(data)
    except ArtifactError as e:
        where = "" if isinstance(source, bytes) else f"{source}: "
        raise ArtifactError(f"{where}{e}") from None


def digest(head: bytes, rest: bytes | memoryview) -> bytes:
    """Checksum of the head up to the checksum itself, and of what follows it."""
    checksum = hashlib.blake2b(head, digest_size=DIGEST_BYTES)
    checksum.update(rest)
    return checksum.digest()


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError(f"{path}: not a regular file")
            if status.st_size > MAX_FILE:
                raise ArtifactError(f"{path}: {status.st_size} bytes, the limit is {MAX_FILE}")
            return f.read(MAX_FILE)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ArtifactError(f"cannot read {path}: {reason}") from None


def _decode(data: bytes) -> Artifact:
    if len(data) < HEAD.size:
        raise ArtifactError(f"{len(data)} bytes are too few for an artifact")
    magic, version, codec_id, size, packed, checksum = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ArtifactError(f"it does not begin with PGOLF: not an artifact but {explain(data)}")
    if version != VERSION:
        raise ArtifactError(f"format version {version}; this pgolf reads version {VERSION}")
    name = next((name for name, known in CODECS.items() if known == codec_id), None)
    if name is None:
        raise ArtifactError(f"unknown codec {codec_id}")
    if size > min(MAX_DECODED, FREE_EXPANSION + MAX_EXPANSION * len(data)):
        raise ArtifactError(f"declares {size} bytes, too many for a file of {len(data)}")
    rest = memoryview(data)[HEAD.size :]
    if digest(data[: HEAD.size - DIGEST_BYTES], rest) != checksum:
        raise ArtifactError("wrong checksum: the file is damaged or cut short")
    if packed > len(rest) or (name != "rans" and packed < len(rest)):
        raise ArtifactError(f"a body of {packed} bytes in a file of {len(data)}")
    body = codec(body_codec(name)).decompress(rest[:packed], size)
    header, start = _header(body)
    stream = rest[packed:] if name == "rans" else None
    numbers = torch.frombuffer(body, dtype=torch.uint8)[start:]
    layout = Layout(header, _arrays(header, numbers, stream))
    if stream is not None:
        size += sum(math.prod(a.shape) for a in arrays(header)[0])
    tensors = _tensors(layout)
    return Artifact(tensors, name, layout, len(data), packed, len(rest) - packed, size)


def _header(body: bytearray) -> tuple[Header, int]:
    """The header, and where the data begins."""
    end = 4 + int.from_bytes(body[:4], "little")
    if end > min(len(body), 4 + MAX_HEADER):
        raise ArtifactError(f"a header of {end - 4} bytes in a body of {len(body)}")
    return parse_header(bytes(body[4:end])), end


def _arrays(header: Header, data: Tensor, stream: memoryview | None) -> dict[Key, Tensor]:
    """Cut the data of the body (uint8) and the stream into arrays; they must cover it exactly."""
    integers, halves = arrays(header)
    in_body = integers if stream is None else []
    sizes = [a.body_bytes() for a in in_body]
    count = sum(math.prod(a.shape) for a in halves)
    needed = sum(sizes) + 2 * count
    if needed != data.numel():
        raise ArtifactError(f"the table needs {needed} bytes of data, there are {data.numel()}")
    if stream is None:
        pieces = data[: sum(sizes)].split(sizes)
        decoded = [_unpack(p, header.packing, a) for p, a in zip(pieces, integers, strict=True)]
    else:
        decoded = _decode_stream(stream, integers)
    for array, matrix in zip(integers, decoded, strict=True):
        limit = 1 << (array.bits - 1)
        if matrix.numel() and not -limit <= int(matrix.min()) <= int(matrix.max()) < limit:
            raise ArtifactError(f"tensor {array.owner}: a code does not fit {array.bits} bits")

    low, high = data[sum(sizes) :].view(2, count)
    numbers = torch.stack((low, high), dim=1).view(torch.float16).flatten()
    decoded += numbers.split([math.prod(a.shape) for a in halves])
    return {
        (a.owner, a.kind): values.view(a.shape)
        for a, values in zip([*integers, *halves], decoded, strict=True)
    }


def _decode_stream(stream: memoryview, integers: list[Array]) -> list[Tensor]:
    shapes, groups = [a.shape for a in integers], [a.group for a in integers]
    return [torch.from_numpy(m) for m in codec("rans").decompress(stream, shapes, groups)]


def _unpack(packed: Tensor, packing: str, array: Array) -> Tensor:
    """int8 matrix of a piece of the body."""
    rows, columns = array.shape
    if packing == "columns" and array.kind == "codes":
        return packed.view(torch.int8).view(columns, rows).t().contiguous()
    return packed.view(torch.int8).view(rows, columns)


def _tensors(layout: Layout) -> dict[str, QuantizedTensor]:
    header, stored = layout.header, layout.stored
    factors = [
        _numbers(f"column factors {i}", stored[i, "columns"], v.base)
        for i, v in enumerate(header.columns)
    ]
    tensors = {}
    for e in header.tensors:
        if e.bits == 16:
            tensors[e.name] = QuantizedTensor(_finite(e.name, stored[e.name, "values"]))
            continue
        tensors[e.name] = QuantizedTensor(
            stored[e.name, "codes"],
            e.bits,
            _numbers(f"tensor {e.name}", stored[e.name, "steps"], e.steps),
            None if e.columns is None else factors[e.columns],
        )
    return tensors


def _numbers(whose: str, stored: Tensor, base: int | None) -> Tensor:
    """fp16 numbers (n,) of int8 distances (1, n) from `base`, or the halves as they are."""
    if base is None:
        return _finite(whose, stored)
    # Only files with steps on the grid need it.
    from pgolf.quant.step_grid import HIGHEST, LOWEST, step_values

    numbers = torch.empty(stored.numel(), dtype=torch.float16)
    for out, piece in zip(numbers.split(CHUNK), stored.flatten().split(CHUNK), strict=True):
        index = base + piece.to(torch.int64)
        if piece.numel() and not LOWEST <= int(index.min()) <= int(index.max()) <= HIGHEST:
            raise ArtifactError(f"{whose}: an index of a step is not from {LOWEST} to {HIGHEST}")
        out.copy_(step_values(index))
    return numbers


def _finite(whose: str, numbers: Tensor) -> Tensor:
    if not torch.isfinite(numbers).all():
        raise ArtifactError(f"{whose}: a value or step is not finite")
    return numbers

"""The artifact format and its reader: no pickle, and every limit is checked before memory is taken.

    file  = magic(6) version(u16) codec(u8) decoded size(u32) blake2b-128(16) compressed body
    body  = length(u32) header, codes, low bytes of all halves, high bytes of all halves
    header = JSON {"meta": {...}, "packing": "bytes"|"bits", "tensors": [[name, bits, [dims]], ...]}

All numbers are little-endian. The digest covers the 13 bytes before it and the compressed body.
Codes are those of the integer tensors in the order of the table, row by row, one a byte or packed
to bits (each tensor starts on a byte). Halves are fp16: first the steps of the integer tensors (one
a row), then the values of the fp16 tensors, both in the order of the table. Their high bytes repeat
far more than their low ones, so the two kinds lie apart.
"""

import hashlib
import json
import math
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.codecs import CODECS, codec
from pgolf.errors import ArtifactError
from pgolf.quant.dequantize import QuantizedTensor, dequantize

MAGIC, VERSION = b"PGOLF\0", 1
HEAD = struct.Struct("<6sHBI16s")
DIGEST_BYTES = 16
INT_BITS = (4, 5, 6, 7, 8)

MAX_FILE = MAX_DECODED = 512 << 20  # bytes; MAX_DECODED also limits the number of weights
FREE_EXPANSION, MAX_EXPANSION = 64 << 20, 8  # decoded <= 64 MiB + 8 x file
MAX_HEADER = 1 << 20
MAX_TENSORS = 4096
MAX_DIMS = 4
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
MAX_NAME = 128
UNPACK_CHUNK = 1 << 20  # codes unpacked at a time, a multiple of 8


@dataclass(frozen=True)
class Entry:
    """A line of the tensor table; bits 16 means fp16 values."""

    name: str
    bits: int
    shape: tuple[int, ...]

    def code_bytes(self, packing: str) -> int:
        """Bytes of its integer codes in the body."""
        if self.bits == 16:
            return 0
        bits = 8 if packing == "bytes" else self.bits
        return (math.prod(self.shape) * bits + 7) // 8

    def halves(self) -> int:
        """How many fp16 numbers it has: values, or steps of its rows."""
        return math.prod(self.shape) if self.bits == 16 else self.shape[0]


@dataclass(frozen=True)
class Artifact:
    """What a file holds. Tensors are in the order of its table."""

    meta: dict[str, Any]
    tensors: dict[str, QuantizedTensor]
    codec: str
    packing: str
    file_bytes: int
    decoded_bytes: int

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


def digest(head: bytes, body: bytes) -> bytes:
    """Checksum of the head up to the checksum itself, and the compressed body."""
    return hashlib.blake2b(head + body, digest_size=DIGEST_BYTES).digest()


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
    magic, version, codec_id, size, checksum = HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ArtifactError("not an artifact: it does not begin with PGOLF")
    if version != VERSION:
        raise ArtifactError(f"format version {version}; this pgolf reads version {VERSION}")
    names = [name for name, known in CODECS.items() if known == codec_id]
    if not names:
        raise ArtifactError(f"unknown codec {codec_id}")
    if size > min(MAX_DECODED, FREE_EXPANSION + MAX_EXPANSION * len(data)):
        raise ArtifactError(f"declares {size} bytes, too many for a file of {len(data)}")
    packed = data[HEAD.size :]
    if digest(data[: HEAD.size - DIGEST_BYTES], packed) != checksum:
        raise ArtifactError("wrong checksum: the file is damaged or cut short")
    body = bytearray(codec(names[0]).decompress(packed, size))
    meta, packing, entries, start = _parse_header(body)
    tensors = _parse_tensors(torch.frombuffer(body, dtype=torch.uint8)[start:], packing, entries)
    return Artifact(meta, tensors, names[0], packing, len(data), size)


def _parse_header(body: bytearray) -> tuple[dict[str, Any], str, list[Entry], int]:
    """Meta, packing, tensor table, and where the data begins."""
    end = 4 + int.from_bytes(body[:4], "little")
    if end > min(len(body), 4 + MAX_HEADER):
        raise ArtifactError(f"a header of {end - 4} bytes in a body of {len(body)}")
    try:
        header = json.loads(body[4:end].decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"the header is not UTF-8 JSON: {e}") from None
    if not isinstance(header, dict) or set(header) != {"meta", "packing", "tensors"}:
        raise ArtifactError("the header is not an object of meta, packing and tensors")
    meta, packing, table = header["meta"], header["packing"], header["tensors"]
    if not isinstance(meta, dict):
        raise ArtifactError("meta is not an object")
    if packing not in ("bytes", "bits"):
        raise ArtifactError(f"unknown packing {packing!r:.40}")
    if not isinstance(table, list) or len(table) > MAX_TENSORS:
        raise ArtifactError(f"the tensor table is not a list of at most {MAX_TENSORS}")
    entries: dict[str, Entry] = {}
    for line in table:
        entry = _parse_entry(line)
        if entry.name in entries:
            raise ArtifactError(f"tensor {entry.name} comes twice")
        entries[entry.name] = entry
    return meta, packing, list(entries.values()), end


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _parse_entry(line: Any) -> Entry:
    if not isinstance(line, list) or len(line) != 3:
        raise ArtifactError(f"tensor table: {line!r:.80} is not [name, bits, dims]")
    name, bits, dims = line
    if not isinstance(name, str) or len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise ArtifactError(f"tensor table: {name!r:.80} is not a tensor name")
    if type(bits) is not int or bits not in (*INT_BITS, 16):
        raise ArtifactError(f"tensor {name}: {bits!r:.40} bits")
    if (
        not isinstance(dims, list)
        or len(dims) > MAX_DIMS
        or not all(type(d) is int and 0 <= d <= MAX_DECODED for d in dims)
        or math.prod(dims) > MAX_DECODED
        or (bits != 16 and len(dims) != 2)
    ):
        raise ArtifactError(f"tensor {name}: bad shape {dims!r:.80}")
    return Entry(name, bits, tuple(dims))


def _parse_tensors(
    data: Tensor, packing: str, entries: list[Entry]
) -> dict[str, QuantizedTensor]:
    """Cut the data of the body (uint8) into tensors; they must cover it exactly."""
    code_sizes = [e.code_bytes(packing) for e in entries]
    halves = sum(e.halves() for e in entries)
    needed = sum(code_sizes) + 2 * halves
    if needed != data.numel():
        raise ArtifactError(f"the table needs {needed} bytes of data, there are {data.numel()}")
    if sum(math.prod(e.shape) for e in entries) > MAX_DECODED:
        raise ArtifactError(f"more than {MAX_DECODED} weights")

    # Steps come first, then values; tensors keep the order of the table.
    low, high = data[sum(code_sizes) :].view(2, halves)
    numbers = torch.stack((low, high), dim=1).view(torch.float16).flatten()
    by_part = sorted(entries, key=lambda e: e.bits == 16)
    parts = numbers.split([e.halves() for e in by_part])
    half = {e.name: part for e, part in zip(by_part, parts, strict=True)}

    tensors = {}
    for entry, packed in zip(entries, data[: sum(code_sizes)].split(code_sizes), strict=True):
        numbers = half[entry.name]
        if not torch.isfinite(numbers).all():
            raise ArtifactError(f"tensor {entry.name}: a value or step is not finite")
        if entry.bits == 16:
            tensors[entry.name] = QuantizedTensor(numbers.view(entry.shape))
        else:
            codes = _codes(packed, packing, entry).view(entry.shape)
            tensors[entry.name] = QuantizedTensor(codes, entry.bits, numbers)
    return tensors


def _codes(packed: Tensor, packing: str, entry: Entry) -> Tensor:
    """int8 codes of one tensor, all of them within its bits."""
    if packing == "bytes":
        codes = packed.view(torch.int8)
        limit = 1 << (entry.bits - 1)
        if codes.numel() and not -limit <= int(codes.min()) <= int(codes.max()) < limit:
            raise ArtifactError(f"tensor {entry.name}: a code does not fit {entry.bits} bits")
        return codes
    # Only files packed to bits need it. The reference: decoding takes no compiled code of ours.
    from pgolf.ops.pack_bits import reference_unpack

    codes = torch.empty(math.prod(entry.shape), dtype=torch.int8)
    pieces = packed.split(UNPACK_CHUNK // 8 * entry.bits)
    for out, piece in zip(codes.split(UNPACK_CHUNK), pieces, strict=True):
        out.copy_(reference_unpack(piece, entry.bits, out.numel()))
    return codes

"""Writing artifacts: the body, the smallest of codec and packing, and whose bytes they are.

The format is described in `container`. A codec compresses the body as one, so the bytes of a group
are an estimate: each group is compressed alone, quickly, and all are scaled to add up to the file.
"""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.artifact.container import (
    DIGEST_BYTES,
    HEAD,
    MAGIC,
    MAX_DECODED,
    VERSION,
    digest,
    read_artifact,
)
from pgolf.codecs import CODECS, codec
from pgolf.config import ArtifactConfig
from pgolf.errors import ArtifactError
from pgolf.files import atomic_write
from pgolf.ops.pack_bits import pack_bits
from pgolf.progress import Progress
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.policy import category
from pgolf.quant.quantize import QuantizedModel

GROUPS = ("attn", "mlp", "tok", "bigram", "ve", "scalars", "scales", "meta")


@dataclass(frozen=True)
class Encoded:
    """A whole file in memory; `tried` holds the size of every combination."""

    data: bytes
    codec: str
    packing: str
    tried: dict[str, int]


@dataclass(frozen=True)
class PackReport:
    """What was written.

    Attributes:
        total: size of the file.
        groups: its bytes by group; they add up to `total`. Estimated: each group compressed alone
            with zstd level 1, and all of them scaled to the total.
        tried: size of the file for each codec and packing that was tried, as 'zstd bytes'.
    """

    total: int
    groups: dict[str, int]
    tried: dict[str, int]
    codec: str
    packing: str


def encode(
    model: QuantizedModel, meta: Mapping[str, Any], config: ArtifactConfig, progress: bool = True
) -> Encoded:
    """The file's bytes with the smallest of the codecs and packings that `config` allows."""
    codecs = CODECS if config.codec == "auto" else (config.codec,)
    packings = ("bytes", "bits") if config.packing == "auto" else (config.packing,)
    bodies = {packing: _body(model.tensors, meta, packing) for packing in packings}
    names = [(name, packing) for packing in packings for name in codecs]
    files = {}
    # Two at a time: the codecs let go of the GIL, and each needs some hundred MB.
    with (
        Progress("compressing", len(names), "tries", enabled=progress) as bar,
        ThreadPoolExecutor(2) as pool,
    ):
        jobs = [pool.submit(_seal, bodies[packing], name, config) for name, packing in names]
        for key, job in zip(names, jobs, strict=True):
            files[key] = job.result()
            bar.update(note=f"{' '.join(key)}: {len(files[key]):,} bytes")
    best = min(names, key=lambda key: len(files[key]))
    return Encoded(files[best], *best, {" ".join(key): len(files[key]) for key in names})


def write_artifact(
    path: Path | str,
    model: QuantizedModel,
    meta: Mapping[str, Any],
    config: ArtifactConfig,
    progress: bool = True,
) -> PackReport:
    """Encode `model`, decode it again to be sure, and write it.

    Args:
        meta: JSON values that scoring needs (model config, sequence length, ...).

    Raises:
        ArtifactError: what was encoded does not decode to the same tensors.
        StorageError: the file could not be written.
    """
    encoded = encode(model, meta, config, progress)
    decoded = read_artifact(encoded.data)
    for name, q in model.tensors.items():
        if not _same(q, decoded.tensors[name]):
            raise ArtifactError(f"{name} does not survive packing: this is a bug")
    groups = _groups(model.tensors, meta, encoded)
    atomic_write(path, encoded.data)
    return PackReport(len(encoded.data), groups, encoded.tried, encoded.codec, encoded.packing)


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    if a.bits != b.bits or not torch.equal(a.data, b.data):
        return False
    return a.scale is None or torch.equal(a.scale, b.scale)


def _ordered(tensors: Mapping[str, QuantizedTensor]) -> list[tuple[str, QuantizedTensor]]:
    """By role, then layer: neighbours with like statistics compress a little better."""

    def key(item: tuple[str, QuantizedTensor]) -> tuple[str, list[int]]:
        return re.sub(r"\d+", "", item[0]), [int(n) for n in re.findall(r"\d+", item[0])]

    return sorted(tensors.items(), key=key)


def _header(tensors: Mapping[str, QuantizedTensor], meta: Mapping[str, Any], packing: str) -> bytes:
    table = [[name, q.bits, list(q.shape)] for name, q in _ordered(tensors)]
    header = {"meta": meta, "packing": packing, "tensors": table}
    text = json.dumps(header, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return len(text).to_bytes(4, "little") + text.encode("ascii")


def _codes(tensors: Mapping[str, QuantizedTensor], packing: str) -> bytes:
    parts = [q for _, q in _ordered(tensors) if q.scale is not None]
    if packing == "bits":
        return b"".join(pack_bits(q.data, q.bits).numpy().tobytes() for q in parts)
    return b"".join(q.data.numpy().tobytes() for q in parts)


def _planes(halves: Iterable[Tensor]) -> bytes:
    """Low bytes of all fp16 numbers, then their high bytes."""
    flat = torch.cat([h.flatten() for h in halves] or [torch.empty(0, dtype=torch.float16)])
    return flat.view(torch.uint8).view(-1, 2).t().contiguous().numpy().tobytes()


def _body(tensors: Mapping[str, QuantizedTensor], meta: Mapping[str, Any], packing: str) -> bytes:
    ordered = _ordered(tensors)
    scales = [q.scale for _, q in ordered if q.scale is not None]
    values = [q.data for _, q in ordered if q.scale is None]
    return _header(tensors, meta, packing) + _codes(tensors, packing) + _planes(scales + values)


def _seal(body: bytes, name: str, config: ArtifactConfig) -> bytes:
    """The file for a body."""
    if len(body) > MAX_DECODED:
        raise ArtifactError(f"the model is {len(body)} bytes decoded, the limit is {MAX_DECODED}")
    levels = {"zstd": config.zstd_level, "lzma": config.lzma_preset}
    packed = codec(name).compress(body, levels[name])
    head = HEAD.pack(MAGIC, VERSION, CODECS[name], len(body), bytes(DIGEST_BYTES))[:-DIGEST_BYTES]
    return head + digest(head, packed) + packed


def _groups(
    tensors: Mapping[str, QuantizedTensor], meta: Mapping[str, Any], encoded: Encoded
) -> dict[str, int]:
    """Bytes of the file by group, as `PackReport` has them."""
    alone = {"meta": _header(tensors, meta, encoded.packing)}
    alone["scales"] = _planes(q.scale for q in tensors.values() if q.scale is not None)
    for group in GROUPS[:6]:
        members = {name: q for name, q in tensors.items() if category(name) == group}
        values = [q.data for q in members.values() if q.scale is None]
        alone[group] = _codes(members, encoded.packing) + _planes(values)
    sizes = {g: len(codec("zstd").compress(alone[g], 1)) if alone[g] else 0 for g in GROUPS}

    # Round the running sum, not each share, so that the parts add up to the file.
    groups, total, so_far, done = {}, sum(sizes.values()), 0, 0
    for group in GROUPS:
        so_far += sizes[group]
        upto = len(encoded.data) * so_far // total
        groups[group], done = upto - done, upto
    return groups

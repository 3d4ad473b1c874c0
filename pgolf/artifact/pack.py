"""Writes artifacts with the codec and packing that give the smallest file.

`container` and `header` describe the format, `layout` decides how each array is stored.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgolf.artifact.container import (
    DIGEST_BYTES,
    HEAD,
    MAGIC,
    MAX_DECODED,
    VERSION,
    digest,
    read_artifact,
)
from pgolf.artifact.header import PACKINGS
from pgolf.artifact.layout import Layout, lay_out, pack_matrix, planes
from pgolf.artifact.sizes import byte_shares
from pgolf.codecs import CODECS, GENERAL, body_codec, codec, rans_encode
from pgolf.config import ArtifactConfig
from pgolf.errors import ArtifactError
from pgolf.files import atomic_write
from pgolf.progress import Progress
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.quantize import QuantizedModel


@dataclass(frozen=True)
class Encoded:
    """A whole file in memory.

    Attributes:
        tried: size of the file for every codec and packing that was tried, as in `PackReport`.
    """

    data: bytes
    codec: str
    packing: str
    tried: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class PackReport:
    """What was written.

    Attributes:
        total: size of the file.
        groups: its bytes by group; they add up to `total`. See `sizes` for how exact they are.
        tensors: its bytes by tensor with steps and column factors (shared ones count for the first
            tensor that has them); they add up to `total` with the head and header.
        tried: size of the file for each codec and packing that was tried, as 'zstd bytes' or
            'rans'.
    """

    total: int
    groups: dict[str, int]
    tensors: dict[str, int]
    tried: dict[str, int]
    codec: str
    packing: str


def encode(
    model: QuantizedModel, meta: Mapping[str, Any], config: ArtifactConfig, progress: bool = True
) -> Encoded:
    """The file's bytes with the smallest of the codecs and packings that `config` allows.

    Raises:
        ArtifactError: the model is too large for an artifact.
    """
    return encode_layout(lay_out(model.tensors, meta), config, progress)


def encode_layout(layout: Layout, config: ArtifactConfig, progress: bool = True) -> Encoded:
    """As `encode`, for arrays that are laid out."""
    todo = forms(config)
    files: dict[str, Encoded] = {}
    # Two at a time: the general codecs let go of the GIL, and each needs some hundred MB.
    with (
        Progress("compressing", len(todo), "tries", enabled=progress) as bar,
        ThreadPoolExecutor(2) as pool,
    ):
        jobs = {pool.submit(encode_form, layout, *form, config): form for form in todo}
        for job in as_completed(jobs):
            key = form_name(*jobs[job])
            files[key] = job.result()
            bar.update(note=f"{key}: {len(files[key].data):,} bytes")
    tried = {key: len(files[key].data) for key in sorted(files)}
    return dataclasses.replace(files[min(tried, key=tried.__getitem__)], tried=tried)


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
    return write_encoded(path, model, encode(model, meta, config, progress))


def write_encoded(path: Path | str, model: QuantizedModel, encoded: Encoded) -> PackReport:
    """`write_artifact` of what `encode` gave for `model`."""
    decoded = read_artifact(encoded.data)
    for name, q in model.tensors.items():
        if not _same(q, decoded.tensors[name]):
            raise ArtifactError(f"{name} does not survive packing: this is a bug")
    groups, tensors = byte_shares(decoded)
    atomic_write(path, encoded.data)
    return PackReport(
        len(encoded.data), groups, tensors, encoded.tried, encoded.codec, encoded.packing
    )


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = ((a.data, b.data), (a.steps, b.steps), (a.columns, b.columns))
    return a.bits == b.bits and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in pairs
    )


def forms(config: ArtifactConfig) -> list[tuple[str, str]]:
    """(codec, packing) that `config` allows, the slowest first."""
    names = reversed(CODECS) if config.codec == "auto" else (config.codec,)
    packings = PACKINGS if config.packing == "auto" else (config.packing,)
    return [(n, p) for n in names for p in (packings if n in GENERAL else PACKINGS[:1])]


def form_name(name: str, packing: str) -> str:
    """The name of a codec and packing: 'zstd columns', or 'rans', which has only one."""
    return f"{name} {packing}" if name in GENERAL else name


def encode_form(layout: Layout, name: str, packing: str, config: ArtifactConfig) -> Encoded:
    """The file with the codec `name` and this packing.

    Raises:
        ArtifactError: the model is too large for an artifact.
    """
    levels = (config.zstd_level, config.lzma_preset, config.brotli_quality)
    level = dict(zip(GENERAL, levels, strict=True))
    header = dataclasses.replace(layout.header, packing=packing).to_json()
    body, stream = len(header).to_bytes(4, "little") + header, b""
    table, matrices = layout.integers()
    if name == "rans":
        stream = rans_encode.compress([m.numpy() for m in matrices], [a.group for a in table])
    else:
        body += b"".join(pack_matrix(*pair, packing) for pair in zip(table, matrices, strict=True))
    body += planes(layout.halves()[1])
    if len(body) > MAX_DECODED:
        raise ArtifactError(f"the model is {len(body)} bytes decoded, the limit is {MAX_DECODED}")
    general = body_codec(name)
    packed = codec(general).compress(body, level[general])
    head = HEAD.pack(MAGIC, VERSION, CODECS[name], len(body), len(packed), bytes(DIGEST_BYTES))
    head, rest = head[:-DIGEST_BYTES], packed + stream
    return Encoded(head + digest(head, rest) + rest, name, packing)

"""A small quantised model, and a forger that seals any content with a right checksum."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pgolf.artifact.container import DIGEST_BYTES, HEAD, MAGIC, VERSION, digest
from pgolf.artifact.pack import encode
from pgolf.codecs import CODECS, body_codec, codec
from pgolf.config import ArtifactConfig, QuantConfig
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.quantize import QuantizedModel, quantize
from pgolf.quant.step_grid import step_values

META = {"recipe": "demo", "model": {"layers": 2, "dim": 24}, "seq_len": 256, "note": "é"}


@pytest.fixture(scope="session")
def model() -> QuantizedModel:
    """All kinds of tensors: each grid, fp16 matrices, vectors, scalars, an empty one; steps and
    column factors on the grid of steps and off it, factors that two matrices share."""
    torch.manual_seed(0)
    state = {
        "tok_emb.weight": torch.randn(33, 24),
        "bigram.embed.weight": torch.zeros(7, 9),
        "bigram.scale": torch.tensor(0.05),
        "ve_shared.embed.weight": torch.randn(11, 13),
        "skip_weights": torch.randn(0, 24),
    }
    for i in range(11):  # two digits, so that the order by layer differs from that of names
        state[f"blocks.{i}.attn.c_q.weight"] = torch.randn(24, 24)
        state[f"blocks.{i}.mlp.fc.weight"] = torch.randn(50, 24)
        state[f"blocks.{i}.resid_mix"] = torch.randn(2, 24)
    config = QuantConfig(
        small_numel=0, attn_bits="5", mlp_bits="8/4", tok_bits="16", bigram_bits="4", ve_bits="7",
        bits_overrides="blocks.3.*=6,blocks.4.*=8", full_range=True,
    )
    model = quantize(state, config, progress=False)
    on_grid = {
        f"blocks.{i}.{role}.weight": columns
        for i in range(5, 8)
        for columns in (step_values(torch.randint(-9, 9, (24,))),)
        for role in ("attn.c_q", "mlp.fc")
    }
    tensors = {
        name: q if q.steps is None else dataclasses.replace(q, steps=q.steps * 1.01)
        for name, q in model.tensors.items()
    }
    for name, columns in on_grid.items():
        q = tensors[name]
        steps = step_values(torch.randint(-60, -40, q.steps.shape))
        tensors[name] = QuantizedTensor(q.data, q.bits, steps, columns.clone())
    q = tensors["blocks.9.mlp.fc.weight"]
    columns = torch.rand(24).half()
    tensors["blocks.9.mlp.fc.weight"] = dataclasses.replace(q, columns=columns)
    return dataclasses.replace(model, tensors=tensors)


@pytest.fixture(scope="session")
def meta() -> dict[str, Any]:
    return META


def seal(
    packed: bytes,
    size: int,
    codec_id: int = 1,
    stream: bytes = b"",
    version: int = VERSION,
    length: int | None = None,
) -> bytes:
    """A file with this packed body and a right checksum, whatever else is wrong."""
    length = len(packed) if length is None else length
    head = HEAD.pack(MAGIC, version, codec_id, size, length, bytes(DIGEST_BYTES))
    head = head[:-DIGEST_BYTES]
    return head + digest(head, packed + stream) + packed + stream


def from_body(body: bytes, name: str = "zstd", stream: bytes | None = None) -> bytes:
    """A file whose body is `body`, packed with `name`; with a stream, its codec is rans."""
    name, general = (name, name) if stream is None else ("rans", body_codec("rans"))
    return seal(codec(general).compress(body, 1), len(body), CODECS[name], stream or b"")


def from_header(header: Any, data: bytes = b"", stream: bytes | None = None) -> bytes:
    """A file with this header (JSON text, or an object) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return from_body(len(text).to_bytes(4, "little") + text + data, stream=stream)


def from_table(
    *lines: Any, data: bytes = b"", packing: Any = "bytes", columns: Any = (), stream=None
) -> bytes:
    """A file with these tables."""
    header = {"meta": {}, "packing": packing, "tensors": list(lines), "columns": columns}
    return from_header(header, data, stream)


@pytest.fixture(scope="session")
def forge() -> SimpleNamespace:
    return SimpleNamespace(seal=seal, body=from_body, header=from_header, table=from_table)


@pytest.fixture(scope="module")
def good(model, meta) -> bytes:
    """A whole file."""
    return encode(model, meta, ArtifactConfig(codec="zstd", packing="bytes"), False).data

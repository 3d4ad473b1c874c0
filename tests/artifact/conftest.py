"""A small quantised model, and a forger that seals any content with a right checksum."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pgolf.artifact.container import DIGEST_BYTES, HEAD, MAGIC, VERSION, digest
from pgolf.codecs import CODECS, codec
from pgolf.config import QuantConfig
from pgolf.quant.quantize import QuantizedModel, quantize

META = {"recipe": "demo", "model": {"layers": 2, "dim": 24}, "seq_len": 256, "note": "é"}


@pytest.fixture(scope="session")
def model() -> QuantizedModel:
    """All kinds of tensors: each grid, fp16 matrices, vectors, scalars, an empty one."""
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
    return quantize(state, config, progress=False)


@pytest.fixture(scope="session")
def meta() -> dict[str, Any]:
    return META


def seal(packed: bytes, size: int, codec_id: int = 1, version: int = VERSION) -> bytes:
    """A file with this compressed body and a right checksum, whatever else is wrong."""
    head = HEAD.pack(MAGIC, version, codec_id, size, bytes(DIGEST_BYTES))[:-DIGEST_BYTES]
    return head + digest(head, packed) + packed


def from_body(body: bytes, name: str = "zstd") -> bytes:
    """A file that decodes to `body`."""
    return seal(codec(name).compress(body, 1), len(body), CODECS[name])


def from_header(header: Any, data: bytes = b"") -> bytes:
    """A file with this header (JSON text, or an object) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return from_body(len(text).to_bytes(4, "little") + text + data)


def from_table(*lines: Any, data: bytes = b"", packing: str = "bytes") -> bytes:
    """A file with this tensor table."""
    return from_header({"meta": {}, "packing": packing, "tensors": list(lines)}, data)


@pytest.fixture(scope="session")
def forge() -> SimpleNamespace:
    return SimpleNamespace(seal=seal, body=from_body, header=from_header, table=from_table)

"""Random damage to small artifacts of every codec.

A damaged file is an ArtifactError or a well-formed artifact, and nothing else, soon and in little
memory. Half of the mutants are sealed with a right checksum, so that what is behind it meets them.
"""

import random
import time
from pathlib import Path

import pytest
import torch

from pgolf.artifact.container import HEAD, Artifact, read_artifact
from pgolf.artifact.pack import encode
from pgolf.codecs import CODECS, body_codec, codec
from pgolf.config import ArtifactConfig
from pgolf.errors import ArtifactError
from pgolf.quant.dequantize import QuantizedTensor
from pgolf.quant.quantize import QuantizedModel
from pgolf.quant.step_grid import step_values

STATUS = Path("/proc/self/status")
SECONDS = 2.0  # of the process: the machine may be busy with others
FREE_MEMORY = 64 << 20
FORMS = [*((name, "bytes") for name in CODECS), ("zstd", "columns")]


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """A small model in every form: shared factors, steps as indices and as halves, fp16 values."""
    torch.manual_seed(1)
    columns = step_values(torch.randint(-5, 5, (8,)))
    steps = step_values(torch.randint(-60, -50, (12,)))
    tensors = {
        "a.weight": QuantizedTensor(torch.randint(-8, 8, (12, 8)).char(), 4, steps, columns),
        "b.weight": QuantizedTensor(
            torch.randn(5, 8).mul(9).char(), 6, torch.rand(5).half(), columns
        ),
        "c": QuantizedTensor(torch.randn(7).half()),
    }
    model = QuantizedModel(tensors, {}, {})
    return [encode(model, {"x": [1]}, ArtifactConfig(*form), False).data for form in FORMS]


def mutate(rng: random.Random, good: bytes, forge) -> bytes:
    """Damage the file, or its body, stream or decoded body, and seal it again."""
    _, _, codec_id, size, length, _ = HEAD.unpack_from(good)
    packed, stream = good[HEAD.size : HEAD.size + length], good[HEAD.size + length :]
    name = body_codec(list(CODECS)[codec_id - 1])
    level = rng.choice((0, 0, 0, 1, 2, 3))
    parts = [good, packed, codec(name).decompress(packed, size), stream or packed]
    data = bytearray(parts[level])
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        # The head of the data has the most structure: hit it as often as all the rest.
        at = rng.randrange(min(len(data), rng.choice((32, 400, len(data), len(data)))))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b'\0\xff\x7f[]{}",:-0123456789.eE')
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 300))]
        elif kind == 3:
            data[at:at] = rng.choice((b"9", b"-", b"]", b'"', bytes(9), bytes(data[:60])))
        else:
            other = rng.randrange(len(data))
            data[at : at + 8] = data[other : other + 8]
        data = data or bytearray(1)
    if level == 0:
        return bytes(data)
    if level == 2:
        return forge.body(bytes(data), name, stream if stream else None)
    if level == 3 and stream:
        return forge.seal(packed, size, codec_id, bytes(data))
    return forge.seal(bytes(data), size, codec_id, stream)


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, what it has, or VmHWM, its peak."""
    return next(int(t.split()[1]) for t in STATUS.read_text().splitlines() if field in t) << 10


def declared(data: bytes) -> int:
    """The size that a head declares."""
    return HEAD.unpack_from(data)[3] if len(data) >= HEAD.size else 0


def fuzz(files: list[bytes], forge, seeds: range) -> dict[str, int]:
    """Read damaged files: an ArtifactError or a well-formed artifact, and nothing else."""
    seen = {"refused": 0, "read": 0}
    for seed in seeds:
        rng = random.Random(seed)
        data = mutate(rng, rng.choice(files), forge)
        if STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = memory("VmRSS")
        began = time.process_time()
        try:
            artifact = read_artifact(data)
        except ArtifactError as e:
            assert len(str(e)) < 400
            seen["refused"] += 1
        else:
            assert isinstance(artifact, Artifact) and isinstance(artifact.meta, dict)
            for name, tensor in artifact.state_dict().items():
                assert tensor.shape == artifact.tensors[name].shape
            seen["read"] += 1
        assert time.process_time() - began < SECONDS, seed
        if STATUS.exists():
            assert memory("VmHWM") - before < FREE_MEMORY + 2 * declared(data), seed
    return seen


def test_fuzz_sample(files, forge):
    seen = fuzz(files, forge, range(500))
    assert seen["refused"] > 250 and seen["read"] > 3, "both ends must be reached"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_fuzz(files, forge, part: int):
    fuzz(files, forge, range(20_000 * part, 20_000 * (part + 1)))

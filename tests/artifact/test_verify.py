"""`pgolf verify`: what it lists, and what it refuses."""

import pytest

from pgolf.artifact.pack import write_artifact
from pgolf.artifact.verify import main, verify
from pgolf.config import ArtifactConfig
from pgolf.errors import ArtifactError


@pytest.fixture(params=["bytes", "bits"])
def written(request, tmp_path, model, meta):
    config = ArtifactConfig(codec="zstd", packing=request.param)
    return tmp_path / "a.pgolf", write_artifact(tmp_path / "a.pgolf", model, meta, config, False)


def test_lists_every_tensor_and_the_sizes(written, model, capsys):
    path, packed = written
    report = verify(path)
    text = report.to_text()
    for name, q in model.tensors.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert ("float16" if q.bits == 16 else f"int{q.bits}") in line
    assert "6 x" not in text and "24 x 24" in text and "scalar" in text and "0 x 24" in text
    weights = sum(q.data.numel() for q in model.tensors.values())
    assert f"{len(model.tensors)} tensors, {weights:,} weights" in text
    assert f"valid, {packed.total:,} bytes with zstd" in text and '"recipe": "demo"' in text
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_bytes_before_compression_add_up(written):
    report = verify(written[0])
    c_q = report.tensor_bytes["blocks.0.attn.c_q.weight"]
    assert c_q == 24 * 24 * (8 if written[1].packing == "bytes" else 5) // 8 + 2 * 24
    assert report.tensor_bytes["bigram.scale"] == 2
    header = report.artifact.decoded_bytes - sum(report.tensor_bytes.values())
    assert 0 < header < 3000


def test_a_damaged_file_is_an_error(written):
    path, _ = written
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="checksum"):
        main([str(path)])


def test_usage_errors_do_not_look_like_success(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2 and "pgolf verify" in capsys.readouterr().err

"""`pgolf verify`: what it lists, and what it refuses."""

import json

import pytest

from pgolf.artifact.pack import write_artifact
from pgolf.artifact.verify import verify
from pgolf.cli.verify import main
from pgolf.config import ArtifactConfig
from pgolf.errors import ArtifactError


@pytest.fixture(params=["zstd", "rans"])
def written(request, tmp_path, model, meta):
    config = ArtifactConfig(codec=request.param, packing="bytes")
    return tmp_path / "a.pgolf", write_artifact(tmp_path / "a.pgolf", model, meta, config, False)


def test_lists_every_tensor_and_the_sizes(written, model, capsys):
    path, packed = written
    report = verify(path)
    text = report.to_text()
    for name, q in model.tensors.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert ("float16" if q.bits == 16 else f"int{q.bits}") in line
        assert f" {packed.tensors[name]:,} " in line
    assert "6 x" not in text and "24 x 24" in text and "scalar" in text and "0 x 24" in text
    weights = sum(q.data.numel() for q in model.tensors.values())
    assert f"{len(model.tensors)} tensors, {weights:,} weights" in text
    assert f"valid, {packed.total:,} bytes with {packed.codec}" in text
    assert '"recipe": "demo"' in text
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_json_has_what_the_table_has(written, model, meta, capsys):
    path, packed = written
    assert main([str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == verify(path).to_dict()
    assert set(report) == {
        "path", "format", "codec", "packing", "file_bytes", "decoded_bytes", "weights",
        "bytes_by_group", "meta", "tensors",
    }
    assert (report["codec"], report["file_bytes"]) == (packed.codec, path.stat().st_size)
    assert report["meta"] == meta and report["bytes_by_group"] == packed.groups
    rows = {row["name"]: row for row in report["tensors"]}
    assert {name: row["file_bytes"] for name, row in rows.items()} == packed.tensors
    fc = rows["blocks.6.mlp.fc.weight"]
    assert (fc["stored"], fc["shape"], fc["steps"]) == ("int8", [50, 24], "indices")
    assert (fc["columns"], fc["columns_index"]) == ("indices", 1)
    assert fc["bits_per_weight"] == 8 * fc["file_bytes"] / 1200
    assert rows["blocks.9.mlp.fc.weight"]["columns"] == "halves"
    assert rows["blocks.0.mlp.fc.weight"]["steps"] == "halves"
    scalar = rows["bigram.scale"]
    assert (scalar["steps"], scalar["columns"], scalar["shape"]) == (None, None, [])
    assert rows["skip_weights"]["bits_per_weight"] is None


def test_decoded_bytes_are_those_before_packing(written, model):
    codes = sum(q.data.numel() for q in model.tensors.values() if q.bits != 16)
    halves = sum(q.data.numel() for q in model.tensors.values() if q.bits == 16)
    header = verify(written[0]).artifact.decoded_bytes - codes - 2 * halves
    assert 1000 < header < 6000


def test_a_damaged_file_is_an_error(written):
    path, _ = written
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="checksum"):
        main([str(path)])


def test_usage_errors_do_not_look_like_success(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2 and "pgolf verify" in capsys.readouterr().err

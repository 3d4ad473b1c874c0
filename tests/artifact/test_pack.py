"""Round trip, determinism, sizes that add up, and what decoding imports."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf.artifact import container, pack
from pgolf.artifact.container import Artifact, read_artifact
from pgolf.artifact.header import PACKINGS
from pgolf.artifact.layout import lay_out
from pgolf.artifact.pack import encode, write_artifact
from pgolf.artifact.sizes import GROUPS
from pgolf.codecs import CODECS, GENERAL
from pgolf.config import ArtifactConfig
from pgolf.errors import ArtifactError, StorageError
from pgolf.quant.dequantize import QuantizedTensor, dequantize
from pgolf.quant.step_grid import step_values

FORMS = [*itertools.product(GENERAL, PACKINGS), *((c, "bytes") for c in CODECS if c not in GENERAL)]


def assert_same(decoded: dict[str, torch.Tensor], model) -> None:
    assert set(decoded) == set(model.tensors)
    for name, q in model.tensors.items():
        assert decoded[name].dtype == torch.float32
        assert torch.equal(decoded[name], dequantize(q)), name


@pytest.mark.parametrize(("codec", "packing"), FORMS)
def test_decoded_values_are_exactly_the_quantised_ones(tmp_path, model, meta, codec, packing):
    config = ArtifactConfig(codec=codec, packing=packing)
    report = write_artifact(tmp_path / "a", model, meta, config, progress=False)
    artifact = read_artifact(tmp_path / "a")
    assert_same(artifact.state_dict(), model)
    for name, q in model.tensors.items():
        stored = artifact.tensors[name]
        assert (stored.bits, stored.shape) == (q.bits, q.shape)
        for a, b in ((stored.data, q.data), (stored.steps, q.steps), (stored.columns, q.columns)):
            assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)
    assert artifact.meta == meta
    assert (artifact.codec, artifact.packing) == (report.codec, report.packing) == (codec, packing)
    assert report.total == artifact.file_bytes == (tmp_path / "a").stat().st_size


def test_bytes_on_disk_are_deterministic(tmp_path, model, meta):
    backwards = dict(reversed(model.tensors.items()))
    for name, m in (("a", model), ("b", dataclasses.replace(model, tensors=backwards))):
        write_artifact(tmp_path / name, m, meta, ArtifactConfig(), progress=False)
        meta = dict(reversed(meta.items()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_auto_keeps_the_smallest_and_says_what_each_gave(tmp_path, model, meta):
    report = write_artifact(tmp_path / "a", model, meta, ArtifactConfig(), progress=False)
    keys = {form: " ".join(form) if form[0] in GENERAL else form[0] for form in FORMS}
    assert set(report.tried) == set(keys.values())
    for (codec, packing), key in keys.items():
        size = len(encode(model, meta, ArtifactConfig(codec=codec, packing=packing), False).data)
        assert report.tried[key] == size
    assert report.total == min(report.tried.values())
    assert report.tried[keys[report.codec, report.packing]] == report.total


@pytest.mark.parametrize(("codec", "packing"), [f for f in FORMS if f[1] == "bytes"])
def test_bytes_by_group_add_up_to_the_file(tmp_path, model, meta, codec, packing):
    config = ArtifactConfig(codec=codec, packing=packing)
    report = write_artifact(tmp_path / "a", model, meta, config, progress=False)
    assert list(report.groups) == list(GROUPS)
    assert sum(report.groups.values()) == report.total
    # 11 x 24 x 24 codes of 5 bits, 11 x 50 x 24 multiples of 4: both hardly compress further.
    assert 3000 < report.groups["attn"] < 5500
    assert 8000 < report.groups["mlp"] < 12500
    assert report.groups["bigram"] < 60, "a table of zeros and a scalar"
    assert all(size for group, size in report.groups.items() if group != "bigram")
    assert list(report.tensors) == list(read_artifact(tmp_path / "a").tensors)
    without = report.total - sum(report.tensors.values())
    assert abs(without - report.groups["meta"]) <= len(report.tensors), "each is rounded"


def test_steps_on_the_grid_are_indices_and_equal_factors_are_stored_once(model, meta):
    header = read_artifact(encode(model, meta, ArtifactConfig("zstd"), False).data).layout.header
    entries = {e.name: e for e in header.tensors}
    on_grid = {n for n, e in entries.items() if e.bits != 16 and e.steps is not None}
    names = {f"blocks.{i}.{role}.weight" for i in (5, 6, 7) for role in ("attn.c_q", "mlp.fc")}
    assert on_grid == names
    assert [v.length for v in header.columns] == [24] * 4 and header.columns[3].base is None
    for i in (5, 6, 7):
        q, fc = (entries[f"blocks.{i}.{role}.weight"] for role in ("attn.c_q", "mlp.fc"))
        assert q.columns == fc.columns == i - 5
        assert q.group != fc.group and q.group == entries["blocks.0.attn.c_q.weight"].group


def test_steps_too_far_apart_for_indices_are_halves():
    codes = torch.ones(4, 3).char()
    for apart, base in ((255, 28), (256, None)):
        steps = step_values(torch.tensor([-100, -100, -99, -100 + apart]))
        layout = lay_out({"a.weight": QuantizedTensor(codes, 6, steps)}, {})
        assert layout.header.tensors[0].steps == base


def test_indices_of_large_tensors_are_looked_up_in_pieces(monkeypatch, model, meta):
    monkeypatch.setattr(container, "CHUNK", 2)
    encoded = encode(model, meta, ArtifactConfig(codec="zstd", packing="bytes"), False)
    assert_same(read_artifact(encoded.data).state_dict(), model)


def test_a_model_that_does_not_survive_is_not_written(tmp_path, model, meta):
    codes = torch.full((4, 4), 16, dtype=torch.int8)
    bad = QuantizedTensor(codes, 5, torch.ones(4).half())
    tensors = model.tensors | {"blocks.0.attn.c_q.weight": bad}
    with pytest.raises(ArtifactError, match="blocks.0.attn.c_q.weight: a code does not fit 5 bits"):
        write_artifact(
            tmp_path / "a", dataclasses.replace(model, tensors=tensors), meta,
            ArtifactConfig(packing="bytes"), progress=False,
        )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["steps", "columns"])
def test_what_decodes_to_other_values_is_not_written(tmp_path, monkeypatch, model, meta, part):
    def other_step(data: bytes) -> Artifact:
        artifact = read_artifact(data)
        getattr(artifact.tensors["blocks.9.mlp.fc.weight"], part)[5] *= 1.01
        return artifact

    monkeypatch.setattr(pack, "read_artifact", other_step)
    with pytest.raises(ArtifactError, match="blocks.9.mlp.fc.weight does not survive"):
        write_artifact(tmp_path / "a", model, meta, ArtifactConfig(codec="zstd"), progress=False)
    assert not (tmp_path / "a").exists()


def test_a_folder_in_the_way_is_a_storage_error(tmp_path, model, meta):
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        write_artifact(tmp_path / "a", model, meta, ArtifactConfig(codec="zstd"), progress=False)


def test_views_and_strides_are_written_by_value(model, meta):
    q = model.tensors["ve_shared.embed.weight"]
    steps = q.steps.repeat_interleave(2)[::2]
    strided = QuantizedTensor(q.data.t().contiguous().t(), q.bits, steps)
    other = dataclasses.replace(model, tensors=model.tensors | {"ve_shared.embed.weight": strided})
    config = ArtifactConfig(codec="zstd")
    assert encode(other, meta, config, False).data == encode(model, meta, config, False).data


def test_decoding_imports_nothing_that_it_does_not_need(tmp_path, model, meta):
    """The scoring process pays for every module it loads."""
    config = ArtifactConfig(codec="lzma", packing="bytes")
    write_artifact(tmp_path / "a", model, meta, config, progress=False)
    code = (
        "import sys; from pgolf.artifact.container import read_artifact\n"
        f"read_artifact({str(tmp_path / 'a')!r})\n"
        "import json; print(json.dumps([m for m in sys.modules if m.startswith('pgolf')]))\n"
        "assert 'zstandard' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert set(json.loads(done.stdout)) == {
        "pgolf", "pgolf.errors", "pgolf.artifact", "pgolf.artifact.container",
        "pgolf.artifact.foreign", "pgolf.artifact.header",
            "pgolf.artifact.layout", "pgolf.codecs", "pgolf.codecs.lzma", "pgolf.quant",
        "pgolf.quant.dequantize", "pgolf.quant.step_grid", "pgolf.roles",
    }

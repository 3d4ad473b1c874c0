"""Files of other programs are told by what they hold, and the way in is named."""

import io
import lzma
import zlib

import pytest
import torch
import zstandard

from pgolf.artifact.container import read_artifact
from pgolf.artifact.foreign import explain, refuse_foreign
from pgolf.artifact.pack import encode
from pgolf.cli import main
from pgolf.config import ArtifactConfig
from pgolf.errors import ArtifactError

from .conftest import META


def saved(**options) -> bytes:
    content = io.BytesIO()
    torch.save({"tok_emb.weight": torch.zeros(4, 4)}, content, **options)
    return content.getvalue()


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
RAW = b"\x0e\0\0\0" + b'{"tensors": 1}' + bytes(range(256))
MAKERS = {
    "a file of torch.save, as final_model.pt": saved,
    "torch.save, as": lambda: saved(_use_new_zipfile_serialization=False),
    "compressed with zlib, the quantised model of a public script": lambda: zlib.compress(
        saved(), 9
    ),
    "compressed with lzma, the quantised": lambda: lzma.compress(saved(), preset=9),
    "compressed with zstd, the quantised": lambda: zstandard.compress(saved(), 22),
    "a safetensors file": lambda: len(HEADER).to_bytes(8, "little") + HEADER + bytes(4),
    "the layout of PR 478's script": lambda: zstandard.compress(RAW),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_command_says_what_it_is(kind, tmp_path, capsys):
    file = tmp_path / "final_model.pt"
    file.write_bytes(MAKERS[kind]())
    commands = (
        ["verify", file],
        ["sample", file],
        ["eval", file],
        ["pack", file, "--out", tmp_path / "new"],
    )
    for command in commands:
        assert main([str(word) for word in command]) == 2, command
        output = capsys.readouterr().err
        assert kind in output and "import" in output and str(file) in output, command
        assert len(output.splitlines()) == 1


def test_pack_of_an_artifact_asks_for_its_run(model, tmp_path, capsys):
    file = tmp_path / "artifact"
    file.write_bytes(encode(model, META, ArtifactConfig(codec="zstd"), progress=False).data)
    refuse_foreign(file)
    assert main(["pack", str(file), "--out", str(tmp_path / "new")]) == 2
    assert "is a file: name the run folder" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"x", b"\x78\x9c", b"PK\x03\x04 a zip of texts", bytes(99)])
def test_others_are_unknown(data, tmp_path):
    assert "unknown" in explain(data)
    with pytest.raises(ArtifactError):
        read_artifact(data)


def test_damaged_files_are_no_bugs():
    packed = lzma.compress(saved())
    for cut in range(1, 200, 7):
        explain(packed[:cut])
        explain(packed[:8] + b"\xff" * cut)

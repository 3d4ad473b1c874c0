"""`pgolf import` and `pgolf export`: weights of other programs come in, and ours go out."""

import io
import json
import lzma
import sys

import pytest
import torch

import pgolf
from pgolf.artifact.container import read_artifact
from pgolf.cli import main
from pgolf.config import from_dict
from pgolf.errors import ConfigError
from pgolf.training.export_weights import export_weights, weights_of
from pgolf.training.repack import load_weights
from pgolf.training.run_folder import RunFolder, read_config

from .tiny import TINY

QUICK = [*TINY, "quantizer=lite", "attn_bits=16", "mlp_bits=16", "tok_bits=16", "bigram_bits=16"]
QUICK += ["ve_bits=16", "grid=rows"]


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def state(finished) -> dict[str, torch.Tensor]:
    """Weights of a run, as a public script names and saves them."""
    model, _ = pgolf.load_model(finished, "cpu", "fp32")
    factors = {n: p.reshape(1) if "layer_scales" in n else p for n, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in factors.items()}


def imported(file, out, shards, *words: str) -> int:
    return run("import", file, "--recipe", "demo", "--out", out, f"data={shards}", *QUICK, *words)


def test_a_run_of_their_weights(state, shards, tmp_path, capsys):
    """The checkpoint has the weights exactly, the artifact as fp16; the commands take it."""
    file, out = tmp_path / "final_model.pt", tmp_path / "theirs"
    torch.save(state, file)
    assert imported(file, out, shards) == 0
    said = capsys.readouterr().out
    assert "a tensor a layer" in said and "activation=leaky_relu2" in said
    names = {"config.json", "data.json", "imported.json", "tokenizer.model"}
    names |= {"checkpoints", "artifact"}
    # Nothing was trained: no result, no metrics.
    assert {p.name for p in out.iterdir()} == names
    config = from_dict(read_config(out))
    model, words = load_weights(out, config, torch.device("cpu"))
    assert words == "step-0000000: last weights"
    for name, p in model.named_parameters():
        assert torch.equal(p.float().reshape(-1), state[name].reshape(-1)), name
    theirs, _ = pgolf.load_model(out, "cpu", "fp32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        a, b = (m.logits(m.features(ids)) for m in (model, theirs))
    torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    assert run("verify", out / "artifact") == 0
    assert run("sample", out / "artifact", "--tokens", 5, "--device", "cpu") == 0
    assert run("pack", out, "--out", tmp_path / "small", "attn_bits=5", "mlp_bits=5") == 0
    assert (tmp_path / "small").stat().st_size < (out / "artifact").stat().st_size
    with pytest.raises(ConfigError, match="no training to resume"):
        pgolf.train("demo", **dict(w.split("=") for w in QUICK), data=shards, out=out, resume=True)


def test_their_quantised_model(state, shards, tmp_path):
    """Codes and steps of rows, compressed, are read as the weights that they stand for."""
    stored, how = {}, {}
    for name, value in state.items():
        how[name] = "passthrough" if value.numel() < 2000 else {"type": "int6"}
        if how[name] == "passthrough":
            stored[name] = value.half()
        else:
            step = (value.abs().amax(1) / 31).half()
            codes = (value / step.float()[:, None]).round().clamp(-31, 31)
            stored[f"{name}.q"], stored[f"{name}.scale"] = codes.to(torch.int8), step
    content = io.BytesIO()
    torch.save({"w": stored, "m": how}, content)
    file, out = tmp_path / "final_model.int6.ptz", tmp_path / "theirs"
    file.write_bytes(lzma.compress(content.getvalue()))
    assert imported(file, out, shards) == 0
    name = "blocks.1.mlp.fc.weight"
    got = RunFolder(out).load(torch.device("cpu"))[0]["model"][name]
    assert torch.equal(got, stored[f"{name}.q"] * stored[f"{name}.scale"].float()[:, None])


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (sys.exit, (3,))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"tok_emb.weight": Evil()}, "would run its code"),
        ({"tok_emb.weight": torch.ones(2), "step": 7}, "step is no tensor"),
        ([torch.ones(2)], "holds no state dict but a list"),
        ({"w": {"a": torch.ones(2)}, "m": {"b": "passthrough"}}, "not those of a known form"),
        ({"model": {"tok_emb.weight": torch.ones(400, 32)}}, "dim=32"),
    ],
)
def test_what_is_not_taken_leaves_nothing(content, words, shards, tmp_path, capsys):
    file, out = tmp_path / "final_model.pt", tmp_path / "theirs"
    torch.save(content, file)
    assert imported(file, out, shards) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_weights_that_cannot_be_packed_are_kept(state, shards, tmp_path, capsys):
    file, out = tmp_path / "final_model.pt", tmp_path / "theirs"
    torch.save(state, file)
    assert imported(file, out, shards, "budget_bytes=1000", "prune_to_fit=false") == 2
    assert f"pgolf pack {out} --out {out / 'artifact'}" in capsys.readouterr().err
    assert RunFolder(out).checkpoints() and not (out / "artifact").exists()


def test_export_is_the_decoded_artifact(finished, shards, tmp_path):
    """The library of the format reads what was written, and import takes it back."""
    library = pytest.importorskip("safetensors.torch")
    out = tmp_path / "exported"
    assert run("export", finished, "--format", "safetensors", "--out", out) == 0
    expected = read_artifact(finished / "artifact")
    exported = library.load_file(out / "model.safetensors")
    assert exported.keys() == expected.tensors.keys()
    assert all(torch.equal(exported[n], t) for n, t in expected.state_dict().items())
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == expected.meta["model"] and "decoded from" in config["weights"]
    assert (out / "tokenizer.model").read_bytes() == (finished / "tokenizer.model").read_bytes()
    assert run("export", finished, "--out", out) == 2  # not over another's files
    assert imported(out / "model.safetensors", tmp_path / "again", shards) == 0


def test_export_says_which_weights(finished, tmp_path):
    """Those of the artifact; of a run without one, what its checkpoint would export."""
    assert weights_of(finished)[2] == weights_of(finished / "artifact")[2]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "checkpoints"):
        (bare / name).symlink_to(finished / name)
    state, meta, words = weights_of(bare)
    assert "EMA" in words and "not quantised" in words and meta["model"]["layers"] == 3
    assert state.keys() == weights_of(finished)[0].keys()


def test_without_the_library_the_way_to_it_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'pgolf\[export\]'"):
        export_weights(finished, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()

"""`import pgolf`: what the README shows under "From Python" does what the commands do."""

import json
import re

import pytest
import torch

import pgolf
from pgolf.errors import ConfigError

from .tiny import ROOT, TINY, replaced


def example() -> str:
    section = (ROOT / "README.md").read_text().partition("## From Python")[2]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]


def test_the_example(scoring_here, shards, tmp_path, monkeypatch, capsys):
    """It trains, prints as the command does, returns result.json and loads the artifact."""
    code = example()
    tiny = replaced(TINY, ("layers=2", "max_tokens=1024", "max_steps=4", "score_live=false",
                          "qat_start=0.9"))  # fmt: skip
    settings = ", ".join("{}={!r}".format(*word.split("=")) for word in tiny)
    code = re.sub(r"layers=2, max_tokens=\S+", lambda _: f"{settings},", code)
    code = code.replace('"data/mine"', repr(str(shards)))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names = {}
    exec(code, names)
    folder = tmp_path / "runs/two"
    assert names["result"] == json.loads((folder / "result.json").read_text())
    said = capsys.readouterr().out
    assert "run folder      runs/two" in said and "decoded artifact" in said
    assert f"{names['result']['val_bpb']}" in said
    (idle,) = names["result"]["audit"]
    assert idle.startswith("late QAT (qat_start=0.9) never came on in 4 steps: lower it")
    assert f"warning: {idle}\n" in said
    model = names["model"]
    assert model.config.layers == 2 and names["meta"]["corpus"] == "words"
    assert names["logits"].shape[-1] == model.config.vocab_size
    assert callable(pgolf.train)  # still, after its package was imported
    with pytest.raises(ConfigError, match="holds a run already"):
        pgolf.train("demo", data=shards, out=folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(layer=6), "did you mean layers"),
        (dict(layers=0), "at least 1"),
        (dict(layers=2.5), "expected int"),
        (dict(as_published="perhaps"), "expected true or false"),
        (dict(as_published=True), "no published form"),
    ],
)
def test_the_checks_are_the_command_s(settings, words):
    with pytest.raises(ConfigError, match=words):
        pgolf.train("demo", **settings)


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        pgolf.trane  # noqa: B018
    with pytest.raises(ConfigError, match="did you mean demo"):
        pgolf.train("dmo")

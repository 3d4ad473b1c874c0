"""`pgolf data` from end to end, as a newcomer types it."""

import json

import pytest

from pgolf.cli import data as cli
from pgolf.data.manifest import Dataset
from pgolf.errors import ConfigError, DataError


@pytest.fixture
def text(documents, tmp_path):
    """The documents as a .jsonl file of paragraphs."""
    path = tmp_path / "My notes.jsonl"
    lines = [json.dumps({"text": p}) for text in documents for p in text.split("\n\n") if p]
    path.write_text("\n".join(lines))
    return path


def test_prepare_info_verify(text, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["prepare", "--text", str(text), "--out", str(out), "--vocab-size", "400"]
    assert cli.main([*arguments, "--license", "PSF"]) == 0
    printed = capsys.readouterr().out
    dataset = Dataset.open(out)
    stated = dataset.manifest["splits"]["val"]
    assert dataset.corpus == "My-notes"
    assert f"val: {stated['tokens']:,} tokens" in printed and "PSF" in printed
    assert f"{stated['bytes']:,} bytes" in printed
    assert f"divides by {stated['bytes_scored']:,} bytes" in printed, "leading spaces are named"
    assert cli.main(["info", str(out)]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main(["verify", str(out)]) == 0
    assert "every shard is whole" in capsys.readouterr().out
    shard = dataset.train_shards[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert cli.main(["info", str(out)]) == 0
    with pytest.raises(DataError, match="sha256"):
        cli.main(["verify", str(out)])


def test_a_normalising_tokenizer_is_named(text, tmp_path, capsys, shared_data):
    model = shared_data / "tokenizers" / "fineweb_1024_bpe.model"
    out = str(tmp_path / "out")
    assert cli.main(["prepare", "--text", str(text), "--out", out, "--tokenizer", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "the tokenizer changes line breaks" in printed
    stated = Dataset.open(out).manifest["splits"]["val"]
    assert (
        f"by {stated['bytes_scored']:,} bytes, the original text has {stated['bytes']:,}" in printed
    )
    assert f"changes {stated['documents_changed']:,} of {stated['documents']:,} doc" in printed


def test_info_of_the_contest_s_shards(shared_data, capsys):
    model = shared_data / "tokenizers" / "fineweb_1024_bpe.model"
    folder = str(shared_data / "fineweb_edu_1MB")
    assert cli.main(["verify", folder, "--tokenizer", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "train: 369,579 tokens, shards: 1" in printed and "no sha256 is stated" in printed


def test_another_corpus_needs_force(text, tmp_path, capsys):
    out = str(tmp_path / "out")
    prepare = ["prepare", "--out", out, "--vocab-size", "300", "--text"]
    assert cli.main([*prepare, str(text)]) == 0
    assert cli.main([*prepare, str(text)]) == 0
    assert "out: replaced corpus My-notes" in capsys.readouterr().err
    other = text.rename(tmp_path / "other.JSONL")
    with pytest.raises(ConfigError, match="out holds corpus My-notes .* --force"):
        cli.main([*prepare, str(other)])
    other.write_text("".join(line for line in other.open() if len(line) > 40))
    with pytest.raises(ConfigError, match="out holds another text .* --force"):
        cli.main([*prepare, str(other), "--name", "My-notes"])
    assert Dataset.open(out).corpus == "My-notes"
    assert cli.main([*prepare, str(other), "--force"]) == 0
    assert "replaced corpus My-notes" in capsys.readouterr().err
    assert Dataset.open(out).corpus == "other"


def test_what_is_not_read_of_a_folder_is_said(text, tmp_path, capsys):
    (tmp_path / "x.py").touch(), (tmp_path / ".h").touch()
    out = str(tmp_path.with_name("out"))
    cli.main(["prepare", "--text", str(tmp_path), "--out", out, "--vocab-size", "300"])
    assert f"{tmp_path}: not read: 1 .py, 1 hidden" in capsys.readouterr().err


def test_options_that_would_do_nothing(text, tmp_path):
    model = tmp_path / "t.model"
    options = ["--text", str(text), "--out", str(tmp_path / "d")]
    with pytest.raises(ConfigError, match="--vocab-size 300 .* --tokenizer"):
        cli.main(["prepare", *options, "--vocab-size", "300", "--tokenizer", str(model)])
    plain = text.rename(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="--field body"):
        cli.main(["prepare", "--text", str(plain), *options[2:], "--field", "body"])


def test_fetch_passes_its_arguments_on(monkeypatch, text, tmp_path, capsys):
    cli.main(["prepare", "--text", str(text), "--out", str(tmp_path / "d"), "--vocab-size", "400"])
    calls = []

    def fetch(variant, out, train_shards):
        calls.append((variant, out, train_shards))
        return Dataset.open(tmp_path / "d")

    monkeypatch.setattr(cli, "fetch", fetch)
    cli.main(["fetch"])
    cli.main(["fetch", "--variant", "sp512", "--train-shards", "3", "--out", "x"])
    assert calls == [("sp1024", "data", None), ("sp512", "x", 3)]


@pytest.mark.parametrize("command", [[], ["prepare"], ["fetch"], ["info"], ["verify"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([*command, "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert f"pgolf data {command[0]} " in text if command else "verify" in text


def test_errors_are_left_to_the_caller(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        cli.main(["info", str(tmp_path / "nothing")])
    with pytest.raises(DataError, match="does not exist"):
        cli.main(["prepare", "--text", str(tmp_path / "nothing"), "--out", str(tmp_path / "d")])

"""`auto` and the limits of operators: decided with the model's sizes, before a run begins."""

import inspect
import json
import re
from types import SimpleNamespace

import pytest
import torch

from pgolf.cli import main
from pgolf.config import Config, ModelConfig, parse_overrides, with_overrides
from pgolf.errors import ConfigError
from pgolf.model import GPT
from pgolf.model.gpt import operator_sizes
from pgolf.model.init import init_weights
from pgolf.ops.choose import choose, choose_all
from pgolf.ops.operator import OPERATORS
from pgolf.ranks import Ranks
from pgolf.recipes import title
from pgolf.training import run
from pgolf.training.session import claimed_folder, fit_vocabulary, open_session
from pgolf.training.trainer import Trainer

from .tiny import TINY, replaced

F32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
SMALL = dict(
    layers=1, mlp_hidden=32, vocab_size=64, bigram_buckets=16, bigram_dim=8, rope_dims=8,
    ve_layers="", xsa_layers="all",
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("PGOLF_OPS", raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


def test_a_run_tells_every_operator_its_sizes() -> None:
    told = {name: set(sizes) for name, sizes in operator_sizes(ModelConfig(), F32, BF16).items()}
    asked = {n: set(inspect.signature(o.obstacle).parameters) for n, o in OPERATORS.items()}
    assert told == {n: names - {"impl"} for n, names in asked.items() if "sizes" not in names}


@pytest.mark.parametrize(
    ("settings", "device", "limited"),
    [
        (dict(dim=1024, heads=4, kv_heads=2), "cpu", "embed_smear"),
        (dict(dim=768, heads=2, kv_heads=1), "cpu", "qk_rope"),
        (dict(dim=2056, heads=257, kv_heads=1), "cpu", "embed_smear xsa"),
        (dict(dim=4104, heads=27, kv_heads=9), "cpu", "embed_smear residual_norm"),
        (dict(dim=768, heads=2, kv_heads=1), "cuda", "qk_rope xsa"),
        (dict(dim=4104, heads=27, kv_heads=9), "cuda", "embed_smear residual_norm"),
        (dict(vocab_size=8200), "cuda", "softcap_cross_entropy"),
    ],
    ids=str,
)
def test_auto_is_decided_with_sizes(settings: dict, device: str, limited: str) -> None:
    """Where the kernel cannot run them: the reference, because of this limit and this size."""
    wide = choose_all("", device, F32, False, operator_sizes(ModelConfig(), F32, BF16))
    sizes = operator_sizes(ModelConfig(**settings), F32, BF16)
    chosen = choose_all("", device, F32, False, sizes)
    assert {n for n, c in chosen.items() if c != wide[n]} == set(limited.split())
    for name in limited.split():
        assert chosen[name].impl == "reference" and "it takes at most" in chosen[name].reason, name
        kernel = wide[name].impl
        with pytest.raises(ConfigError, match=f"{name}: impl={kernel}: it takes at most"):
            choose_all(f"{name}={kernel}", device, F32, False, sizes)


@pytest.mark.parametrize(
    "settings",
    [dict(dim=1024, heads=2, kv_heads=1), dict(dim=2056, heads=257, kv_heads=1)],
    ids=str,
)
def test_a_model_beyond_the_limits_trains_by_default(settings: dict) -> None:
    config = ModelConfig(**{**SMALL, **settings})
    ops = choose_all("", "cpu", F32, False, operator_sizes(config, F32, BF16))
    model = GPT(config, max_length=8, ops={name: choice.impl for name, choice in ops.items()})
    init_weights(model, 0)
    ids = torch.arange(8)[None]
    model(ids, ids).backward()
    assert model.tok_emb.weight.grad.isfinite().all()


def test_the_environment_gives_way_to_a_limit(monkeypatch) -> None:
    monkeypatch.setenv("PGOLF_OPS", "embed_smear=cpu")
    sizes = operator_sizes(ModelConfig(dim=1024), F32, BF16)
    impl, reason = choose_all("", "cpu", F32, False, sizes)["embed_smear"]
    assert impl == "reference"
    assert reason == "PGOLF_OPS asks for it: cpu: it takes at most 768 elements a row, not 1024"


def start(folder, shards, *words: str, any_vocabulary: bool = False) -> None:
    """`run.train` in this process."""
    settings = replaced(TINY, (f"data={shards}", f"out={folder}", "max_steps=2", *words))
    config = with_overrides(Config(recipe="demo"), parse_overrides(settings))
    ranks = Ranks(0, 1, CPU)
    with claimed_folder(config, ranks) as claimed:
        session = open_session(config, ranks, claimed, any_vocabulary)
        run.train(session, title(session.config))


def test_a_run_that_fails_before_its_first_step_leaves_its_name_free(
    shards, tmp_path, monkeypatch, capsys
) -> None:
    out = tmp_path / "run"
    broken = lambda *args: (_ for _ in ()).throw(RuntimeError("no memory"))  # noqa: E731
    for method in ("warm_up", "step"):
        with monkeypatch.context() as inside, pytest.raises(RuntimeError, match="no memory"):
            inside.setattr(Trainer, method, broken)
            start(out, shards)
        assert not out.exists(), method
    with monkeypatch.context() as inside, pytest.raises(RuntimeError, match="no memory"):
        inside.setattr(Trainer, "_between_steps", broken)
        start(out, shards, "dim=1024", "heads=16", "kv_heads=8", "layers=1", "ve_layers=")
    assert (out / "config.json").exists(), "it had a step"
    said = capsys.readouterr().out
    assert said.count("reference (cpu: it takes at most 768 elements a row, not 1024)") == 1
    with pytest.raises(ConfigError, match="holds a run already"):
        start(out, shards)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attention=fa4"], "ops=attention=fa4: .*fa4 runs on cuda tensors, these are on cpu"),
        (["attention=sdpa", "ops=attention=fa3"], "attention=sdpa and ops=attention=fa3 name two"),
    ],
    ids=["elsewhere", "two"],
)
def test_attention_is_one_of_the_operators_of_a_run(words, said, shards, tmp_path) -> None:
    with pytest.raises(ConfigError, match=said):
        start(tmp_path / "run", shards, *words)


def test_a_folder_that_held_more_keeps_it(shards, tmp_path, monkeypatch) -> None:
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr(Trainer, "warm_up", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(tmp_path, shards)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


@pytest.mark.parametrize(
    ("given", "rows", "said"),
    [
        ("", 400, "400 rows for 400 pieces\n"),
        ("512", 512, "512 rows for 400 pieces, 112 of them unused: vocab_size=400 is enough\n"),
    ],
)
def test_the_vocabulary_follows_the_data_unless_one_is_asked_for(
    given, rows, said, shards, tmp_path, monkeypatch, capsys
) -> None:
    """By the command's own way; the folder has the number used, and so has what is made of it."""
    monkeypatch.setattr(Trainer, "_between_steps", lambda *args: None)
    monkeypatch.setattr(run, "finish", lambda config, *args: None)
    words = [w for w in replaced(TINY, ("max_steps=1",)) if not w.startswith("vocab_size")]
    words += [f"vocab_size={given}"] * bool(given)
    assert main(["train", "demo", f"data={shards}", f"out={tmp_path / 'run'}", *words]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["vocab_size"] == rows
    out = capsys.readouterr().out
    assert f"  vocabulary      {said}" in out
    assert re.match(rf"demo with \d+ settings changed: vocab_size={rows}, layers=3, ", out)


def test_a_larger_vocabulary_of_the_data_is_followed_too() -> None:
    data = SimpleNamespace(folder="shards", vocab_size=4096)
    assert fit_vocabulary(Config(), data, follows=True).model.vocab_size == 4096
    with pytest.raises(ConfigError, match="use vocab_size=4096"):
        fit_vocabulary(Config(), data, follows=False)


def test_the_embedded_corpus_is_not_where_out_is(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file is in the way")
    assert main(["train", "demo", "out=elsewhere"]) == 2
    error = capsys.readouterr().err
    assert f"prepared in {tmp_path / 'data'}" in error and "data=FOLDER" in error

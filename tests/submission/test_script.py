"""The script of a submission: alone, it does what the package does."""

import ast
import bz2
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from bench.synthetic import Words
from pgolf.artifact.container import read_artifact
from pgolf.config import ENVIRONMENT, to_dict, with_overrides
from pgolf.data.manifest import Dataset
from pgolf.data.tokenizer import train_tokenizer
from pgolf.errors import DataError
from pgolf.submission import entry
from pgolf.submission.script import (
    SCORING,
    TRAINING,
    _build,
    _settings,
    build_script,
    literal,
    script_parts,
)
from pgolf.triton_kernels.launch import Config, configs

from ..training.tiny import ROOT
from .conftest import scored


@pytest.mark.slow
def test_scores_as_the_package_does(alone, one_run, script):
    hidden = alone("-c", "import pgolf")
    assert hidden.returncode and "pgolf is hidden" in hidden.stderr
    result = json.loads((one_run / "result.json").read_text())
    done = alone()
    assert done.returncode == 0, done.stderr
    line = f"val_loss:{result['val_loss']:.8f} val_bpb:{result['val_bpb']:.8f}"
    assert line in done.stdout
    model, code = result["bytes_model"], len(script.data)
    assert f"{model + code} bytes (model {model} + code {code})" in done.stdout


def test_trains_and_writes_an_artifact(alone, script):
    done = alone("train_gpt.py", "train", ITERATIONS="2", SEED="7")
    assert done.returncode == 0, done.stderr
    assert "attention       varlen (torch's, on each document by itself)" in done.stdout
    assert "step:2/2 train_loss:" in done.stdout and "val_bpb:" in done.stdout.splitlines()[-1]
    run = alone.folder / "runs" / "demo-seed7"
    assert read_artifact(run / "artifact").meta["seed"] == 7
    assert f"code {len(script.data)})" in done.stdout, "its own size, not that of pgolf's files"


def test_a_wrong_tokenizer_of_the_right_size_is_not_scored(one_run, config, shards, tmp_path):
    """Even one that the artifact names: its tokens are not those of the shards."""
    dataset = Dataset.open(shards)
    for size, message in (
        (400, "other.model did not make the tokens in .*words: it gives back"),
        (320, "expected less than the vocabulary size 320"),
    ):
        texts = (document.text for document in Words(seed=1))
        train_tokenizer(texts, tmp_path / "other.model", size)
        named = dataclasses.replace(dataset, tokenizer_path=tmp_path / "other.model")
        with pytest.raises(DataError, match=message):
            scored(one_run / "artifact", config, named)


@pytest.mark.slow
def test_with_the_codec_of_the_recipes_it_needs_no_other(alone, config):
    script = build_script(with_overrides(config, {"codec": "rans", "documents": "false"}))
    assert script.libraries == ["numpy", "sentencepiece", "torch", "triton"]
    (alone.folder / "train_gpt.py").write_bytes(script.data)
    done = alone("train_gpt.py", "train", ITERATIONS="2")
    assert done.returncode == 0, done.stderr
    assert "final_roundtrip_exact" in done.stdout


@pytest.mark.slow
def test_trains_and_scores_under_torchrun(alone):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = alone("train_gpt.py", "train", launcher=launcher, ITERATIONS="2")
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout and done.stdout.count("final_roundtrip_exact") == 1
    one = alone("train_gpt.py", "runs/demo-seed1337/artifact").stdout.splitlines()[-1]
    two = done.stdout.splitlines()[-1]
    numbers = [[float(w.split(":")[1]) for w in line.split()[1:3]] for line in (one, two)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-7)


@pytest.mark.slow
def test_triton_kernels_run_from_the_script(alone):
    """Triton reads the source of its kernels, here through the script's importer."""
    done = alone("train_gpt.py", "train", ITERATIONS="1", PGOLF_OPS="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "xsa             triton" in done.stdout


def damage(artifact):
    data = bytearray(artifact.read_bytes())
    data[len(data) // 2] ^= 1
    artifact.write_bytes(data)


@pytest.mark.slow
def test_refuses_a_damaged_artifact(alone):
    damage(alone.folder / "artifact")
    done = alone()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error (rank 0): artifact" in done.stderr


@pytest.mark.parametrize(
    "artifact, environment, message",
    [
        ("gone", {}, "gone: no such file"),
        ("damaged", {"TOKENIZER_PATH": "here"}, "damaged: wrong checksum"),
        ("here", {}, "no tokenizer for the shards in data/datasets/fineweb10B_sp400"),
        ("here", {"TOKENIZER_PATH": "lost"}, "no tokenizer at lost: set TOKENIZER_PATH"),
        ("here", {"TOKENIZER_PATH": "here"}, "here is not the tokenizer of here"),
    ],
)
def test_says_what_is_missing(
    artifact, environment, message, one_run, config, tmp_path, monkeypatch, capsys
):
    for name in ("here", "damaged"):
        shutil.copy(one_run / "artifact", tmp_path / name)
    damage(tmp_path / "damaged")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_gpt.py", artifact])
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert entry.main(to_dict(with_overrides(config, {"tokenizer": ""}))) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_is_the_same_in_another_process(config, script, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    program = (
        "import json, sys; from pgolf.config import from_dict; "
        "from pgolf.submission.script import build_script; "
        "config = from_dict(json.load(open(sys.argv[1]))); "
        "sys.stdout.buffer.write(build_script(config).data)"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, check=True,
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout == script.data


def test_where_a_run_lies_is_no_part_of_it(config, script):
    elsewhere = with_overrides(config, {"out": "b", "data": "c", "tokenizer": "d"})
    assert build_script(elsewhere).data == script.data


def test_every_module_compiles(script):
    for name, source in script.sources.items():
        compile(source, name, "exec")
    compile(script.data, "train_gpt.py", "exec")
    ast.parse(script.data)
    assert b"\0" not in script.data and b"\r" not in script.data
    assert not [n for n in script.sources if n.startswith(("pgolf.report", "pgolf.recipes"))]
    assert "pgolf.scoring.job" in script.sources and "pgolf.scoring.__main__" not in script.sources
    assert script.libraries == ["numpy", "sentencepiece", "torch", "triton", "zstandard"]


def test_only_what_a_script_never_does_is_missing(script):
    """A name from a module that is not bundled is None: none that scoring or training calls."""
    imports = [n for text in script.sources.values() for n in ast.walk(ast.parse(text))]
    asked = {n.module for n in imports if isinstance(n, ast.ImportFrom)}
    missing = {m for m in asked if m.startswith("pgolf.")} - script.sources.keys()
    assert missing == {
        "pgolf.child", "pgolf.model.deferred_sums", "pgolf.model.joined", "pgolf.model.masters",
        "pgolf.ops.grad_norm", "pgolf.ops.joined_norm", "pgolf.ops.linear_mix",
        "pgolf.ops.linear_qk_rope", "pgolf.ops.linear_residual", "pgolf.ops.muon_momentum",
        "pgolf.ops.norm_mlp", "pgolf.ops.param_update", "pgolf.ops.part_sums",
        "pgolf.ops.residual_norm_kernels", "pgolf.ops.scaled_copies", "pgolf.ops.stacked",
        "pgolf.ops.timed", "pgolf.ops.token_sums", "pgolf.ops.xsa_linear",
    }  # fmt: skip


@pytest.mark.parametrize("modules", [SCORING, TRAINING], ids=["scoring", "training"])
@pytest.mark.parametrize("codec", ["auto", "rans"])
def test_what_a_module_imports_from_another_is_there(modules, codec, config):
    sources = _build(_settings(config), codec, modules).sources
    trees = {name: ast.parse(text) for name, text in sources.items()}
    taken = [
        (node.module, alias.name)
        for tree in trees.values()
        for node in ast.walk(tree)
        for alias in (node.names if isinstance(node, ast.ImportFrom) else ())
        if node.module in trees and f"{node.module}.{alias.name}" not in trees
    ]
    known = {(m, name) for m, tree in trees.items() for name in names_in(tree)}
    not_called = {("pgolf.training", "facts")}  # a module, of what ranks of the package compare
    assert taken and not set(taken) - known - not_called


def names_in(tree):
    """What a module has."""
    for node in tree.body:
        for child in ast.walk(node):
            if isinstance(child, ast.Name):
                yield child.id
            elif isinstance(child, ast.alias):
                yield child.asname or child.name
        yield getattr(node, "name", "")


def test_size(script):
    assert len(script.data) < 75_000, "the budget that a model of a contest recipe has to share"


def test_a_script_has_the_tile_sizes_of_its_kernels(script):
    texts = [n.value for n in ast.walk(ast.parse(script.data)) if isinstance(n, ast.Constant)]
    packed = max((t for t in texts if isinstance(t, str)), key=len).encode("latin1")
    _, *parts = bz2.decompress(packed).decode().split("\0")
    table = json.loads(dict(zip(parts[::2], parts[1::2], strict=True))["configs.json"])
    epilogues = ("xsa_linear", "linear_residual", "linear_mix", "linear_qk_rope", "norm_mlp")
    whole = {k: v for k, v in configs().items() if not k.startswith(epilogues)}
    assert {k: [dataclasses.replace(Config(**row), reason=whole[k][i].reason)
                for i, row in enumerate(rows)] for k, rows in table.items()} == whole  # fmt: skip


def test_operators_that_a_script_leaves_out_are_not_asked_of_it(config):
    """Or it could not read its own settings."""
    epilogues = ("xsa_linear", "linear_residual", "linear_mix", "linear_qk_rope", "norm_mlp")
    for ops, left in (
        (",".join(f"{name}=triton" for name in epilogues), "auto"),
        ("xsa=reference,part_sums=cpu", "xsa=reference"),
        ("residual_norm=cuda,xsa=triton", "xsa=triton"),
        ("cuda", "auto"),
    ):  # fmt: skip
        settings = ast.literal_eval(_settings(with_overrides(config, {"ops": ops})))
        assert settings["run"].get("ops", "auto") == left


@pytest.mark.slow
def test_parts(config, script):
    parts = script_parts(config)
    assert parts["scoring"] + parts["training"] == len(script.data)
    assert 100 < parts["decoder"] < parts["scoring"] < 50_000


@pytest.mark.parametrize(
    "data", [b'"', b'""""""', b"\0\x001\x009", b"\\", b"\\\r\n\r", b'a"', b"\x1a\x0c\x85\xff", b""]
)
def test_literal(data):
    assert ast.literal_eval(_latin(data)).encode("latin1") == data


def test_literal_of_noise():
    data = random.Random(0).randbytes(100_000)
    source = _latin(data)
    assert ast.literal_eval(source).encode("latin1") == data
    assert len(literal(data)) < 1.02 * len(data)


def _latin(data: bytes) -> str:
    """The literal as Python reads it from a file in latin-1."""
    module = ast.parse(b"#coding:latin1\nx=" + literal(data) + b"\n")
    return repr(module.body[0].value.value)

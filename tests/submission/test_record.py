"""`pgolf submit`: the record folder, and when there is none."""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
from types import SimpleNamespace

import pytest
import torch

from pgolf.cli import main
from pgolf.data.manifest import Dataset
from pgolf.errors import BudgetError, ConfigError, DataError, InUseError, PgolfError
from pgolf.files import claim
from pgolf.submission import record
from pgolf.submission.record import (
    About,
    Run,
    Score,
    check_alike,
    check_budget,
    verify,
    write_record,
)
from pgolf.training.run_data import Identity

ABOUT = About("A. Name", "aname", "A record", "One sentence.", "2026-11-26", "track_10min_16mb")
FIELDS = {
    "author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "bytes_total",
    "bytes_code", "bytes_model", "seeds", "seed_results", "hardware", "pytorch_version",
    "val_bpb_mean", "val_bpb_std",
}  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(one_run, make_run):
    """The second is the better one."""
    worse = make_run(seed=2)
    result = json.loads((worse / "result.json").read_text())
    better = json.loads((one_run / "result.json").read_text())
    result["val_bpb"] = better["val_bpb"] + 0.01
    (worse / "result.json").write_text(json.dumps(result))
    return [worse, one_run]


@pytest.fixture
def script_alone(monkeypatch, hidden):
    """The script is run where no process finds pgolf; its size by part is not measured."""
    run = subprocess.run

    def run_hidden(command, *, env, **options):
        return run(command, env=env | hidden, **options)

    monkeypatch.setattr(record.subprocess, "run", run_hidden)
    parts = {"scoring": 20_123, "training": 30_456, "decoder": 1_789}
    monkeypatch.setattr(record, "script_parts", lambda config: parts)


def test_writes_the_folder(two_runs, tmp_path, script_alone, capsys):
    out = tmp_path / "record"
    options = ["--author", "A. Name", "--github-id", "aname", "--date", "2026-11-26"]
    assert main(["submit", *map(str, two_runs), "--out", str(out), *options]) == 0
    results = {r.name: json.loads((r / "result.json").read_text()) for r in two_runs}
    best = two_runs[1]
    values = json.loads((out / "submission.json").read_text())
    assert set(values) == FIELDS
    assert values["seeds"] == [2, 1337] and values["author"] == "A. Name"
    assert values["val_bpb"] == round(results[best.name]["val_bpb"], 8), "of what is shipped"
    assert values["val_loss"] == round(results[best.name]["val_loss"], 8)
    assert values["val_bpb_mean"] == statistics.fmean(r["val_bpb"] for r in results.values())
    assert values["seed_results"]["2"]["val_bpb"] == results["seed2"]["val_bpb"]
    assert values["track"] == "track_non_record_16mb", "the demo is no contest recipe"
    assert values["name"].startswith("demo with ") and values["name"].endswith(" settings changed")
    assert values["blurb"].startswith(f"{values['name']}: vocab_size=400, layers=3, ")
    code, model = (out / "train_gpt.py").stat().st_size, (out / "artifact").stat().st_size
    assert (values["bytes_code"], values["bytes_model"]) == (code, model)
    assert values["bytes_total"] == code + model
    assert (out / "artifact").read_bytes() == (best / "artifact").read_bytes()
    assert {p.name for p in out.iterdir()} == {
        "train_gpt.py", "artifact", "README.md", "submission.json", "requirements.txt",
        "train_seed1337.log", "train_seed2.log",
    }  # fmt: skip
    log = (out / "train_seed2.log").read_text().splitlines()
    assert log[0] == "step:1/20 train_loss:5.9900 train_time:147ms step_avg:147.20ms"
    assert log[1] == "step:14 late QAT on for 18 matrices"
    assert log[2] == "step:20/20 val_loss:4.5100 val_bpb:2.4400 train_time:1500ms"
    assert log[-1].endswith(f"val_bpb:{results['seed2']['val_bpb']:.8f}")
    needed = (out / "requirements.txt").read_text()
    assert "torch==" in needed and "sentencepiece==" in needed and "+" not in needed
    readme = (out / "README.md").read_text()
    assert f"{values['val_bpb']:.8f}" in readme and "layers=3" in readme
    assert f"mean of 2 seeds {values['val_bpb_mean']:.8f}" in readme
    for text in (readme, capsys.readouterr().out):
        assert "20,123 for scoring (1,789 of them" in text and "30,456 more for training" in text
    assert "from the" not in readme, "the script's score is that of the run"
    assert str(two_runs[0]) not in readme and "tokenizer.model" not in readme


@pytest.fixture
def copied(one_run, tmp_path):
    return shutil.copytree(one_run, tmp_path / "copy")


def test_refuses_what_has_not_finished(copied, tmp_path):
    (copied / "result.json").unlink()
    with pytest.raises(ConfigError, match="has no result.json"):
        write_record([copied], tmp_path / "out", ABOUT)
    with pytest.raises(ConfigError, match="no run folder"):
        write_record([tmp_path / "nothing"], tmp_path / "out", ABOUT)
    assert not (tmp_path / "out").exists()


def test_refuses_an_artifact_of_another_size(copied):
    with open(copied / "artifact", "ab") as file:
        file.write(b"more")
    with pytest.raises(ConfigError, match="restore it"):
        Run.read(copied)


def test_refuses_a_folder_that_exists(one_run, tmp_path):
    with pytest.raises(ConfigError, match="exists: choose another"):
        write_record([one_run], tmp_path, ABOUT)


def test_refuses_runs_of_different_settings(one_run, make_run):
    with pytest.raises(ConfigError, match="quant.mlp_bits=6 and 5"):
        check_alike([Run.read(one_run), Run.read(make_run(seed=3, mlp_bits="5"))])
    with pytest.raises(ConfigError, match="seed 1337 is given twice"):
        check_alike([Run.read(one_run), Run.read(one_run)])


def test_refuses_runs_of_different_data(two_runs):
    for run, text in zip(two_runs, ("a", "b"), strict=True):
        Identity("words", text * 64, "c" * 64).write(run)
    try:
        with pytest.raises(ConfigError, match="other data .corpus_sha256 bbbbbbbbbbbb... for aaa"):
            check_alike([Run.read(run) for run in two_runs])
    finally:
        for run in two_runs:
            (run / "data.json").unlink()


def test_finds_data_that_moved_or_says_how_to_name_them(copied, shards, script_alone, tmp_path):
    """The run states the hash, so a folder of the same data elsewhere is as good."""
    Identity.of(Dataset.open(shards)).write(copied)
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"data": "/gone/data/words", "tokenizer": "/gone/tokenizer.model"}
    (copied / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no folder /gone/data/words; name .* data=FOLDER"):
        write_record([copied], out, ABOUT)
    author = os.fsdecode(b"Ren\xe9")  # from a terminal that is not UTF-8
    options = [f"data={shards}", "--out", str(out), "--author", author, "--blurb", author]
    assert main(["submit", str(copied), *options]) == 0
    assert "Ren\\udce9" in (out / "README.md").read_text(encoding="utf-8")


def test_another_process_makes_the_record(one_run, tmp_path):
    with claim(tmp_path / "out"), pytest.raises(InUseError, match="in use by"):
        write_record([one_run], tmp_path / "out", ABOUT)


def test_pack_replaces_no_scored_artifact(copied, tmp_path, monkeypatch, capsys):
    artifact, other = copied / "artifact", tmp_path / "notes.txt"
    before = artifact.read_bytes()
    other.write_text("mine")
    (tmp_path / "link").symlink_to(artifact)
    for out, text in ((artifact, "scores"), (tmp_path / "link", "scores"), (other, "no artifact")):
        assert main(["pack", str(copied), "--out", str(out)]) == 2
        output = capsys.readouterr().err
        assert text in output and "--force" in output
    assert main(["pack", str(copied), "--out", "."]) == 2
    assert "it is a folder" in capsys.readouterr().err
    # with it, what stops packing here is that this run kept no checkpoint
    assert main(["pack", str(copied), "--out", str(artifact), "--force"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    (copied / "result.json").unlink()
    assert main(["pack", str(copied), "--out", str(artifact)]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert artifact.read_bytes() == before and other.read_text() == "mine"


def test_refuses_over_the_budget_and_names_the_parts(one_run, script):
    run = Run.read(one_run)
    model, code = run.result["bytes_model"], len(script.data)
    artifact = dataclasses.replace(run.config.artifact, budget_bytes=model + code)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, artifact=artifact))
    check_budget([run], script)
    longer = dataclasses.replace(script, data=script.data + b"#")
    with pytest.raises(BudgetError, match=f"model {model:,} .* code {code + 1:,} .* 1 over"):
        check_budget([run], longer)


ONE_CPU = {"ranks": 1, "device": "cpu", "dtype": "fp32"}


@pytest.fixture
def verified(one_run, script, monkeypatch):
    """What `verify` makes of a script that prints another score than a run states."""
    monkeypatch.setattr(record, "pick_dtype", lambda *_: (torch.float32, ""))

    def verified(more: float, scored_by: dict | None, code: int = 0) -> Score:
        run = Run.read(one_run)
        run.result.update({"val_loss": 4.0, "val_bpb": 2.5, "scored_by": scored_by})
        if scored_by is None:
            del run.result["scored_by"]
        printed = f"x val_loss:{4 + more:.8f} val_bpb:{2.5 + more:.8f} eval_time:1ms\n"
        done = SimpleNamespace(returncode=code, stdout=printed)
        monkeypatch.setattr(record.subprocess, "run", lambda *_, **__: done)
        return verify(run, script)

    return verified


def test_one_process_on_a_cpu_gives_every_digit(verified):
    assert verified(0, ONE_CPU) == Score(4.0, 2.5, "")
    with pytest.raises(PgolfError, match=r"\+0.00000002 .*score it where .* with 1 threads"):
        verified(2e-8, ONE_CPU)


@pytest.mark.parametrize(
    "change", [{"ranks": 8}, {"ranks": 8, "device": "cuda", "dtype": "bf16"}, {"dtype": "bf16"}]
)
def test_elsewhere_scores_round_differently(verified, change):
    by = ONE_CPU | change
    assert verified(0, by).note == ""
    score = verified(-9e-5, by)
    assert (score.loss, score.bpb) == (3.99991, 2.49991), "the script's own"
    where = f"{by['ranks']} x {by['device']} in {by['dtype']}"
    assert score.note == (
        f"2.49991000 bits per byte, -0.00009000 from the 2.50000000 of the run, scored by {where}"
    )
    for more in (1.1e-4, -1.1e-4, float("nan")):
        with pytest.raises(PgolfError, match="rounding explains 0.0001"):
            verified(more, by)


def test_a_run_that_does_not_say_where_it_was_scored(verified):
    assert verified(9e-5, None).note.endswith("of the run")


def test_a_script_that_fails(verified):
    with pytest.raises(PgolfError, match="cannot score"):
        verified(0, ONE_CPU, code=1)


def test_the_note_and_the_scripts_score_are_in_the_record(one_run, tmp_path, script, monkeypatch):
    score = Score(4.0, 2.5, "2.5 bits per byte, something from the run")
    monkeypatch.setattr(record, "verify", lambda *_: score)
    parts = {"scoring": 2, "training": 3, "decoder": 1}
    monkeypatch.setattr(record, "script_parts", lambda config: parts)
    written = write_record([one_run], tmp_path / "out", ABOUT)
    stated = json.loads((one_run / "result.json").read_text())
    assert (written.values["val_loss"], written.values["val_bpb"]) == (4.0, 2.5)
    assert written.values["seed_results"]["1337"]["val_bpb"] == stated["val_bpb"]
    assert written.note == score.note and written.parts == parts
    assert score.note in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_parts_add_up(one_run, tmp_path):
    written = write_record([one_run], tmp_path / "out", ABOUT)
    assert written.parts["scoring"] + written.parts["training"] == written.values["bytes_code"]

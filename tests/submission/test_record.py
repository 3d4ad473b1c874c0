"""`pgolf submit`: the record folder, and when there is none."""

import dataclasses
import json
import shutil
import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from pgolf.cli import main
from pgolf.errors import BudgetError, ConfigError, PgolfError
from pgolf.submission import record
from pgolf.submission.record import About, Run, check_alike, check_budget, verify, write_record

ABOUT = About("A. Name", "aname", "A record", "One sentence.", "2026-11-26", "track_10min_16mb")
FIELDS = {
    "author", "github_id", "name", "blurb", "date", "track", "val_loss", "val_bpb", "bytes_total",
    "bytes_code", "bytes_model", "seeds", "seed_results", "hardware", "pytorch_version",
    "val_bpb_std",
}  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(one_run, make_run):
    return [one_run, make_run(seed=2)]


def test_writes_the_folder(two_runs, tmp_path, script, capsys):
    out = tmp_path / "record"
    words = ["--author", "A. Name", "--github-id", "aname", "--date", "2026-11-26"]
    assert main(["submit", *map(str, two_runs), "--out", str(out), *words]) == 0
    results = {r.name: json.loads((r / "result.json").read_text()) for r in two_runs}
    best = min(two_runs, key=lambda r: results[r.name]["val_bpb"])
    values = json.loads((out / "submission.json").read_text())
    assert set(values) == FIELDS
    assert values["seeds"] == [1337, 2] and values["author"] == "A. Name"
    assert values["val_bpb"] == statistics.fmean(r["val_bpb"] for r in results.values())
    assert values["seed_results"]["2"]["val_bpb"] == results["seed2"]["val_bpb"]
    assert values["track"] == "track_non_record_16mb", "the demo is no contest recipe"
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


def test_refuses_over_the_budget_and_names_the_parts(one_run, script):
    run = Run.read(one_run)
    model, code = run.result["bytes_model"], len(script.data)
    artifact = dataclasses.replace(run.config.artifact, budget_bytes=model + code)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, artifact=artifact))
    check_budget([run], script)
    longer = dataclasses.replace(script, data=script.data + b"#")
    with pytest.raises(BudgetError, match=f"model {model:,} .* code {code + 1:,} .* 1 over"):
        check_budget([run], longer)


@pytest.mark.parametrize(
    "code, more, message", [(0, 2e-8, "score it where"), (1, 0, "cannot score"), (0, 0, "")]
)
def test_refuses_another_score(one_run, script, monkeypatch, code, more, message):
    run = Run.read(one_run)
    loss, bpb = run.result["val_loss"], run.result["val_bpb"] + more
    done = SimpleNamespace(returncode=code, stdout=f"x val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n")
    monkeypatch.setattr(record.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(PgolfError, match=message) if message else nullcontext():
        verify(run, script)

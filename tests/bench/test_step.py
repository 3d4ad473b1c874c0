"""`python -m bench step` on a tiny recipe."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import profiling, schema, step
from bench.synthetic import Words
from pgolf.data.prepare import prepare
from pgolf.training.run import build

from ..training.tiny import TINY


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "words"
    prepare(Words(), folder, "words", vocab_size=400)
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PGOLF_OPS", raising=False)


def run(shards: Path, *options: str) -> int:
    return step.main(["demo", f"data={shards}", "device=cpu", *TINY, "--rounds", "2", *options])


def test_lines_and_table(shards, tmp_path, capsys) -> None:
    code = run(shards, "--ops", "reference", "xsa=reference", "--compile", "off",
               "--json", "f.jsonl")  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    lines = [json.loads(text) for text in Path("f.jsonl").read_text().splitlines()]
    assert [(line["ops"], line["compile"]) for line in lines] == [
        ("reference", False), ("xsa=reference", False)
    ]  # fmt: skip
    names = [f.name for f in dataclasses.fields(schema.StepTiming)]
    for line in lines:
        assert list(line) == names
        schema.StepTiming(**line)
        assert line["recipe"] == "demo" and line["tokens"] == 256 and line["rounds"] == 2
        assert line["overrides"]["layers"] == "3" and line["dtype"] == "fp32"
        assert 0 < line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["tokens_per_second"] == pytest.approx(256e3 / line["median_ms"])
        assert line["threads"] == torch.get_num_threads() and line["torch"] == torch.__version__
        assert line["chosen"]["xsa"] == "reference"
        assert 5 < line["loss"] < 7  # about log(400)
        assert line["first_ms"] == lines[0]["median_ms"] and line["peak_bytes"] is None
        assert list(line["phases"]) == ["batch", "forward", "backward", "optimizer"]
        times = [phase["host_ms"] for phase in line["phases"].values()]
        assert min(times) > 0 and sum(times) < 3 * line["p80_ms"]
        assert line["profile"] is None
    assert set(lines[0]["chosen"].values()) == {"reference"}
    rows = [text.split() for text in out.splitlines() if " off " in text]
    assert [(cells[0], cells[6]) for cells in rows] == [
        (line["ops"], f"{lines[0]['median_ms'] / line['median_ms']:.2f}x") for line in lines
    ]
    assert "  fastest: " in out and "256 tokens a step, fp32" in out
    assert [p.name for p in tmp_path.iterdir()] == ["f.jsonl"]  # no run folder


def test_within_a_limit_of_time_what_runs_is_kept(shards, monkeypatch, capsys) -> None:
    """A choice that fails ends none of the others; one that has no time left is named."""
    late = []

    def failing(session, title):
        if session.config.run.ops == "xsa=reference":
            raise MemoryError("no room")
        late.append(session.config.run.ops)
        if len(late) == 2:  # the last one that is begun
            monkeypatch.setattr(step.time, "monotonic", lambda: 1e9)
        return build(session, title)

    monkeypatch.setattr(step, "build", failing)
    ops = ["reference", "xsa=reference", "auto", "qk_rope=reference"]
    code = run(shards, "--ops", *ops, "--compile", "off", "--seconds", "1e6", "--profile", "1",
               "--json", "f.jsonl", "--rounds", "1")  # fmt: skip
    captured = capsys.readouterr()
    lines = [json.loads(text) for text in Path("f.jsonl").read_text().splitlines()]
    assert code == 1 and "MemoryError: no room" in captured.err
    assert [line["ops"] for line in lines] == ["reference", "auto"]
    assert "FAILED: xsa=reference eager; why stands above\n" in captured.out
    assert "no time is left for qk_rope=reference eager\n" in captured.out
    for line in lines:
        profile = line["profile"]
        assert 0 <= profile["idle_us"] < profile["step_us"]
        assert profile["kernels"][0]["us"] >= profile["kernels"][-1]["us"] > 0
    assert lines[0]["profile"]["operators"] == []
    ours = {row["name"]: row for row in lines[1]["profile"]["operators"]}
    if "cpu" in lines[1]["chosen"].values():
        assert ours["pgolf::xsa"]["calls"] == 2 * 3 and ours["pgolf::xsa"]["gbs"] > 0
        assert "pgolf::xsa " in captured.out


def test_a_profile_adds_up() -> None:
    spans = [profiling.Span("a", 0, 4), profiling.Span("b", 3, 6), profiling.Span("a", 8, 10)]
    kernels = [(s.name, s.end - s.start) for s in spans]
    found = profiling.summarised(spans, kernels, [("pgolf::a", 2.0)] * 2, {"pgolf::a": 6000}, 2)
    assert found["step_us"] == 5.0 and found["idle_us"] == 1.0
    assert found["kernels"] == [
        {"name": "a", "calls": 1.0, "us": 3.0, "percent": 60.0},
        {"name": "b", "calls": 0.5, "us": 1.5, "percent": 30.0},
    ]
    (operator,) = found["operators"]
    assert operator == {
        "name": "pgolf::a", "calls": 1.0, "us": 2.0, "percent": 40.0, "gbs": 3.0
    }  # fmt: skip
    table = profiling.shown(found)
    assert "0.01 ms, in 20.0 % of it nothing runs" in table and table.count("\n") == 5


def test_losses_that_differ_are_wrong(shards, monkeypatch, capsys) -> None:
    def spoilt(session, title):
        trainer = build(session, title)
        if session.config.run.ops == "xsa=reference":
            with torch.no_grad():
                trainer.model.tok_emb.weight.mul_(100)
        return trainer

    monkeypatch.setattr(step, "build", spoilt)
    assert run(shards, "--ops", "reference", "xsa=reference", "--compile", "off") == 1
    wrong = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WRONG")]
    assert wrong == ["WRONG: xsa=reference eager has another loss than reference eager"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "tpu"], "no operator has an implementation 'tpu'"),
        (["--rounds", "0"], "--rounds 0: it has to be 1 or more"),
        (["compile=on"], "compile=on: use --compile, which takes several"),
        (["no_such_key=1"], "unknown key 'no_such_key'"),
    ],
)
def test_bad_arguments_are_one_line(words, message, shards, capsys) -> None:
    overrides = [w for w in words if "=" in w and not w.startswith("-")]
    options = [w for w in words if w not in overrides]
    assert step.main(["demo", f"data={shards}", *TINY, *overrides, *options]) == 2
    err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("preparing")]
    assert len(err) == 1 and message in err[0] and err[0].startswith("python -m bench step: ")


def test_an_unknown_recipe_is_one_line(capsys) -> None:
    assert step.main(["no_such_recipe"]) == 2
    assert "no_such_recipe" in capsys.readouterr().err

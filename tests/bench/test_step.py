"""`python -m bench step` on a tiny recipe."""

import dataclasses
import gc
import json
import math
import weakref
from pathlib import Path

import pytest
import torch

from bench import profiling, restart, schema, step
from pgolf.ranks import Ranks
from pgolf.recipes import get
from pgolf.training.run import build

from ..training.tiny import TINY


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


def test_the_first_choice_is_kept_before_the_second_is_prepared(shards, monkeypatch) -> None:
    """And one is gone with its memory before the next comes: cycles would keep it."""
    kept, trainers = [], []

    def watched(session, title):
        file = Path("f.jsonl")
        kept.append(len(file.read_text().splitlines()) if file.exists() else 0)
        assert not [alive for t in trainers[1:] if (alive := t())]
        trainer = build(session, title)
        trainers.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(step, "build", watched)
    gc.disable()
    try:
        ops = ["reference", "xsa=reference", "qk_rope=reference"]
        assert run(shards, "--ops", *ops, "--compile", "off", "--seconds", "1e6", "--json",
                   "f.jsonl", "--rounds", "1") == 0  # fmt: skip
    finally:
        gc.enable()
    assert kept == [0, 1, 2]


class Replaced(BaseException):
    """Instead of a new process."""


@pytest.mark.parametrize("where", ["build", "_timed"])
def test_where_the_gpu_is_unusable_a_new_process_continues(
    where, shards, monkeypatch, capsys
) -> None:
    command, built = [], []
    original = getattr(step, where)

    def failing(first, *others):
        ops = first.config.run.ops if where == "build" else others[1][0].choice.ops
        built.append(ops)
        if ops == "xsa=reference":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(first, *others)

    def replaced(program: str, argv: list[str]) -> None:
        command[:] = argv
        raise Replaced

    monkeypatch.setattr(step, where, failing)
    monkeypatch.setattr(restart, "unusable", lambda device: True)
    monkeypatch.setattr(restart.os, "execv", replaced)
    with pytest.raises(Replaced):
        run(shards, "--ops", "reference", "xsa=reference", "auto", "--compile", "off", "--seconds",
            "1e6", "--json", "f.jsonl", "--rounds", "1")  # fmt: skip
    assert "FAILED: xsa=reference eager; why stands above\n" in capsys.readouterr().out
    assert command[1:4] == ["-m", "bench", "step"]
    assert command[-4:-1] == ["--failed", "xsa=reference eager", "--seconds"]
    assert 0 < float(command[-1]) <= 1e6
    built.clear()
    assert step.main(command[4:]) == 1
    lines = [json.loads(text) for text in Path("f.jsonl").read_text().splitlines()]
    assert [line["ops"] for line in lines] == ["reference", "auto"]
    assert built == (["reference", "auto"] if where == "build" else ["auto"])
    assert lines[1]["first_ms"] != lines[1]["median_ms"], "it took turns with the first"


def test_a_gpu_is_unusable_if_it_cannot_be_waited_for(monkeypatch) -> None:
    def fails(device) -> None:
        raise RuntimeError("CUDA error")

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not restart.unusable(gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert restart.unusable(gpu) and not restart.unusable(torch.device("cpu"))


def test_all_that_ends_a_step_is_the_optimisers_phase(shards) -> None:
    """What ranks exchange and the casts of weights too: phases add up to the step."""
    settings = dict(word.split("=") for word in TINY) | {"data": str(shards)}
    config = get("demo").config(settings)
    ranks = Ranks.start("cpu")
    bench = step.Bench(get("demo"), config, settings, ranks, None, 1, 0)
    _, trainer, phases, _ = step._prepared(bench, step.Choice("reference", False))
    seen = []
    for name in ("reduce", "publish"):
        original = getattr(trainer.exchange, name)

        def noted(name=name, original=original):
            seen.append((name, phases.steps[-1][-1].phase))
            return original()

        setattr(trainer.exchange, name, noted)
    phases.step()
    assert seen == [("reduce", "optimizer"), ("publish", "optimizer")]
    passes = ["forward", "backward"] * trainer.accum
    assert [mark.phase for mark in phases.steps[-1]] == ["batch", *passes, "optimizer", "end"]


def test_a_profile_adds_up() -> None:
    spans = [profiling.Span("a", 0, 4), profiling.Span("b", 3, 6), profiling.Span("a", 8, 10)]
    kernels = [(s.name, s.end - s.start) for s in spans]
    summary = profiling.summarised(spans, kernels, [("pgolf::a", 2.0)] * 2, {"pgolf::a": 6000}, 2)
    assert summary["step_us"] == 5.0 and summary["idle_us"] == 1.0
    assert summary["kernels"] == [
        {"name": "a", "calls": 1.0, "us": 3.0, "percent": 60.0},
        {"name": "b", "calls": 0.5, "us": 1.5, "percent": 30.0},
    ]
    (operator,) = summary["operators"]
    assert operator == {
        "name": "pgolf::a", "calls": 1.0, "us": 2.0, "percent": 40.0, "gbs": 3.0
    }  # fmt: skip
    table = profiling.table(summary)
    assert "0.01 ms, in 20.0 % of it nothing runs" in table and table.count("\n") == 5


def test_losses_that_differ_are_wrong(shards, monkeypatch, capsys) -> None:
    def damaged(session, title):
        trainer = build(session, title)
        if session.config.run.ops == "xsa=reference":
            with torch.no_grad():
                trainer.model.tok_emb.weight.mul_(100)
        return trainer

    monkeypatch.setattr(step, "build", damaged)
    assert run(shards, "--ops", "reference", "xsa=reference", "--compile", "off") == 1
    wrong = [x for x in capsys.readouterr().out.splitlines() if x.startswith("WRONG")]
    assert wrong == ["WRONG: xsa=reference eager has another loss than reference eager"]


@pytest.mark.parametrize("wrong", ["reference", "xsa=reference"])
def test_a_loss_that_is_not_finite_is_wrong_and_its_line_is_kept(
    wrong, shards, monkeypatch, capsys
) -> None:
    def broken(session, title):
        trainer = build(session, title)
        if session.config.run.ops == wrong:
            with torch.no_grad():
                trainer.model.tok_emb.weight.fill_(math.nan)
        return trainer

    monkeypatch.setattr(step, "build", broken)
    assert run(shards, "--ops", "reference", "xsa=reference", "--compile", "off", "--json",
               "f.jsonl", "--rounds", "1") == 1  # fmt: skip
    lines = [json.loads(text) for text in Path("f.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [line["ops"] == wrong for line in lines]
    out = capsys.readouterr().out
    assert f"WRONG: {wrong} eager has a loss that is not finite\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "tpu"], "no operator has an implementation 'tpu'"),
        (["--rounds", "0"], "--rounds 0: it has to be 1 or more"),
        (["compile=on"], "compile=on: use --compile, which takes several"),
        (["no_such_key=1"], "unknown key 'no_such_key'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, shards, capsys) -> None:
    overrides = [w for w in arguments if "=" in w and not w.startswith("-")]
    options = [w for w in arguments if w not in overrides]
    assert step.main(["demo", f"data={shards}", *TINY, *overrides, *options]) == 2
    err = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("preparing")]
    assert len(err) == 1 and message in err[0] and err[0].startswith("python -m bench step: ")


def test_an_unknown_recipe_is_one_line(capsys) -> None:
    assert step.main(["no_such_recipe"]) == 2
    assert "no_such_recipe" in capsys.readouterr().err

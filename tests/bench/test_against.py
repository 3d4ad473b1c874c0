"""`python -m bench ops --against`: who is first, ratios and their interval; no real times."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from bench import against, ops, schema

SAMPLE = "8x16 rows"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    (tmp_path / "before" / "bench").mkdir(parents=True)
    (tmp_path / "before" / "bench" / "ops.py").write_text("")
    return tmp_path / "before"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Processes that take `TIMES`, of which only the calls are real; what was called."""
    calls: list[tuple[str, list[str]]] = []

    def measure(checkout: Path, arguments: list[str]) -> against.Lines:
        side = "here" if checkout == against.HERE else "there"
        count = sum(name == side for name, _ in calls)
        calls.append((side, arguments))
        busy = 1.0 + count  # a neighbour, alike for both of a pair
        factor = 1.0 if side == "there" else 1.1 + 0.001 * count
        times = {"forward": 2.0, "backward": 5.0 * factor}
        lines = {
            (SAMPLE, "fp32", mode, "cpu"): {"median_ms": busy * ms, "rounds": 10, "commit": side}
            for mode, ms in times.items()
        }
        if side == "here":
            lines["new", "fp32", "forward", "cpu"] = {"median_ms": 1.0, "rounds": 10}
        return lines

    monkeypatch.setattr(against, "measure", measure)
    return calls


def run(other: Path, *arguments: str) -> int:
    fixed = ["--device", "cpu", "--malloc", "default"]
    return ops.main(["--op", "xsa", *fixed, "--against", str(other), *arguments])


def test_ratios_of_pairs(other, fake, tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    assert run(other, "--pairs", "4", "--json", str(file)) == 1
    lines = {line.mode: line for line in schema.read_jsonl(file, schema.Paired)}
    assert list(lines) == ["forward", "backward"], "what one alone has is left out"
    same, slower = lines["forward"], lines["backward"]
    assert same.ratio == same.ratio_low == same.ratio_high == pytest.approx(1.0)
    assert 1.098 < slower.ratio_low < slower.ratio < slower.ratio_high < 1.105
    assert (slower.pairs, slower.rounds, slower.other_commit) == (4, 10, "there")
    assert slower.other_median_ms == pytest.approx(12.5)  # of 5, 10, 15 and 20
    out = capsys.readouterr().out
    assert out.count("SLOWER") == 1 and "1 of 2 slower by more than 3 %" in out


def test_who_is_first_changes_and_both_are_asked_the_same(other, fake, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    run(other, "--pairs", "3", "--sample", "8192", "--threads", "1", "--cold")
    assert [side for side, _ in fake] == ["here", "there", "there", "here", "here", "there"]
    assert len({tuple(arguments) for _, arguments in fake}) == 1
    output = " ".join(fake[0][1])
    assert output.startswith("--op xsa --providers cpu --dtype fp32 --mode forward backward both ")
    assert "--rounds 10 " in output and output.endswith("--sample 8192 --threads 1 --cold")


def test_only_an_interval_that_lies_above_is_marked(other, monkeypatch, capsys):
    """1.1 and 0.99 in turn: a mean above 1.04, and no proof of anything."""
    turns = iter([1.1, 1.0, 1.0, 0.99] * 2)
    monkeypatch.setattr(
        against, "measure",
        lambda checkout, arguments: {
            (SAMPLE, "fp32", "both", "cpu"): {"median_ms": next(turns), "rounds": 3, "commit": None}
        },
    )  # fmt: skip
    assert run(other, "--pairs", "4") == 0
    out = capsys.readouterr().out
    assert " 1.044 " in out and "SLOWER" not in out


def test_the_interval_by_hand():
    """t of 4 degrees is 2.776445; logs -0.02 to 0.02 have a deviation of 0.0158114."""
    ratios = [2.718281828459045**x for x in (-0.02, -0.01, 0.0, 0.01, 0.02)]
    reach = 2.718281828459045 ** (2.776445 * 0.0158113883 / 5**0.5)
    assert against.interval(ratios) == pytest.approx((1.0, 1 / reach, reach), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "nowhere"], "--against nowhere has no bench/ops.py: name a checkout's root"),
        (["--pairs", "1"], "--pairs 1 shows no spread: at least 2"),
        (["--plot", "p"], "--plot draws times, not ratios"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(arguments, message, other, capsys):
    assert run(other, *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_operator_without_figures_is_named(other, monkeypatch, capsys):
    original = subprocess.run

    def process(command: list[str], cwd: Path, **options) -> subprocess.CompletedProcess:
        if command[0] == "git":
            return original(command, cwd=cwd, **options)
        assert options["env"]["PYTHONPATH"] == str(cwd) and command[1:4] == ["-m", "bench", "ops"]
        if "grad_norm" in command:
            return subprocess.CompletedProcess(command, 2, "", "no operator is named 'grad_norm'\n")
        line = {"sample": SAMPLE, "dtype": "fp32", "mode": "both", "provider": "cpu",
                "median_ms": 1.0, "rounds": 3}  # fmt: skip
        Path(command[command.index("--json") + 1]).write_text(json.dumps(line) + "\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(against.subprocess, "run", process)
    arguments = ["--device", "cpu", "--malloc", "default", "--pairs", "2", "--against", str(other)]
    assert ops.main(["--op", "grad_norm", "xsa", *arguments]) == 0
    out = capsys.readouterr().out
    assert f"grad_norm is not compared: no figures in {against.HERE}: no operator is named" in out
    assert "0 of 1 slower" in out
    assert ops.main(["--op", "grad_norm", *arguments]) == 2
    assert "no operator could be compared" in capsys.readouterr().err

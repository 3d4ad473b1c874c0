"""`pgolf train RECIPE seeds=1,2,3`: what is run, what is kept, and what is said of the scores."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pgolf.child import run_forwarding
from pgolf.cli import main
from pgolf.cli import seeds as module
from pgolf.config import parse_overrides, to_dict
from pgolf.recipes import get
from pgolf.report.t_test import t_test

SCORES = {1: 1.5, 2: 1.6, 3: 1.7}


@pytest.fixture
def runs(monkeypatch, tmp_path, capsys):
    """Type `pgolf train demo ...` where runs take no time; (exit code, output, error, begun)."""
    monkeypatch.chdir(tmp_path)
    for name in ("SEED", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(*words, failing=(), signals=()):
        begun = []

        def run(*command):
            assert command[:3] == ("pgolf", "train", "demo")
            begun.append(given := parse_overrides(command[3:]))
            seed = int(given["seed"])
            code = 130 if signals else 2 * (seed in failing)
            folder = Path(given["out"])
            folder.mkdir(parents=True, exist_ok=True)
            left = {k: v for k, v in given.items() if k not in ("resume", "quick")}
            config = get("demo").config(left)
            (folder / "config.json").write_text(json.dumps(to_dict(config)))
            if not code:
                (folder / "result.json").write_text(json.dumps({"val_bpb": SCORES[seed]}))
            return code, list(signals)

        monkeypatch.setattr(module, "run_forwarding", run)
        code = main(["train", "demo", *words])
        said = capsys.readouterr()
        return code, said.out, said.err, begun

    return call


def test_every_seed_is_run_and_compared(runs):
    code, out, _, begun = runs("layers=2", "seeds=1,2,3", "out=a/b", "against=1.65")
    assert code == 0
    assert begun == [{"layers": "2", "seed": str(n), "out": f"a/b-seed{n}"} for n in (1, 2, 3)]
    summary = json.loads(Path("a/b-seeds.json").read_text())
    assert [run["val_bpb"] for run in summary["runs"]] == [1.5, 1.6, 1.7]
    assert summary["mean"] == pytest.approx(1.6) and summary["deviation"] == pytest.approx(0.1)
    test = t_test([1.5, 1.6, 1.7], [1.65])
    assert (summary["test"]["t"], summary["test"]["p"]) == (test.t, test.p)
    table = " ".join(out.split())
    assert "seed 2 1.60000 a/b-seed2" in table
    assert "mean of 3 1.60000 sample deviation 0.10000 less 1.65000 -0.05000" in table
    said = "one-sample t-test: t = -0.866, 2 degrees of freedom, p = 0.48 (two-sided)"
    assert said in table and "a/b-seeds.json" in table


def test_against_several(runs):
    _, out, _, _ = runs("seeds=1,2", "against=1.4,1.5,1.45")
    assert Path("runs/demo-seeds.json").exists() and "less mean of 3" in out
    assert "Welch t-test: t = 1.732, 1.684 degrees" in out
    code, out, _, _ = runs("seeds=3", "against=1.4")
    assert code == 0 and "no t-test: it takes two runs" in out and "deviation" not in out


def test_a_failing_run_is_named_and_costs_no_other(runs):
    code, out, err, begun = runs("seeds=1,2,3", "quick=true", failing=[2])
    assert code == 2 and len(begun) == 3
    assert "mean of 2" in out and "seed 2: failed with exit code 2, see above" in out
    again = "pgolf train demo seeds=1,2,3 quick=true resume=true"
    assert err == f"pgolf: error: seed 2 failed, see above; what is left to do: `{again}`\n"
    assert json.loads(Path("runs/demo-seeds.json").read_text())["failed"] == [2]
    # what is there is taken, and what had begun goes on
    code, out, _, begun = runs(*again.split()[3:])
    assert code == 0 and begun == [{"seed": "2", "out": "runs/demo-seed2", "resume": "true"}]
    assert "seed 1: runs/demo-seed1 has a result already" in out and "mean of 3" in out
    code, out, _, begun = runs("seeds=1,4", "resume=true", failing=[4])
    assert begun == [{"seed": "4", "out": "runs/demo-seed4"}], "a new one, where there is none"


def test_a_stop_ends_them_all(runs):
    code, _, err, begun = runs("seeds=1,2", signals=[signal.SIGINT])
    assert code == 130 and len(begun) == 1
    assert "stopped in seed 1; go on with `pgolf train demo seeds=1,2 resume=true`" in err


def test_what_is_there_is_not_taken_for_another_run(runs):
    assert runs("seeds=1")[0] == 0
    code, _, err, begun = runs("seeds=1,2")
    assert code == 2 and not begun and "runs/demo-seed1 holds a run already" in err
    code, _, err, begun = runs("seeds=1,2", "resume=true", "layers=2")
    assert code == 2 and not begun and "model.layers=4 then, 2 now" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("seeds=1,x", "seeds=x: expected int"),
        ("seeds=", "seeds=: expected int"),
        ("seeds=1,-2", "seeds=-2: must be at least 0"),
        ("seeds=1,1", "seeds=1,1: each one once"),
        ("seeds=1 seed=2", "seed=2 and seeds=1: give one of them"),
        ("seeds=1 against=low", "against=low: expected a score"),
        ("seeds=1 against=nan", "against=nan: expected a score"),
        ("against=1.5", "against=1.5 needs seeds=1,2,3"),
        ("seeds=1 layers=0", "layers=0: must be at least 1"),
        ("seeds=1 layer=4", "did you mean layers"),
        ("seeds=1 resume=maybe", "resume=maybe: expected true or false"),
        ("seeds=1 as_published=maybe", "as_published=maybe: expected true or false"),
    ],
)
def test_bad_words(runs, words, message):
    code, _, err, begun = runs(*words.split())
    assert code == 2 and message in err and not begun and not list(Path().iterdir())


def test_not_under_torchrun(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err, begun = runs("seeds=1,2")
    assert code == 2 and not begun and "start each run with seed=N" in err


def test_signals_reach_the_run(monkeypatch, tmp_path):
    """Once, and this process waits for its end."""
    ready = tmp_path / "ready"
    monkeypatch.setattr("pgolf.child._MODULE", (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *args: sys.exit(7))\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "time.sleep(60)  # {}\n"
    ))  # fmt: skip

    def press():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    assert run_forwarding("pgolf") == (7, [signal.SIGINT])

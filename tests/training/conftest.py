"""Runs of a tiny model, shared by the tests of this folder."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench.synthetic import Words
from pgolf.cli import main
from pgolf.data.prepare import prepare
from pgolf.scoring import job
from pgolf.training import finish

from .tiny import ONE_THREAD, ROOT, TINY, replaced


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A prepared folder of made-up words."""
    folder = tmp_path_factory.mktemp("data") / "words"
    prepare(Words(), folder, "words", vocab_size=400)
    return folder


@pytest.fixture(scope="session")
def train_alone(shards):
    """Run `pgolf train demo` in a process of its own; returns (exit code, output)."""

    def call(*words: str, launcher: tuple[str, ...] = ("-m", "pgolf")):
        command = [sys.executable, *launcher, "train", "demo", f"data={shards}"]
        done = subprocess.run(
            [*command, *replaced(TINY, words)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=300,
            env=ONE_THREAD,
        )
        return done.returncode, done.stdout + done.stderr

    return call


@pytest.fixture(scope="session")
def finished(train_alone, tmp_path_factory) -> Path:
    """The folder of one finished tiny run."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    code, output = train_alone(f"out={out}")
    assert code == 0, output
    return out


def scored_here(module: str, text: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """In place of `run_module`: the scoring job in this process, which saves its start."""
    assert (module, stdout) == ("pgolf.scoring.job", subprocess.PIPE)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch.object(sys, "argv", [module, text]):
        return subprocess.CompletedProcess([], job.main(), said.getvalue())


@pytest.fixture
def scoring_here(monkeypatch) -> None:
    monkeypatch.setattr(job, "run_module", scored_here)


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """In place of a run's report, seconds of drawing: `finished` has one, tests/report the rest."""

    def written(folder: Path) -> str:
        file = folder / "report.html"
        file.write_text("")
        return str(file)

    monkeypatch.setattr(finish, "report_line", written)


@pytest.fixture
def pgolf(scoring_here, no_plots, capsys):
    """Run a command of pgolf in this process, scoring included; returns (exit code, output)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(list(map(str, words)))
        said = capsys.readouterr()
        return code, said.out + said.err

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def train(pgolf, shards):
    """`pgolf train demo` in this process; returns (exit code, output)."""
    return lambda *words: pgolf("train", "demo", f"data={shards}", *replaced(TINY, words))

"""Fixtures that run commands of pgolf in the test's process, which saves their start."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from pgolf.cli import main
from pgolf.scoring import __main__ as scoring
from pgolf.scoring import job
from pgolf.training import finish


def scored_here(module: str, text: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """In place of `run_module`: the scoring job in this process."""
    assert (module, stdout) == ("pgolf.scoring", subprocess.PIPE)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch.object(sys, "argv", [module, text]):
        return subprocess.CompletedProcess([], scoring.main(), said.getvalue())


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

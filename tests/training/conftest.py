"""Runs of a tiny model, shared by the tests of this folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from .inside import no_plots, pgolf, scoring_here  # noqa: F401
from .tiny import ONE_THREAD, ROOT, TINY, replaced


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


@pytest.fixture
def train(pgolf, shards):  # noqa: F811
    """`pgolf train demo` in this process; returns (exit code, output)."""
    return lambda *words: pgolf("train", "demo", f"data={shards}", *replaced(TINY, words))

"""What Triton and nvcc emit for sm_90 computes the right thing.

The checks run in a process of their own, because Triton interprets in this one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def failures(family: str, *options: str) -> tuple[dict[str, str], int]:
    """({check: why it failed}, number of checks) as `python -m tests.ptx` says."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ptx", family, *options],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode == 2 and "python -m tests.ptx" in run.stderr:
        pytest.skip(run.stderr.strip())
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines and run.returncode in (0, 1), run.stdout + run.stderr
    return {line["check"]: line["why"] for line in lines if line["why"]}, len(lines)


@needs_triton
def test_what_triton_emits() -> None:
    failed, count = failures("triton")
    assert not failed and count >= 13


def test_what_nvcc_emits() -> None:
    """Two samples of every operator that has CUDA kernels."""
    failed, count = failures("nvcc", "--quick")
    assert not failed and count >= 8


@pytest.mark.slow
def test_all_that_nvcc_emits() -> None:
    failed, count = failures("nvcc")
    assert not failed and count >= 26


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("family", "count"), [("triton", 4), ("nvcc", 5)])
def test_changed_kernels_are_noticed(family: str, count: int) -> None:
    """90 % of the mutants; the others are listed, each with the reason."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ptx", family, "--mutants", str(count)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode == 2 and "python -m tests.ptx" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stdout + run.stderr

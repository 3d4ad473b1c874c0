"""What Triton and nvcc emit for sm_90 computes the right thing.

The checks run in a process of their own, because Triton interprets in this one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def results_of(family: str) -> Iterator[tuple[str, str]]:
    """(check, why it failed or '') as `python -m tests.ptx` says."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ptx", family],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines and run.returncode in (0, 1), run.stdout + run.stderr
    return ((line["check"], line["why"]) for line in lines)


@needs_triton
def test_what_triton_emits() -> None:
    found = dict(results_of("triton"))
    assert not {check: why for check, why in found.items() if why}
    assert len(found) >= 13

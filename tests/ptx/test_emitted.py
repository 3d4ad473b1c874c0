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
from typing import Any

import pytest

from ..mutation.cuda import cuda_kernels, cuda_sources
from .prove import FAMILIES

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


def of_file(kernel: str) -> Any:
    """A file of csrc/cuda, by the name of its operator."""
    return pytest.param(kernel.removesuffix(".cu"), marks=pytest.mark.proves(*cuda_sources(kernel)))


@pytest.mark.slow
@pytest.mark.proves("tests/ptx", "tests/ops/test_operators.py")
@pytest.mark.parametrize("operator", [of_file(kernel) for kernel in cuda_kernels()])
def test_all_that_nvcc_emits(operator: str) -> None:
    failed, count = failures("nvcc", "--only", f"{operator} ")
    assert not failed and count >= 2


def subjects() -> Iterator[Any]:
    """(family, check, mutants of a class) of every kernel that is changed."""
    for family, count in (("triton", 4), ("nvcc", 5)):
        for check in FAMILIES[family].subjects:
            name, sources = check.partition(" ")[0], []  # none: a kernel of the tests' own
            if family == "triton":
                sources = [f"triton_kernels/{name}.py", "triton_kernels/configs.json"]
            elif f"{name}.cu" in cuda_kernels():
                sources = cuda_sources(f"{name}.cu")
            yield pytest.param(family, check, count, marks=pytest.mark.proves(*sources))


@needs_triton
@pytest.mark.slow
@pytest.mark.proves("tests/ptx", "bench/aot_compile.py")
@pytest.mark.parametrize(("family", "check", "count"), list(subjects()))
def test_changed_kernels_are_noticed(family: str, check: str, count: int) -> None:
    """90 % of the mutants; the others are listed, each with the reason."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ptx", family, "--mutants", str(count), "--only", check],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode == 2 and "python -m tests.ptx" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stdout + run.stderr

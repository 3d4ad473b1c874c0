"""What Triton and nvcc emit for sm_90 computes the right thing.

The checks run in a process of their own, because Triton interprets in this one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgolf.ops.operator import OPERATORS

from ..mutation.cuda import cuda_sources
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


TRITON = ("xsa", "fake_quant", "newton_schulz", "leaky_relu2_mlp")


NVCC = [name for name, operator in OPERATORS.items() if "cuda" in operator.implementations]
# Operators that launch the kernels of another one's file.
LAUNCH = {"fake_quant": "weight_cast", "leaky_relu2_mlp": "leaky_relu2"}


def sources(family: str, name: str) -> tuple[str, ...]:
    """What is behind a check of that name; nothing for a kernel of the tests' own."""
    if family == "triton":
        return f"triton_kernels/{name}.py", "triton_kernels/configs.json"
    if name not in OPERATORS:
        return ()
    return cuda_sources(f"{LAUNCH.get(name, name)}.cu")


def emitted(family: str, names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.proves(*sources(family, n))) for n in names]


@needs_triton
@pytest.mark.slow
@pytest.mark.proves("tests/ptx", "bench/aot_compile.py")
@pytest.mark.parametrize("name", emitted("triton", TRITON))
def test_what_triton_emits(name: str) -> None:
    failed, count = failures("triton", "--only", name)
    assert not failed and count >= 2


@pytest.mark.slow
@pytest.mark.proves("tests/ptx", "tests/ops/test_operators.py")
@pytest.mark.parametrize("name", emitted("nvcc", NVCC))
def test_what_nvcc_emits(name: str) -> None:
    failed, count = failures("nvcc", "--only", f"{name} ")
    assert not failed and count >= 2


@pytest.mark.slow
@pytest.mark.proves("tests/ptx", "csrc/cuda")
@pytest.mark.parametrize(("name", "least"), [("block sums", 2), ("division", 1)])
def test_barriers_and_quotients_of_nvcc(name: str, least: int) -> None:
    failed, count = failures("nvcc", "--only", name)
    assert not failed and count >= least


def subjects() -> Iterator[Any]:
    """(family, check, mutants of a class) of every kernel that is changed."""
    for family, count in (("triton", 4), ("nvcc", 5)):
        for check in FAMILIES[family].subjects:
            behind = sources(family, check.partition(" ")[0])
            yield pytest.param(family, check, count, marks=pytest.mark.proves(*behind))


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

"""Whether the checks of the Triton kernels notice when a kernel is changed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .kernels import kernel_mutants, kernels

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.slow
def test_changed_kernels_are_noticed() -> None:
    """90 % of each kernel's mutants; the others are listed, each with the reason."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.mutation"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kernel", kernels())
def test_every_kernel_has_enough_mutants(kernel: str) -> None:
    found = kernel_mutants(kernel)
    assert len({m.name for m in found}) == len(found) >= 30
    assert kernel in {m.function for m in found}


def test_a_kernel_brings_the_functions_that_it_calls() -> None:
    origins = {(m.module, m.function) for m in kernel_mutants("newton_schulz_product")}
    assert {("gemm", "matmul_tile"), ("newton_schulz", "triangle_tile")} <= origins
    assert not any(function.startswith("leaky") for _, function in origins)
    changes = [m.change for m in kernel_mutants("leaky_relu2_up_tma")]
    assert not any("assume" in change or "flatten=False" in change for change in changes)


def test_listed_survivors_are_mutants_and_have_reasons() -> None:
    listed = json.loads((ROOT / "tests" / "mutation" / "survivors.json").read_text())
    for kernel, survivors in listed.items():
        names = {m.name for m in kernel_mutants(kernel)}
        assert survivors.keys() <= names
        assert all(len(reason.split()) > 3 for reason in survivors.values())

"""Whether the checks of the Triton and CUDA kernels notice when a kernel is changed."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .cuda import cuda_kernels, cuda_mutants, cuda_sources
from .kernels import kernel_mutants, kernels, module_of

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def proofs() -> Iterator[Any]:
    """The kernels of each module of triton_kernels, and each file of csrc/cuda."""
    for module in sorted({module_of(kernel) for kernel in kernels()}):
        some = [kernel for kernel in kernels() if module_of(kernel) == module]
        sources = (f"triton_kernels/{module}.py", "triton_kernels/configs.json")
        yield proof(some, module, *sources, f"tests/mutation/checks/{module}.py")
    for kernel in cuda_kernels():
        sources = ("tests/simt", "tests/mutation/checks/cuda.py", *cuda_sources(kernel))
        yield proof([kernel], kernel, *sources)


def proof(some: list[str], name: str, *sources: str) -> Any:
    """One that depends on the sources and on the survivors listed for them."""
    listed = f"tests/mutation/survivors/{name}.json"
    files = (*sources, *([listed] if (ROOT / listed).exists() else []))
    return pytest.param(some, id=name, marks=pytest.mark.proves(*files))


@needs_triton
@pytest.mark.slow
@pytest.mark.proves("tests/mutation/__main__.py")
@pytest.mark.parametrize("some", list(proofs()))
def test_changed_kernels_are_noticed(some: list[str]) -> None:
    """90 % of each kernel's mutants; the others are listed, each with the reason."""
    command = [sys.executable, "-m", "tests.mutation", *some]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kernel", kernels())
def test_every_kernel_has_enough_mutants(kernel: str) -> None:
    found = kernel_mutants(kernel)
    assert len({m.name for m in found}) == len(found) >= 30
    assert kernel in {m.function for m in found}


@pytest.mark.parametrize("kernel", cuda_kernels())
def test_every_file_of_cuda_kernels_has_enough_mutants(kernel: str) -> None:
    found = cuda_mutants(kernel)
    assert len({m.name for m in found}) == len(found) >= 30
    assert f"cuda/{kernel}" in {m.module for m in found}


def test_proofs_depend_on_all_files_of_an_operator() -> None:
    named = {name for kernel in cuda_kernels() for name in cuda_sources(kernel)}
    glue = {f"pgolf/ops/{path.name}" for path in (ROOT / "pgolf/ops").glob("*_kernels.py")}
    assert glue and glue <= named


def test_a_cuda_kernel_brings_the_device_code_that_it_calls() -> None:
    origins = {(m.module, m.function) for m in cuda_mutants("xsa.cu")}
    assert {("cuda/device.cuh", "group_sum"), ("xsa.h", "xsa_norm")} <= origins
    assert ("cuda/multi_tensor.cuh", "for_elements") not in origins


def test_a_kernel_brings_the_functions_that_it_calls() -> None:
    origins = {(m.module, m.function) for m in kernel_mutants("newton_schulz_product")}
    assert {("gemm", "matmul_tile"), ("newton_schulz", "triangle_tile")} <= origins
    assert not any(function.startswith("leaky") for _, function in origins)
    changes = [m.change for m in kernel_mutants("leaky_relu2_up_tma")]
    assert not any("assume" in change or "flatten=False" in change for change in changes)


def test_listed_survivors_are_mutants_and_have_reasons() -> None:
    files = (ROOT / "tests" / "mutation" / "survivors").glob("*.json")
    listed = [(file.stem, *item) for file in files for item in json.loads(file.read_text()).items()]
    assert listed
    for name, kernel, survivors in listed:
        assert name == (kernel if kernel.endswith(".cu") else module_of(kernel))
        found = cuda_mutants(kernel) if kernel.endswith(".cu") else kernel_mutants(kernel)
        names = {m.name for m in found}
        assert survivors.keys() <= names
        assert all(len(reason.split()) > 3 for reason in survivors.values())

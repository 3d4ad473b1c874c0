"""What nvcc's PTX for sm_90 has to compute: checks run by `python -m tests.ptx nvcc`.

Every operator of the registry that has CUDA kernels is checked by its own small samples, with the
test of accuracy that all implementations have to pass: a new one needs nothing here.
"""

import functools
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from pgolf.ops.operator import OPERATORS, Operator, Sample

from .faults import Missing, Race
from .machine import launch
from .memory import GlobalMemory
from .mutator import mutants
from .nvcc_launch import Runner, why_not
from .parser import Kernel, Module

FOLDER = tempfile.TemporaryDirectory()  # as long as the process lives


@functools.cache
def runner() -> Runner:
    """Made before an operator is asked whether its CUDA kernels run here."""
    return Runner(Path(FOLDER.name))


def check_operator(operator: Operator, sample: Sample, dtype: torch.dtype) -> None:
    """Results and gradients against float64, and that kernels of nvcc computed them."""
    before = len(runner().ran)
    from tests.ops.test_operators import test_accuracy

    missing = operator.implementations["cuda"].missing()
    assert not missing, missing
    test_accuracy(operator, "cuda", sample, dtype)
    assert len(runner().ran) > before


@functools.cache
def block_sum() -> Kernel:
    source = Path(__file__).with_name("block_sum.cu")
    path = Path(FOLDER.name) / "block_sum.ptx"
    subprocess.run(["nvcc", "-arch=sm_90", "-ptx", source, "-o", path], check=True)
    return Module(path.read_text()).kernel("block_sum")


def check_block_sums(kernel: Kernel) -> None:
    """Sums of rows: a struct as parameter, both kinds of shared memory, barriers, shuffles."""
    columns = 300
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    sums, memory = torch.full((3,), torch.nan), GlobalMemory()
    memory.add(x)
    memory.add(sums)
    rows = struct.pack("<Qif", x.data_ptr(), columns, 0.5)
    arguments = [rows, struct.pack("<Q", sums.data_ptr())]
    kernel = runner().taken(kernel)
    launch(kernel, (3,), (128,), arguments, memory, 4 * columns, limit=runner().limit)
    torch.testing.assert_close(sums.double(), 0.5 * x.double().sum(1), rtol=1e-6, atol=1e-6)


def check_missing_barriers() -> None:
    """Whichever of the two is missing is noticed."""
    without = [m for m in mutants(block_sum(), "block_sum") if m.kind == "barrier"]
    assert len(without) == 2
    for mutant in without:
        try:
            check_block_sums(mutant.kernel)
        except Race:
            continue
        raise AssertionError(f"passes: {mutant.name}")


def check_division() -> None:
    """Every division is correctly rounded; a quantiser has no other reciprocal either.

    Its codes depend on it to the last bit.
    """
    emitted = runner().emitted
    texts = {name: emitted.text(name) for name in emitted.names()}
    for text in set(texts.values()):
        assert set(re.findall(r"\bdiv\.[\w.]*f32", text)) <= {"div.rn.f32"}
    for name in texts:
        if "weight_cast" in name:
            opcodes = {i.opcode for i in emitted.kernel(name).instructions}
            assert "div.rn.f32" in opcodes, name
            assert not any(opcode.startswith("rcp.") for opcode in opcodes), name


def checks() -> dict[str, Callable[[], None]]:
    """By operator, sample and dtype.

    Raises:
        Missing: nvcc's kernels cannot be run on this machine.
    """
    if why := why_not():
        raise Missing(why)
    runner()
    found = {
        "block sums": lambda: check_block_sums(block_sum()),
        "block sums without a barrier": check_missing_barriers,
        "division": check_division,
    }
    for operator in OPERATORS.values():
        if "cuda" not in operator.implementations:
            continue
        samples = [s for s in operator.samples() if not s.bench and not s.label.startswith("0")]
        for sample in samples:
            for dtype in operator.implementations["cuda"].dtypes:
                name = f"{operator.name} {sample.label} {dtype}"
                found[name] = functools.partial(check_operator, operator, sample, dtype)
    return found

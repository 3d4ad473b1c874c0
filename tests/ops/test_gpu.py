"""The operators' kernels on a GPU, against float64: not interpreted, so only where there is one."""

import pytest
import torch

from pgolf.ops.operator import OPERATORS
from pgolf.ops.testing import Call, kernel, poisoned, same_bits

from .cases import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CASES = [
    pytest.param(operator, impl, sample, id=f"{name}-{impl}-{sample.label}")
    for name, operator in OPERATORS.items()
    for impl, implementation in operator.implementations.items()
    if implementation.device == "cuda"
    for sample in operator.samples()
    # Those are for benchmarks; but programs of a GEMM take a second block of rows in no other.
    if "98304" not in sample.label or operator.timed
]


@pytest.mark.parametrize(("operator", "impl", "sample"), CASES)
def test_on_a_gpu(operator, impl, sample) -> None:
    """The rule of pgolf.ops.testing, and of our own kernels the same bits twice."""
    implementation = operator.implementations[impl]
    if implementation.package and (missing := implementation.missing()):
        pytest.skip(missing)
    for dtype in implementation.dtypes:
        call = Call.of(operator, sample, dtype, torch.device("cuda"))
        assert problem(call, operator, impl) == "", dtype
        with poisoned():
            twice = [call.run(kernel(operator, impl)) for _ in range(2)]
        assert implementation.package or all(map(same_bits, *twice)), dtype

"""The operators' kernels on a GPU, against float64: not interpreted, so only where there is one."""

import pytest
import torch

from pgolf.ops.operator import OPERATORS

from .cases import Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CASES = [
    pytest.param(operator, impl, sample, dtype, id=f"{name}-{impl}-{sample.label}-{dtype}")
    for name, operator in OPERATORS.items()
    for impl, implementation in operator.implementations.items()
    if implementation.device == "cuda"
    for sample in operator.samples()
    for dtype in implementation.dtypes
    if "98304" not in sample.label  # those are for benchmarks
]


@pytest.mark.parametrize(("operator", "impl", "sample", "dtype"), CASES)
def test_on_a_gpu(operator, impl, sample, dtype) -> None:
    """The rule of test_operators.py, and the same bits twice."""
    call = Call(operator, sample, dtype, torch.device("cuda"))
    got, again, theirs = call.run(impl), call.run(impl), call.run("reference")
    assert all(map(torch.equal, got, again))
    if operator.name == "fake_quant":
        assert all(map(torch.equal, got, theirs))
        return
    truth, results = call.in_double().run("reference"), call.results()
    for i, (mine, yardstick, exact) in enumerate(zip(got, theirs, truth, strict=True)):
        if exact.numel():
            floor = 4 * torch.finfo(mine.dtype).eps * exact.abs().max()
            limit = (yardstick.double() - exact).abs().max()
            assert (mine.double() - exact).abs().max() <= (3 if i >= results else 2) * limit + floor

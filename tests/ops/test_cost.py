"""cost() is what passes of kernels and matmuls really read and write, not what someone believed."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from pgolf.ops.operator import OPERATORS, Operator, Sample, Work
from pgolf.ops.tensors import nbytes
from pgolf.ops.testing import Call, kernel
from pgolf.triton_kernels.launch import Launch, intercepted

from ..triton.interpreter import repair, touched
from .cases import cases, is_empty, over, small

repair()

SINGLE_PASS = ("fake_quant", "weight_cast", "xsa")
# Half of each is an operator of the compiled half; their own tests count.
WITH_ROWS = ("linear_residual", "linear_mix", "linear_qk_rope", "norm_mlp")


class Traffic:
    """Bytes read and written: of launches, the addresses; of matmuls, operands and results."""

    def __init__(self) -> None:
        self.read = self.written = self.launches = 0
        self.kernels: set[str] = set()

    def launch(self, launch: Launch) -> None:
        self.kernels.add(launch.kernel.__name__)
        with touched() as t:
            launch()
        self.launches += 1
        self.read += t.read_bytes
        self.written += t.written_bytes

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.matmul(a, b)
        self.read += nbytes(a, b)
        self.written += nbytes(out)
        return out

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, kernels and every `@` of the operators count."""
        instead = mock.patch.object(torch.Tensor, "__matmul__", lambda a, b: self.matmul(a, b))
        with instead, intercepted(self.launch):
            yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@over(p for p in cases() if p.values[1] == "triton" and p.values[0].name not in WITH_ROWS)
def test_least_bytes_are_those_that_are_touched(
    operator: Operator, impl: str, sample: Sample, dtype: torch.dtype
) -> None:
    """Launch by launch in the interpreter, every address once a launch.

    The least may leave out what a kernel keeps for itself between two launches, such as partial
    sums: written once, read once, a number or two a row at most. Nothing is launched for what is
    empty, whatever scalars and weights it has.
    """
    call = Call.of(operator, sample, dtype)
    # rowdot(h, dh) for rstd is a pointwise pass that belongs to no kernel of the operator
    call.wanted = [n for n in call.wanted if n != "rstd"]
    leaves = call.leaves()
    passes = []
    forward = Traffic()
    with forward.counted():
        out = call.on(kernel(operator, impl), *leaves)
    passes.append(forward)
    if leaves:
        upstream = torch.ones_like(out)
        backward = Traffic()
        with backward.counted():
            torch.autograd.grad(out, leaves, upstream)
        passes.append(backward)
    if is_empty(call):
        assert not sum(traffic.launches for traffic in passes)
        return
    for traffic, least in zip(passes, operator.cost(**call.arguments), strict=False):
        if not traffic.read and "dtype" in call.arguments:
            continue  # a gradient that is a cast is torch's
        scratch = traffic.read - least.read
        assert traffic.written - least.written == scratch
        if operator.name in SINGLE_PASS:
            assert scratch == 0
        first = next(iter(call.arguments.values()))
        if operator.name == "xsa_linear" and "xsa_backward_kernel" in traffic.kernels:
            scratch -= nbytes(first)  # the gradient that its epilogue would not write
        assert 0 <= scratch <= 8 * first[..., 0].numel()


@pytest.mark.parametrize("name", SINGLE_PASS)
def test_least_bytes_are_inputs_outputs_and_saved_tensors(name: str) -> None:
    """A single pass reads every input once and writes what comes out and what is kept."""
    operator = OPERATORS[name]
    calls = [Call.of(operator, sample, torch.float32) for sample in small(operator)]
    for call in (c for c in calls if not is_empty(c)):
        inputs = {n: a for n, a in call.arguments.items() if isinstance(a, torch.Tensor)}
        leaves = call.leaves()
        out, kept = _run_and_keep(call, kernel(operator, "cpu"), leaves)
        forward, backward = operator.cost(**call.arguments)
        known = {t.data_ptr() for t in [*inputs.values(), *leaves, out]}
        extra = [t for t in kept if t.data_ptr() not in known]
        assert forward.read == nbytes(*inputs.values())
        assert forward.written == nbytes(out, *extra)
        if backward != Work(0, 0, 0):
            wanted = [t for n, t in inputs.items() if n in operator.differentiable]
            assert backward.read == nbytes(out, *kept)
            assert backward.written == nbytes(*wanted)


def _run_and_keep(call: Call, function, leaves: list) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result and the tensors that are saved for the gradient."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return call.on(function, *leaves), kept


def test_flops_are_those_of_the_matmuls() -> None:
    """Two GEMMs forward and four backward; three a Newton-Schulz step."""
    mlp, ns = OPERATORS["leaky_relu2_mlp"], OPERATORS["newton_schulz"]
    h, up, down = torch.empty(10, 6), torch.empty(8, 6), torch.empty(6, 8)
    assert [w.flops for w in mlp.cost(h, up, down, 0.5)] == [2 * 960, 4 * 960]
    forward, backward = ns.cost(torch.empty(3, 10, 4), ((1, 1, 1),) * 2)
    per_step = 2 * 3 * (4 * 4 * 10 + 4 * 4 * 4 + 4 * 4 * 10)
    assert forward.flops == 2 * per_step and backward == Work(0, 0, 0)

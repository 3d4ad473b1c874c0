"""Opaque operators: what torch.library.custom_op promises, with less of Python in a call."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.opaque import intercepted
from pgolf.ops.compile import Recorder
from pgolf.ops.derivatives import register_gradient
from pgolf.ops.opaque import OPAQUE, Opaque, opaque

calls: list[str] = []


def _doubled(x: Tensor, add: Tensor | None, by: float) -> Tensor:
    calls.append("doubled")
    torch._dynamo.graph_break()  # is an error where Dynamo traces it in one graph
    return 2 * x + by if add is None else 2 * x + by + add


def _bumped(xs: list[Tensor], by: Tensor) -> None:
    calls.append("bumped")
    for x in xs:
        x.data.add_(by)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


@pytest.fixture(scope="module")
def toys() -> Iterator[tuple[Opaque, Opaque]]:
    doubled = opaque("pgolf::toy_doubled", mutates_args=())(_doubled)
    doubled.register_fake(lambda x, add, by: torch.empty_like(x))
    register_gradient(
        "toy", doubled, lambda ctx, g: (2 * g, g if ctx.needs_input_grad[1] else None, None),
        _setup_context,
    )  # fmt: skip
    bumped = opaque("pgolf::toy_bumped", mutates_args=("xs",))(_bumped)
    bumped.register_fake(lambda xs, by: None)
    yield doubled, bumped
    for name in ("pgolf::toy_doubled", "pgolf::toy_bumped"):
        del OPAQUE[name]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    calls.clear()


def test_it_passes_opcheck(toys) -> None:
    doubled, bumped = toys
    x = torch.randn(3, requires_grad=True)
    torch.library.opcheck(doubled.overload, (x, None, 1.0))
    torch.library.opcheck(doubled.overload, (x.detach(), x, 1.0))
    torch.library.opcheck(bumped.overload, ([torch.randn(3)], torch.ones(())))


@pytest.mark.parametrize("grad", [False, True])
def test_values_and_gradients(toys, grad) -> None:
    x, add = (torch.randn(3, requires_grad=grad) for _ in range(2))
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            out = toys[0](x, add, by=1.0)
        assert torch.equal(out, 2 * x + 1.0 + add) and out.requires_grad == (grad and recording)
    if grad:
        out.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 2.0)) and torch.equal(add.grad, torch.ones(3))
    assert calls == ["doubled"] * 2


def test_a_second_derivative_is_refused(toys) -> None:
    x = torch.randn(3, requires_grad=True)
    (g,) = torch.autograd.grad(toys[0](x, None, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="toy: its kernels have first derivatives only"):
        g.sum().backward()


def test_no_gradient_is_made_up(toys) -> None:
    """Of an operator that was given none, and of what changes its arguments."""
    alone = opaque("pgolf::toy_alone", mutates_args=())(_doubled)
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="toy_alone.* but no autograd formula was registered"):
        alone(x, None, 1.0).sum().backward()
    with pytest.raises(RuntimeError, match="toy_bumped changes arguments in place"):
        toys[1].register_autograd(lambda ctx, g: g)
    del OPAQUE["pgolf::toy_alone"]


def test_modes_see_every_call_and_fake_tensors_run_nothing(toys) -> None:
    doubled, _ = toys
    with torch.no_grad(), Recorder() as recorder:
        doubled(torch.ones(3), None, 1.0)
    assert [call[0] for call in recorder.calls] == [doubled.overload] and len(calls) == 1
    with FakeTensorMode():
        assert doubled(torch.ones(3), None, 1.0).shape == (3,)
    assert doubled(torch.ones(3, device="meta"), None, 1.0).is_meta
    assert len(calls) == 1


def test_what_it_changes_counts_it(toys) -> None:
    xs = [torch.zeros(3), torch.zeros(2)]
    toys[1](xs, torch.ones(()))
    assert [x._version for x in xs] == [1, 1] and xs[0].tolist() == [1.0] * 3


def test_dynamo_keeps_out_of_what_runs(toys) -> None:
    """In one graph it is an operator; called from a frame that Dynamo leaves alone it is C code."""
    torch._dynamo.reset()
    x = torch.arange(3.0)
    one = torch.compile(lambda x: toys[0](x, None, 1.0) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(one(x), 2 * x + 2)
    seen = []

    def noted(graph, inputs):
        seen.append(graph)
        return graph

    @torch._dynamo.disable(recursive=False)  # what this calls may be compiled
    def left_alone(x: Tensor) -> Tensor:
        return torch.ops.pgolf.toy_doubled(x, None, 1.0)

    @torch.compile(backend=noted)
    def broken(x: Tensor) -> Tensor:
        return left_alone(x + 1) - 1

    assert torch.equal(broken(x), 2 * (x + 1))
    targets = {str(n.target) for g in seen for n in g.graph.nodes if n.op == "call_function"}
    assert seen and not any("mul" in target for target in targets), targets


def test_a_benchmark_can_take_its_place(toys) -> None:
    found = []

    def call(operator, function, args, named):
        found.append((operator.name, operator.changed(args, named)))
        return function(*args, **named)

    xs = [torch.zeros(3)]
    with intercepted(call), torch.no_grad():
        toys[0](torch.ones(3), None, 1.0)
        toys[1](xs, torch.ones(()))
    toys[0](torch.ones(3), None, 1.0)
    assert [name for name, _ in found] == ["pgolf::toy_doubled", "pgolf::toy_bumped"]
    assert found[1][1] == xs and calls == ["doubled", "bumped", "doubled"]

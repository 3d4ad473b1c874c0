"""torch.compile of what calls operators: into one graph, after each operator alone."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf.ops.joined_norm import joined_norm
from pgolf.ops.operator import OPERATORS, Operator, Sample
from pgolf.ops.stacked import rows_of, stacked
from pgolf.ops.token_sums import shared_orders


def compile_graph(function: Callable, ops: Mapping[str, str], device: torch.device) -> Callable:
    """torch.compile into one graph, anew for each shape; compilation itself is at the first call.

    Args:
        function: a module or a function.
        ops: operator -> implementation, of those that it calls.
        device: where it runs.
    """
    chosen = [(OPERATORS[n], impl) for n, impl in ops.items() if impl != "reference"]
    if any(o.differentiable and not o.implementations[impl].package for o, impl in chosen):
        _introduce(device.type)
    return torch.compile(function, fullgraph=True, dynamic=False)


@functools.cache
def _introduce(device: str) -> None:
    """Let Inductor meet each opaque operator that has kernels for a device, before any model.

    At its first meeting Inductor (of torch 2.9 to 2.11 at least) spells out for a log, whether it
    is on or not, what every argument was computed from, and what that was computed from: at the
    loss, behind 5 layers, that is 352 million characters, behind 11 it never ends. Here arguments
    come from nowhere. A graph from Inductor's cache on disk would be no meeting.
    """
    calls = [call for o in OPERATORS.values() for call in _opaque_calls(o, device)]
    calls += _calls_of_models(device)

    def alone() -> list:
        return [operator(*args, **named) for operator, args, named, _ in calls]

    with torch.no_grad():
        cold = {"fx_graph_cache": False}
        torch.compile(alone, fullgraph=True, dynamic=False, options=cold)()


def _calls_of_models(device: str) -> list["OpaqueCall"]:
    """Of what layers hand each other and what tables share, which is no operator of its own."""
    known = OPERATORS["residual_norm"].implementations.items()
    impl = next((n for n, i in known if i.runs_on(device) and not i.missing()), None)
    if impl is None:
        return []
    leaves = [torch.ones(8, device=device, requires_grad=True) for _ in range(2)]
    with torch.enable_grad(), Recorder() as recorder:
        first, second = rows_of(stacked(leaves))
        x_in, _ = joined_norm([first[None], second[None]], [None, first.detach()], impl=impl)
        x_in.sum().backward()
        shared_orders([(torch.zeros(1, 1, dtype=torch.int64, device=device), 2)], impl)
    return recorder.calls


# An opaque operator, its arguments, those by keyword, and what it gave.
OpaqueCall = tuple[Callable, tuple, dict[str, Any], Any]


class Recorder(TorchDispatchMode):
    """Keeps the calls of our opaque operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpaqueCall] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "pgolf":
            self.calls.append((func, args, kwargs or {}, out))
        return out


def _opaque_calls(operator: Operator, device: str) -> list[OpaqueCall]:
    """A call of each opaque operator that an operator's small samples reach, forward and backward.

    None where no kernel of pgolf runs on that device (those of attention, which every layer has,
    are another's, and nothing about them is long), nor where there is no gradient: operators
    without one are outside of compiled graphs, or reached by others' gradients.
    """
    known = operator.implementations.items()
    here = (n for n, i in known if i.runs_on(device) and not i.package and not i.missing())
    impl = next(here, None)
    if impl is None or not operator.differentiable:
        return []
    found: dict[Callable, OpaqueCall] = {}
    for sample in operator.samples():
        if not sample.bench:
            with FakeTensorMode():  # runs no kernel, which Triton would have to compile
                reached = {call[0] for call in _run(operator, impl, sample, device)}
            if not reached <= found.keys():
                found |= {call[0]: call for call in _run(operator, impl, sample, device)}
    return list(found.values())


def _run(operator: Operator, impl: str, sample: Sample, device: str) -> list[OpaqueCall]:
    """What an operator calls for a sample, forward and backward."""
    dtype = torch.bfloat16 if operator.timed else torch.float32  # epilogues are for bf16
    args, named = sample.build(torch.device(device), dtype)
    given = inspect.signature(operator.call).bind(*args, **named).arguments
    for name in operator.differentiable:
        if given.get(name) is not None:
            given[name] = given[name].detach().requires_grad_()
    with torch.enable_grad(), Recorder() as recorder:
        out = operator.call(**given, impl=impl)
        results = [out] if isinstance(out, Tensor) else list(out)
        torch.autograd.backward(results, [torch.ones_like(t) for t in results])
    return recorder.calls

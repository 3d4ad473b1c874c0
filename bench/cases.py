"""One operator on one sample: its arguments, what is timed, and the check against float64."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.arguments import as_tuple, with_tensors
from bench.timing import Entry
from pgolf.device import DTYPES
from pgolf.ops.operator import Operator, Result, Sample, Work
from pgolf.ops.tensors import tensors_in

MODES = ("forward", "backward", "both")
# How many times torch's own error a provider may have, in the output and in gradients.
ALLOWED = {"output": 2.0, "gradient": 3.0}

Function = Callable[..., Result]
Results = tuple[Tensor, ...]  # the outputs and the gradients


@dataclass(frozen=True)
class Case:
    """An operator with arguments on a device.

    Attributes:
        leaves: the tensors whose gradients are taken; () if the operator has none.
        upstream: gradients of the outputs, allocated before anything is timed.
        outputs: how many there are, arguments that are changed in place among them.
    """

    operator: Operator
    sample: Sample
    dtype: str
    args: tuple
    kwargs: dict[str, Any]
    leaves: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    outputs: int

    @property
    def device(self) -> torch.device:
        return next(t for a in self.args for t in tensors_in(a)).device

    @property
    def shapes(self) -> list[list[int]]:
        tensors = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]
        return [list(t.shape) for t in tensors]

    def has(self, mode: str) -> bool:
        """Whether this mode exists: not all operators have a gradient, or work to do for it."""
        _, backward = self.operator.cost(*self.args, **self.kwargs)
        return {"forward": True, "both": bool(self.leaves), "backward": backward.read > 0}[mode]

    def work(self, mode: str) -> Work:
        """Least work of a mode."""
        forward, backward = self.operator.cost(*self.args, **self.kwargs)
        both = Work(*(a + b for a, b in zip(forward, backward, strict=True)))
        return {"forward": forward, "backward": backward, "both": both}[mode]

    def entry(self, function: Function, mode: str) -> Entry:
        """What is timed. Outputs are allocated inside, as a user would; `upstream` is not."""

        def forward(_: Any) -> Result:
            return function(*self.args, **self.kwargs)

        def backward(out: Result) -> Results:
            return torch.autograd.grad(as_tuple(out), self.leaves, self.upstream)

        if mode == "forward":
            return Entry(forward)
        if mode == "backward":
            return Entry(backward, prepare=lambda: forward(None))
        return Entry(lambda _: backward(forward(None)))


def build(operator: Operator, sample: Sample, device: torch.device, dtype: str) -> Case:
    """The arguments of a sample, those that have gradients as leaves."""
    args, kwargs = sample.build(device, DTYPES[dtype])
    given = inspect.signature(operator.reference).bind(*args, **kwargs).arguments
    leaves = tuple(
        given[name].requires_grad_()
        for name in operator.differentiable
        if isinstance(given.get(name), Tensor)
    )
    # The same in each run: the check holds one number against torch's error of that number, which
    # is small by chance now and then.
    g = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        outputs = _fresh(operator, operator.reference, args, kwargs)
        upstream = tuple(
            torch.randn(t.shape, generator=g, device=device).to(t.dtype) for t in outputs if leaves
        )
    return Case(operator, sample, dtype, args, kwargs, leaves, upstream, len(outputs))


def _fresh(operator: Operator, function: Function, args: tuple, kwargs: dict) -> Results:
    """Outputs of a call that changes copies of what it changes; those are outputs too."""
    given = inspect.signature(operator.reference).bind(*args, **kwargs).arguments
    changed = [n for n in operator.mutates if n in given]
    given |= {n: with_tensors(given[n], torch.clone) for n in changed}
    # (Peers know the arguments by their places.)
    positional = tuple(given.values())[: len(args)]
    named = {n: given[n] for n in kwargs}
    outputs = as_tuple(function(*positional, **named))
    return (*outputs, *(t for n in changed for t in tensors_in(given[n])))


def traffic(operator: Operator, sample: Sample, dtype: str) -> int:
    """Least bytes of forward and backward, without memory for the arguments."""
    with FakeTensorMode():
        args, kwargs = sample.build(torch.device("cpu"), DTYPES[dtype])
        return sum(work.read + work.written for work in operator.cost(*args, **kwargs))


# --- correctness ----------------------------------------------------------------------------------


def results(case: Case, function: Function) -> Results:
    """The outputs and the gradients of one call."""
    outputs = _fresh(case.operator, function, case.args, case.kwargs)
    grads = torch.autograd.grad(outputs, case.leaves, case.upstream) if case.leaves else ()
    return (*(t.detach().clone() for t in outputs), *grads)


def _widened(value: Any) -> Any:
    def widen(t: Tensor) -> Tensor:
        wide = t.detach().double() if t.is_floating_point() else t
        return wide.requires_grad_(t.requires_grad)

    return torch.float64 if isinstance(value, torch.dtype) else with_tensors(value, widen)


def truth(case: Case) -> Results:
    """The same inputs in float64 through the reference."""
    twins = {id(leaf): _widened(leaf) for leaf in case.leaves}

    def twin(value: Any) -> Any:
        return twins[id(value)] if id(value) in twins else _widened(value)

    wide = dataclasses.replace(
        case,
        args=tuple(map(twin, case.args)),
        kwargs={name: twin(value) for name, value in case.kwargs.items()},
        leaves=tuple(map(twin, case.leaves)),
        upstream=tuple(t.double() for t in case.upstream),
    )
    return results(wide, case.operator.reference)


def wrong(found: Results, yardstick: Results, exact: Results, outputs: int = 1) -> str:
    """What is wrong with a provider's results; '' if its error is that of its dtype.

    error <= k error(torch in the same dtype) + one rounding of the largest value, of the largest
    and of the mean error, so that neither one element nor all of them can be off. The first
    `outputs` results are no gradients.
    """
    for i, (got, torchs, ideal) in enumerate(zip(found, yardstick, exact, strict=True)):
        kind = "output" if i < outputs else "gradient"
        number = i + 1 if i < outputs else i + 1 - outputs
        name = kind if kind == "output" and outputs == 1 else f"{kind} {number}"
        if got.shape != torchs.shape or got.dtype != torchs.dtype:
            return f"{name} is {got.dtype} {list(got.shape)}, not {torchs.dtype} {[*torchs.shape]}"
        if not got.numel():
            continue
        rounding = torch.finfo(got.dtype).eps / 2 if got.is_floating_point() else 0.0
        for measure in (Tensor.max, Tensor.mean):
            error, allowed = (measure((t.double() - ideal).abs()).item() for t in (got, torchs))
            limit = ALLOWED[kind] * allowed + rounding * measure(ideal.double().abs()).item()
            if not error <= limit:  # NaN is wrong too
                which = "largest" if measure is Tensor.max else "mean"
                return f"{name}: {which} error {error:.3g}, allowed {limit:.3g}"
    return ""

"""One operator on one sample: its arguments, and what is timed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from bench.products import Product, products_in
from bench.timing import Entry
from pgolf.device import DTYPES
from pgolf.ops.operator import Operator, Result, Sample, Work
from pgolf.ops.tensors import tensors_in
from pgolf.ops.testing import Call, as_tuple

MODES = ("forward", "backward", "both")

Function = Callable[..., Result]
Results = tuple[Tensor, ...]  # the outputs and the gradients


@dataclass(frozen=True)
class Case:
    """An operator with arguments on a device.

    Attributes:
        call: the same arguments, to check a provider with.
        leaves: the tensors whose gradients are taken; () if the operator has none.
        upstream: gradients of the outputs, allocated before anything is timed.
    """

    operator: Operator
    sample: Sample
    dtype: str
    call: Call
    args: tuple
    kwargs: dict[str, Any]
    leaves: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]

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

    def products(self, mode: str) -> Counter[Product]:
        """The matmuls that the reference makes in a mode, each with its number."""
        kept: list[Result] = []
        run, prepare = self.entry(self.operator.reference, mode)
        kept.append(prepare())
        return products_in(lambda: run(kept.pop()))

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
    with DrawnOn(device):
        call = Call.of(operator, sample, DTYPES[dtype], device, contiguous=True)
    leaves = call.leaves()
    args, kwargs = call.split(call.arguments | dict(zip(call.wanted, leaves, strict=True)))
    with torch.no_grad():
        outputs = as_tuple(call.on(operator.reference, *leaves))
    upstream = call.upstream(outputs) if leaves else ()
    return Case(operator, sample, dtype, call, args, kwargs, tuple(leaves), tuple(upstream))


class DrawnOn(TorchFunctionMode):
    """Inside, random numbers that are asked of a CPU's generator come from one of a device.

    A sample of 98,304 tokens takes a CPU seconds to draw.
    """

    DRAW = (torch.randn, torch.rand, torch.randint)

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.generators: dict[torch.Generator, torch.Generator] = {}

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("generator")
        if function in self.DRAW and asked is not None and self.device.type == "cuda":
            if asked not in self.generators:
                seed = asked.initial_seed()
                self.generators[asked] = torch.Generator(self.device).manual_seed(seed)
            kwargs = kwargs | {"generator": self.generators[asked], "device": self.device}
        return function(*args, **kwargs)


def traffic(operator: Operator, sample: Sample, dtype: str) -> int:
    """Least bytes of forward and backward, without memory for the arguments."""
    with FakeTensorMode():
        args, kwargs = sample.build(torch.device("cpu"), DTYPES[dtype])
        return sum(work.read + work.written for work in operator.cost(*args, **kwargs))

"""The opaque operators of pgolf as torch calls them, compiled or not: their tensors and bytes."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

NAMESPACE = "pgolf::"


@dataclass(frozen=True)
class Operator:
    """An operator of torch.library.

    Attributes:
        name: with its namespace.
        parameters: of its schema.
    """

    name: str
    parameters: tuple[Any, ...]

    def changed(self, args: tuple, named: dict) -> list[Tensor]:
        """The tensors that a call changes in place."""
        values = dict(zip((p.name for p in self.parameters), args, strict=False)) | named
        return [
            t
            for p in self.parameters
            if p.alias_info is not None and p.alias_info.is_write
            for t in tensors_in(values.get(p.name))
        ]

    def bytes(self, args: tuple, named: dict, result: Any) -> int:
        """What a call moves if it reads and writes every tensor once."""
        read = unique_bytes(tensors_in((args, named)))
        return read + unique_bytes(self.changed(args, named)) + unique_bytes(tensors_in(result))


# (operator, what it is, positional arguments, those by keyword) -> its result
Call = Callable[[Operator, Callable, tuple, dict], Any]


@contextlib.contextmanager
def intercepted(call: Call) -> Iterator[None]:
    """Inside, each of our operators runs through `call`."""
    from pgolf.ops.opaque import OPAQUE

    def wrapped(operator: Operator, function: Callable) -> Callable:
        return lambda *args, **named: call(operator, function, args, named)

    before = {name: op.function for name, op in OPAQUE.items()}
    for name, op in OPAQUE.items():
        op.function = wrapped(Operator(name, tuple(op.overload._schema.arguments)), op.function)
    try:
        yield
    finally:
        for name, function in before.items():
            OPAQUE[name].function = function


def tensors_in(tree: Any) -> list[Tensor]:
    """Tensors in a nest of lists and the like, also those behind Triton's tensor descriptors."""
    leaves = [getattr(leaf, "base", leaf) for leaf in tree_leaves(tree)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def unique_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct elements of these tensors; the same address is the same tensor."""
    largest: dict[int, int] = {}
    for t in tensors:
        count = t.element_size()
        for size, stride in zip(t.shape, t.stride(), strict=True):
            count *= size if stride else min(size, 1)
        largest[t.data_ptr()] = max(count, largest.get(t.data_ptr(), 0))
    return sum(largest.values())

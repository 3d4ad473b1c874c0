"""What an operator is: its functions, implementations, samples and costs; and all of them by name.

`reference` is plain torch in the open, which torch.compile may fuse with its neighbours; every
other implementation runs behind an opaque operator of torch.library.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        device: type of the device whose tensors it takes.
        dtypes: of its matrices.
        functions: its launchers by name.
        missing: why it cannot run on this machine; '' if it can.
        emulated: whether kernels for a GPU run on CPU tensors in this process.
        package: whose kernels they are, if not pgolf's: not there on every machine that could run
            them, and as deterministic as they are.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    functions: Mapping[str, Callable]
    missing: Callable[[], str]
    emulated: Callable[[], bool] = lambda: False
    package: str = ""

    def runs_on(self, device: str) -> bool:
        return device == self.device or (self.device == "cuda" and self.emulated())


class Work(NamedTuple):
    """Least work of a pass: floating-point operations of matmuls, and bytes read and written."""

    flops: int
    read: int
    written: int


@dataclass(frozen=True)
class Sample:
    """Arguments of an operator: `build(device, dtype)` gives (positional, by keyword).

    `bench` marks the sizes that benchmarks take; the others are small and ragged, for tests.
    """

    label: str
    build: Callable[[torch.device, torch.dtype], tuple[tuple, dict[str, Any]]]
    bench: bool = False


# What an operator returns.
Result = Tensor | Sequence["Result"] | None


@dataclass(frozen=True)
class Operator:
    """Everything about one operator that tests, benchmarks and choices iterate over.

    Attributes:
        call: the public function; takes `impl`.
        reference: the same function in plain torch.
        differentiable: names of the arguments that have gradients.
        implementations: by name, apart from the reference.
        preferred: device type -> (implementation, reason), the order in which `auto` tries them;
            'cpu compiled' is the order under torch.compile where that is another one.
        samples: arguments for tests and benchmarks.
        cost: least work (forward, backward) for a sample's arguments.
        mutates: names of the arguments that it changes in place.
        obstacle: (implementation, sizes by name) -> why it cannot run these sizes; '' if it can.
        aliases: other names of implementations, or of the reference.
        timed: whether `python -m bench tune --epilogues` may have found what `auto` takes.
    """

    name: str
    call: Callable[..., Result]
    reference: Callable[..., Result]
    differentiable: tuple[str, ...]
    implementations: Mapping[str, Implementation]
    preferred: Mapping[str, Sequence[tuple[str, str]]]
    samples: Callable[[], list[Sample]]
    cost: Callable[..., tuple[Work, Work]]
    mutates: tuple[str, ...] = ()
    obstacle: Callable[..., str] = lambda impl, **sizes: ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    timed: bool = False

    @property
    def own(self) -> list[str]:
        """The implementations that are pgolf's."""
        return [name for name, impl in self.implementations.items() if not impl.package]


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Add an operator to the table."""
    OPERATORS[operator.name] = operator
    return operator

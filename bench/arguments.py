"""Arguments and results of operators, whether they are tensors or lists of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pgolf.ops.operator import Result


def as_tuple(result: Result) -> tuple[Tensor, ...]:
    """The results of an operator, where there is one, or none, too."""
    return (result,) if isinstance(result, Tensor) else tuple(result or ())


def with_tensors(argument: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with each of its tensors changed."""
    if isinstance(argument, list | tuple):
        return [change(t) if isinstance(t, Tensor) else t for t in argument]
    return change(argument) if isinstance(argument, Tensor) else argument

"""A result that is a product of two factors which nobody has multiplied out."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Factored(NamedTuple):
    """h = y factor[..., None], of which nothing but this product may be used.

    Attributes:
        y: (..., D).
        factor: (...,) fp32 (fp64 for an fp64 y), a constant as far as gradients go; None is 1.
    """

    y: Tensor
    factor: Tensor | None

    def product(self) -> Tensor:
        """h itself."""
        if self.factor is None:
            return self.y
        return (self.y * self.factor[..., None]).to(self.y.dtype)


def with_h_multiplied(function: Callable, public: Callable | None = None) -> Callable:
    """What tests and benchmarks call for an operator whose last result may be `Factored`.

    Args:
        public: whose signature it has; `function` if None.
    """

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> tuple[Tensor, ...]:
        *others, h = function(*args, **named)
        return (*others, h.product() if isinstance(h, Factored) else h)

    call.__signature__ = inspect.signature(public or function)
    return call

"""A result that is a product of two factors which nobody has multiplied out."""

from typing import NamedTuple

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

"""The matmuls of torch inside a function, by their shapes, and the time of these alone.

The rate of a large square matmul is no ceiling for a kernel whose products have 512 columns; the
rate of cuBLAS, or of a CPU's library, on the same shapes is.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.timing import Entry

# ATen's name -> where its two factors stand among the arguments.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


class Factor(NamedTuple):
    """A factor of a product: what decides how fast it goes."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def drawn(self, device: torch.device) -> Tensor:
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return made.normal_()


class Product(NamedTuple):
    """(M, K) times (K, N), or a batch of those."""

    left: Factor
    right: Factor

    @property
    def flops(self) -> int:
        return 2 * torch.Size(self.left.shape).numel() * self.right.shape[-1]


class Recorder(TorchDispatchMode):
    """Notes the products that are computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        at = PRODUCTS.get(function._schema.name.removeprefix("aten::"))
        if at is not None:
            factors = (Factor(tuple(t.shape), t.stride(), t.dtype) for t in args[at : at + 2])
            self.products[Product(*factors)] += 1
        return function(*args, **kwargs or {})


def products_in(function: Callable[[], Any]) -> Counter[Product]:
    """Each product that a call of `function` computes, and how often."""
    with Recorder() as recorder:
        function()
    return recorder.products


def square(device: torch.device, dtype: torch.dtype) -> Counter[Product]:
    """A large square one, for what torch does not compute by products that can be seen."""
    size = 8192 if device.type == "cuda" else 1024
    factor = Factor((size, size), (size, 1), dtype)
    return Counter([Product(factor, factor)])


def entry(products: Counter[Product], device: torch.device) -> tuple[Entry, int]:
    """All these products one after another, and their floating-point operations."""
    todo = []
    for product, count in products.items():
        factors = [factor.drawn(device) for factor in product]
        todo += [(*factors, torch.matmul(*factors))] * count

    def run(_: Any) -> None:
        for left, right, out in todo:
            torch.matmul(left, right, out=out)

    return Entry(run), sum(product.flops * count for product, count in products.items())

"""Operands of a GEMM kernel, in guard zones or in a dtype, and a GPU of few multiprocessors."""

import pytest
import torch

from pgolf.triton_kernels import gemm

from ..ops.guards import GuardZones


class Operands:
    """Base of a dataclass whose fields are tensors; None where there is none."""

    def in_zones(self, zones: GuardZones) -> "Operands":
        return type(self)(*(None if x is None else zones.input(x) for x in vars(self).values()))

    def to(self, dtype: torch.dtype) -> "Operands":
        """Packed too."""
        packed = (None if x is None else x.contiguous() for x in vars(self).values())
        return type(self)(*(None if x is None else x.to(dtype) for x in packed))


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch) -> None:
    """Persistent programs that have several tiles each, although the shapes are small."""
    monkeypatch.setattr(gemm, "H100_SMS", 2)

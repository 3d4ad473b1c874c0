"""Weights without bias: cast to the dtype of a pass where they are used or before, in late QAT
fake-quantised.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.ops.weight_cast import fake_quant, fake_quant_all, weight_cast_all


class Matrix(nn.Module):
    """A weight (out, in) without bias that can be fake-quantised where it is used.

    `prepare_qat` adds the buffers of late QAT: clip factor per row, bits, and the switch. They are
    tensors, so a compiled graph takes a change of any of them without recompiling.
    """

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.published: Tensor | None = None  # as in `Block`, which has those of its matrices
        self.grid: dict | None = None

    def prepare_qat(
        self, bits: int | Tensor, switch: Tensor, **grid: float | int | bool | str
    ) -> None:
        """Add the fake-quant of grid `bits` to the forward pass, off while `switch` is 0.

        `grid` holds the other arguments of `fake_quant`, its implementation among them. Matrices
        whose `bits` are one tensor are quantised in one go where plain torch does it.
        """
        device = self.weight.device
        self.grid = grid
        self.register_buffer("qat_clip", torch.ones(self.weight.size(0), device=device))
        own = bits if isinstance(bits, Tensor) else torch.tensor(float(bits), device=device)
        self.register_buffer("qat_bits", own)
        self.register_buffer("qat_on", switch)

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = [self.published] if self.published is not None else cast_all([self], x.dtype)
        return F.linear(x, weight)


class Fold(NamedTuple):
    """A cast by kernels of `weight_cast`, which multiplies rows by factors on its way."""

    impl: str
    scales: Sequence[Tensor | None]  # (out,), one a matrix; None is 1

    def of(self, chosen: Sequence[int]) -> "Fold":
        """The same for some of the matrices."""
        return Fold(self.impl, [self.scales[i] for i in chosen])


def cast_all(
    matrices: Sequence[Matrix], dtype: torch.dtype, fold: Fold | None = None,
    into: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """The weights as the forward pass uses them; those of one grid are quantised together.

    All that have a grid share one switch. Without a fold `fake_quant` casts those with a grid, and
    torch the others. `into`, with a fold: where to write those that `weight_cast_all` casts.
    """
    scales = fold.scales if fold else [None] * len(matrices)
    weights = [m.weight for m in matrices]
    left = [
        i
        for i, m in enumerate(matrices)
        if m.grid is not None or scales[i] is not None or m.weight.dtype != dtype
    ]
    while left:
        alike = [i for i in left if matrices[i].grid == matrices[left[0]].grid]
        together = [matrices[i] for i in alike]
        places = into and [into[i] for i in alike]
        cast = _cast_alike(together, dtype, fold and fold.of(alike), places)
        for i, weight in zip(alike, cast, strict=True):
            weights[i] = weight
        left = [i for i in left if i not in alike]
    return weights


def _cast_alike(
    matrices: Sequence[Matrix], dtype: torch.dtype, fold: Fold | None,
    into: Sequence[Tensor] | None,
) -> list[Tensor]:  # fmt: skip
    """`cast_all` of matrices with one grid, or with none."""
    weights, options, grids = [m.weight for m in matrices], dict(matrices[0].grid or {}), ()
    if matrices[0].grid is not None:
        grids = [m.qat_clip for m in matrices], [m.qat_bits for m in matrices], matrices[0].qat_on
    if fold:
        options |= {"impl": fold.impl, "dtype": dtype, "into": into}
        return weight_cast_all(weights, fold.scales, *grids, **options)
    if grids and options.get("impl") == "reference" and not torch.compiler.is_compiling():
        return _quantised_as_one(matrices, dtype, options)
    if grids:
        return fake_quant_all(weights, *grids, dtype=dtype, **options)
    return [w.to(dtype) for w in weights]


def _quantised_as_one(
    matrices: Sequence[Matrix], dtype: torch.dtype, options: dict
) -> list[Tensor]:
    """`fake_quant_all` where every operation is a launch: their number is not that of matrices.

    Rows have steps of their own, so that those of matrices of one width and one `qat_bits` may
    stand in one matrix.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, m in enumerate(matrices):
        groups.setdefault((m.weight.size(1), id(m.qat_bits)), []).append(i)
    found = {}
    for chosen in groups.values():
        some = [matrices[i] for i in chosen]
        whole, clips = torch.cat([m.weight for m in some]), torch.cat([m.qat_clip for m in some])
        cast = fake_quant(whole, clips, some[0].qat_bits, some[0].qat_on, dtype=dtype, **options)
        found |= zip(chosen, cast.split([m.weight.size(0) for m in some]), strict=True)
    return [found[i] for i in range(len(matrices))]


def scaled_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """A matrix whose rows are multiplied by factors."""
    return scale.to(weight.dtype)[:, None] * weight

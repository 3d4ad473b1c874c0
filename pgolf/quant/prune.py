"""Pruning to fit: zero the cheapest of the smallest codes until the file is small enough.

Candidates are the codes of each integer tensor with its smallest magnitude above zero (1; 4 on the
grid of multiples of 4). Zeroing a code m costs (m * step)² of squared error, the step with its
column's factor; the cheapest go first, equal ones in flat order. The size comes from the real
codec: the caller's function is called a few times.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.errors import BudgetError
from pgolf.progress import Progress
from pgolf.quant.quantize import QuantizedModel


def prune_to_fit(
    model: QuantizedModel,
    size: Callable[[QuantizedModel], int],
    target: int,
    probes: int = 12,
    progress: bool = True,
) -> tuple[QuantizedModel, int]:
    """Zero as few codes as needed so that `size(model) <= target`.

    The search narrows a bracket by interpolation; it ends when the bracket is one code wide or the
    probes are spent, so on a large model the count is the least to within a small share.

    Returns:
        The pruned model (the same object if it fits already), and how many codes were zeroed.

    Raises:
        BudgetError: it does not fit with every candidate zeroed.
    """
    with Progress("pruning to fit", probes, "probes", enabled=progress) as bar:

        def probe(count: int) -> tuple[QuantizedModel, int]:
            pruned = _without(model, ranks, count)
            excess = size(pruned) - target
            bar.update(note=f"{count:,} codes zeroed: {excess:+,} bytes")
            return pruned, excess

        ranks: dict[str, tuple[Tensor, Tensor]] = {}
        _, low_excess = probe(0)
        if low_excess <= 0:
            return model, 0
        ranks, total = _ranked_candidates(model)
        best, high_excess = probe(total)
        if high_excess > 0:
            raise BudgetError(
                f"{high_excess:,} bytes too large even with all {total:,} smallest codes zeroed: "
                "use fewer bits or a smaller model",
                int(high_excess),
            )
        # The Illinois method (Dowell and Jarratt 1971): interpolate, and where the same end of the
        # bracket moves twice, halve the excess of the other, so that neither end stays for long.
        low, high, moved = 0, total, ""
        for _ in range(probes - 2):
            if high - low <= 1:
                break
            share = low_excess / (low_excess - high_excess) if high_excess else 1.0
            middle = min(max(low + int((high - low) * share), low + 1), high - 1)
            pruned, excess = probe(middle)
            if excess > 0:
                low, low_excess = middle, float(excess)
                high_excess *= 0.5 if moved == "low" else 1.0
                moved = "low"
            else:
                high, high_excess, best = middle, float(excess), pruned
                low_excess *= 0.5 if moved == "high" else 1.0
                moved = "high"
        return best, high


def _ranked_candidates(model: QuantizedModel) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Per tensor, flat positions of its candidates and their ranks by cost; and the total."""
    positions, costs = {}, {}
    for name, q in model.tensors.items():
        if q.steps is None:
            continue
        magnitude = q.data.to(torch.int16).abs_()
        nonzero = magnitude[magnitude > 0]
        if not nonzero.numel():
            continue
        smallest = nonzero.min()
        positions[name] = torch.nonzero(magnitude.flatten() == smallest).flatten()
        rows, columns = positions[name] // q.data.size(1), positions[name] % q.data.size(1)
        steps = q.steps.float()[rows]
        if q.columns is not None:
            steps *= q.columns.float()[columns]
        costs[name] = (steps * smallest).square()
    if not positions:
        return {}, 0
    cost = torch.cat(list(costs.values()))
    rank = torch.empty_like(cost, dtype=torch.int64)
    rank[cost.argsort(stable=True)] = torch.arange(cost.numel())
    parts = rank.split([p.numel() for p in positions.values()])
    ranks = {n: (p, part) for (n, p), part in zip(positions.items(), parts, strict=True)}
    return ranks, cost.numel()


def _without(
    model: QuantizedModel, ranks: dict[str, tuple[Tensor, Tensor]], count: int
) -> QuantizedModel:
    """The model with the `count` cheapest candidates zeroed."""
    tensors = dict(model.tensors)
    for name, (positions, rank) in ranks.items():
        q = model.tensors[name]
        codes = q.data.flatten().clone()
        codes[positions[rank < count]] = 0
        tensors[name] = dataclasses.replace(q, data=codes.view(q.shape))
    return dataclasses.replace(model, tensors=tensors)

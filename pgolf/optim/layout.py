"""Which rank owns which matrix, and where each lies in the flat buffers that ranks exchange.

A buffer is one part a rank, all of one length, so that a reduce-scatter hands each rank the sums of
its own matrices and an all-gather brings all of them back. Whole matrices are dealt out, as
Newton-Schulz needs them whole; matrices that the forward pass takes packed stay together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
ALIGNED = 64  # elements that what is taken together begins at a multiple of: 128 bytes of bf16


def newton_schulz_cost(shape: Shape) -> int:
    """Multiplications of one iteration, X X^T, its square, and their product with X."""
    short, long = sorted(shape)
    return short * short * (2 * long + short)


@dataclass(frozen=True)
class Layout:
    """Where matrices lie.

    Attributes:
        starts: name -> first element, in the order in which they lie; a part's first element is a
            multiple of `part`.
        shapes: name -> (R, C), in that order.
        part: elements of a rank's part.
        world: ranks.
    """

    starts: dict[str, int]
    shapes: dict[str, Shape]
    part: int
    world: int

    @classmethod
    def of(cls, units: Sequence[Mapping[str, Shape]], world: int) -> "Layout":
        """Deal matrices out, the dearest first, each to the rank that has least to do.

        Args:
            units: name -> shape of what stays together, one after the other.
        """
        # Longest processing time first, Graham 1969: the fullest rank has at most 4/3 of the best.
        parts: list[list[int]] = [[] for _ in range(world)]
        cost, size = [0] * world, [0] * world
        costs = [sum(map(newton_schulz_cost, unit.values())) for unit in units]
        for i in sorted(range(len(units)), key=lambda i: -costs[i]):
            rank = min(range(world), key=lambda r: (cost[r], size[r]))
            parts[rank].append(i)
            cost[rank] += costs[i]
            elements = sum(rows * columns for rows, columns in units[i].values())
            size[rank] += -(-elements // ALIGNED) * ALIGNED
        part = max(size, default=0)
        starts: dict[str, int] = {}
        shapes: dict[str, Shape] = {}
        for rank, dealt in enumerate(parts):
            at = rank * part
            for i in sorted(dealt):
                at = -(-at // ALIGNED) * ALIGNED
                for name, (rows, columns) in units[i].items():
                    starts[name], shapes[name] = at, (rows, columns)
                    at += rows * columns
        return cls(starts, shapes, part, world)

    def owner(self, name: str) -> int:
        """The rank that owns a matrix."""
        return self.starts[name] // self.part

    def owned(self, rank: int) -> list[str]:
        """The matrices of a rank, in the order in which they lie."""
        return [name for name in self.starts if self.owner(name) == rank]

    def of_rank(self, rank: int) -> slice:
        """A rank's part of a buffer."""
        return slice(rank * self.part, (rank + 1) * self.part)

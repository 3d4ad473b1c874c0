"""Configurations that no walk from a row of configs.json comes to: each step on the way is slower.

`bench tune` times them beside the row's neighbours, and `bench aot` compiles them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from pgolf.triton_kernels.launch import Config, configs


class Candidate(NamedTuple):
    """What is other than in a row of its kernel."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int

    def of(self, row: Config) -> Config:
        """The row with these sizes."""
        return dataclasses.replace(
            row, blocks={**row.blocks, **self.blocks}, num_warps=self.num_warps,
            num_stages=self.num_stages,
        )  # fmt: skip


# Two programs share an SM: one multiplies while the other is in its epilogue. Each has half of the
# shared memory and of the registers, and so half of a tile.
SHARING = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PER_SM": 2}
CANDIDATES = {
    "leaky_relu2_up_tma": [Candidate(SHARING, 4, 3), Candidate(SHARING, 8, 3)],
    "leaky_relu2_dgrad_tma": [Candidate(SHARING, 4, 3)],  # 8 warps need 171 registers a thread
    "xsa_linear_dgrad_tma": [Candidate({**SHARING, "BLOCK_M": 64}, 4, 3)],
    "linear_residual_tma": [Candidate({**SHARING, "BLOCK_M": 64}, 4, 3)],
    "norm_mlp_dgrad_tma": [Candidate(SHARING, 4, 3)],
    "linear_qk_rope_tma": [
        Candidate({**SHARING, "BLOCK_M": 64}, 4, 3), Candidate({**SHARING, "PER_SM": 1}, 8, 4)
    ],
}


def of(kernel: str, row: Config) -> list[Config]:
    """The candidates for a row of configs.json."""
    return [candidate.of(row) for candidate in CANDIDATES.get(kernel, ())]


@contextlib.contextmanager
def taken(kernel: str, candidate: Candidate) -> Iterator[None]:
    """Inside, `pick` returns the candidate, of the row that it would return."""
    rows = configs()[kernel]
    before = list(rows)
    rows[:] = map(candidate.of, before)
    try:
        yield
    finally:
        rows[:] = before

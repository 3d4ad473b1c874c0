"""What one warp does in a launch of each row kernel: the record's model, one GPU, 98,304 tokens.

`python -m bench aot` counts the instructions that it executes from the SASS of sm_90a, with the
trip counts that are declared here, in all and for 16 bytes that a lane moves. A kernel whose loops
are not those declared is refused with a list of its loops: declare their trip counts in the order
of their addresses (0 for loops that the compiler made for other lengths).
`python -m bench aot --only NAME` prints the figures of the table and those of the source;
`python -m bench aot --compiler nvcc --update` writes them into the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.sass import Function
from bench.sass_flow import Flow, loads_in_flight

ARCH = "sm_90a"
TOKENS, WIDTH, VOCABULARY, HIDDEN = 98304, 512, 1024, 1536
HEADS, GROUPS, SIZE = 8, 4, 64
CHUNK = 4096 // 8  # elements of a list of tensors that a warp takes
MATRICES = 22 * 512 * 512 + 22 * 256 * 512 + 22 * 1536 * 512  # elements that Muon updates
ROWS = 22 * 512 + 22 * 256 + 11 * 1536 + 11 * 512  # of these matrices

# Of sm_90: registers and warps an SM, bytes of shared memory a block and an SM, the SM's own part.
REGISTERS, WARPS, BLOCKS, SHARED, RESERVED = 65536, 64, 32, 233472, 1024


@dataclass(frozen=True)
class Item:
    """The work of a warp.

    Attributes:
        what: a description.
        arguments: of the kernel's template, as `bench aot` prints them.
        read: bytes that the warp needs from memory, each once; caches hold the rest.
        written: bytes that it writes.
        trips: of the kernel's loops, in the order of their addresses.
        items: in a launch.
        shortest: what the kernel does besides, moving nothing, is rare.
    """

    what: str
    arguments: tuple[str, ...]
    read: int
    written: int
    trips: tuple[int, ...]
    items: int
    shortest: bool = False


_HEAD = SIZE * 2
_ROW = WIDTH * 2
# Not of those that a step spends no time in to speak of: sums of sums, and rows that a cache has.
ITEMS: Mapping[str, Item] = {
    "qk_rope_forward": Item(
        "4 tokens with a value", ("bf16", "8", "8", "1", "Rotated16", "false"),
        4 * (HEADS + 3 * GROUPS) * _HEAD, 4 * (HEADS + 2 * GROUPS) * _HEAD, (4,), TOKENS // 4,
    ),
    "qk_rope_backward_blocks": Item(
        "12 tokens with two gradients of v, and their sums",
        ("bf16", "8", "8", "1", "Rotated16", "false"),
        12 * (2 * HEADS + 4 * GROUPS) * _HEAD, 12 * (HEADS + 2 * GROUPS) * _HEAD, (12,),
        TOKENS // 12,
    ),
    "residual_norm_forward": Item(
        "4 rows with branch, x0, total and x_in", ("bf16", "8", "32", "2", "625u"),
        4 * 3 * _ROW, 4 * 2 * _ROW, (4,), TOKENS // 4,
    ),
    "residual_norm_backward_rows": Item(
        "24 rows whose sum is a skip, and their sums", ("bf16", "8", "32", "2", "3056u"),
        24 * 5 * _ROW, 24 * 2 * _ROW + 2 * WIDTH * 4 // 8, (24, 2, 0, 2, 0), TOKENS // 24,
    ),
    "scaled_copies_backward_rows": Item(
        "half of 47 rows of 11 copies, and their sums", ("bf16", "8"), 47 * 12 * _ROW // 2,
        47 * _ROW // 2 + 11 * WIDTH * 4 // 8, (11, 0, 47, *(0,) * 12), TOKENS * 2 // 47,
    ),
    "softcap_cross_entropy_rows": Item(
        "a row of 1024 logits", ("bf16", "8", "false", "BoundedCap"), VOCABULARY * 2,
        VOCABULARY * 2, (), TOKENS,
    ),
    "embed_smear_forward": Item(
        "8 tokens in a row, with bigrams", ("float", "bf16", "4", "4"), 8 * _ROW, 8 * _ROW,
        (1, 8), TOKENS // 8,
    ),
    "embed_smear_chunks": Item(
        "32 positions of one id, with bigrams, and their sums", ("float", "bf16", "4", "4"),
        32 * 2 * _ROW, 32 * _ROW + WIDTH * 4 + WIDTH * 4 // 4, (0, 1, 0, 0, 32, 1), TOKENS // 32,
    ),
    "token_sums_columns": Item(
        "64 columns of 4 rows in each of 4 groups of lanes, divided", ("bf16", "8"),
        16 * 128, 128 // 8, (1, 1, 0), TOKENS // 4,
    ),
    "weight_cast_rows": Item(
        "a row of 1536, quantised", ("(Quantise)1", "float", "bf16", "4"), HIDDEN * 4,
        HIDDEN * 2, (1, 1, 0, 1), 512,
    ),
    "weight_cast_backward_rows": Item(
        "a row of 512, quantised", ("(Quantise)1", "float", "bf16", "4"), WIDTH * (4 + 2),
        WIDTH * 4, (1, 1, 1), 3 * 1536,
    ),
    "xsa_forward_rows": Item(
        "4 value heads of a token with 2 query heads each", ("bf16", "8", "8", "1"),
        4 * 3 * _HEAD, 4 * 2 * _HEAD, (1, 1), TOKENS,
    ),
    "xsa_backward_rows": Item(
        "4 value heads of a token with 2 query heads each", ("bf16", "8", "8", "1"),
        4 * 5 * _HEAD, 4 * 3 * _HEAD, (1, 2), TOKENS,
    ),
    "leaky_relu2_words": Item(
        "256 elements", ("bf16", "8"), 256 * 2, 256 * 2 + 32, (1,), TOKENS * HIDDEN // 256
    ),
    "leaky_relu2_backward_words": Item(
        "256 elements", ("bf16", "8"), 256 * 4 + 32, 256 * 2, (1,), TOKENS * HIDDEN // 256
    ),
    "grad_norm_chunks": Item(
        "512 elements in fp32", (), CHUNK * 4, 2, (1, 0, 1, *(0,) * 6), MATRICES // CHUNK,
        shortest=True,
    ),
    "muon_momentum_rows": Item(
        "a row of 512 in fp32", ("false",), WIDTH * 4 * 2, WIDTH * 4 * 2, (1, 4, *(0,) * 8), ROWS
    ),
    "param_update_chunks": Item(
        "512 elements in fp32 by AdamW, with an average", (), CHUNK * 5 * 4, CHUNK * 4 * 4,
        (1, 4, 0), MATRICES // CHUNK,
    ),
}  # fmt: skip


def figures(
    kernel: str, arguments: Sequence[str], arch: str, function: Function
) -> dict[str, float]:
    """What a warp executes for its item, {} of an instance that has none.

    Returns:
        Instructions and barriers of the warp, instructions for 16 bytes a lane, global loads in
        flight at most before the first of their values is used, and warps that an SM holds.

    Raises:
        ValueError: the item's trip counts are not those of the kernel's loops.
    """
    item = ITEMS.get(kernel)
    if arch != ARCH or item is None or item.arguments != tuple(arguments):
        return {}
    executed = Flow(function.code).executed(
        item.trips, item.written // 32, item.read // 32, item.shortest
    )
    return {
        "instructions": len(executed),
        "per_16_bytes": round(len(executed) * 32 * 16 / (item.read + item.written), 1),
        "loads_in_flight": loads_in_flight(executed),
        "barriers": sum(i.base == "BAR" for i in executed),
        "warps": warps(function),
    }


def warps(function: Function) -> int:
    """That an SM of sm_90 holds: registers, shared memory and the blocks' number limit them."""
    block = -(-function.threads // 32)
    per_warp = -(-function.registers // 8) * 8 * 32
    by_registers = REGISTERS // 4 // per_warp * 4 // block  # each quarter has its own
    by_shared = SHARED // (function.shared + RESERVED)
    return min(by_registers, by_shared, BLOCKS, WARPS // block) * block


def by_kernel(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The rows that have executed instructions, by the kernel, which has one of them."""
    return {name.split(":")[0].split("<")[0]: r for name, r in rows.items() if "instructions" in r}


def lines(
    rows: Mapping[str, Mapping[str, float]], recorded: Mapping[str, Mapping[str, float]]
) -> Sequence[str]:
    """A table of what the rows with such figures are, and those of `recorded`, by kernel, were."""
    table = [
        f"{'kernel':60} {'instructions':>17} {'per 16 bytes':>15} {'loads in flight':>15} "
        f"{'barriers':>11} {'warps/SM':>9} {'registers':>11}"
    ]
    for name, row in rows.items():
        old = recorded.get(*by_kernel({name: row}), {})
        cells = (
            f"{old.get(key, '-')} -> {row[key]}".rjust(width)
            for key, width in (
                ("instructions", 17), ("per_16_bytes", 15), ("loads_in_flight", 15),
                ("barriers", 11), ("warps", 9), ("registers", 11),
            )
        )  # fmt: skip
        table.append(f"{name.partition(': ')[0]:60} {' '.join(cells)}")
    return table
